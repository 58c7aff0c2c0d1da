"""Two networks, or two runs, set against each other: which is ahead, at which layer, and is that more than noise?"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qdv_gpu.data.convert import as_images
from qdv_gpu.data.datasets import DATASETS, check_data, list_images
from qdv_gpu.data.decode import image_tensor
from qdv_gpu.data.images import Images
from qdv_gpu.data.thumbnails import find_again, pictures
from qdv_gpu.errors import InputError, as_path, check_among, check_flag, listed, short
from qdv_gpu.files import explained
from qdv_gpu.networks.layers import output_names, read_layers
from qdv_gpu.networks.load import Source, load_networks, select_layers
from qdv_gpu.report.contrast import write_comparison
from qdv_gpu.report.folder import DPI, FORMATS, RunFolder, read_formats
from qdv_gpu.report.pictures import plot_images
from qdv_gpu.results.comparison import Comparison, Layers, check_pairing, compared
from qdv_gpu.results.records import AnalysedLayer
from qdv_gpu.results.run import Run, check_same, is_run, read_run
from qdv_gpu.scores.comparison import check_margin
from qdv_gpu.studies.analyze import analysing
from qdv_gpu.studies.report import REPORT, write_report
from qdv_gpu.studies.settings import Settings, changed, preset

logger = logging.getLogger(__name__)
Side = Source | str | Path


def compare(
    first: Side,
    second: Side,
    data: Any = None,
    out: str | Path = "comparison",
    *,
    runs: Sequence[tuple[Side, Side]] = (),
    pair: str | Mapping[str, str] = "position",
    margin: float = 0.02,
    settings: Settings | str = "default",
    weights: str | Path = "imagenet",
    device: str | torch.device = "auto",
    formats: Sequence[str] = ("png",),
    store: str | Path | None = None,
    skip_bad: bool = False,
    **changes: Any,
) -> Comparison:
    """Compare B with A, layer by layer, on the same images.

    Parameters
    ----------
    first, second : str, nn.Module, Network or Path
        A and B: networks, as for `load_network`, or run folders of `analyze` with one network each.
    data : str, Path or anything that `as_images` takes
        For networks, and for them alone: as for `analyze`, with labels; of arrays a pair (images, labels).
    out : str or Path
        Gets report.html, comparison.json, .csv and .md and figures/comparison.png; of networks
        also all that `analyze` writes.
    runs : sequence of pairs
        Further runs (other seeds of training) of A and of B. Three or more of each speak of networks trained so, and
        not only of these two.
    pair : {"position", "name", "cka"} or mapping of str to str
        Which layers belong together, as for `compared`.
    margin : float
        Differences of NH within it count as none.
    settings, weights, device, formats, store, skip_bad, **changes
        As for `analyze`, for networks; of them k, formats and store also for run folders. Of several k it is the
        first, of run folders otherwise A's first.

    Returns
    -------
    Comparison

    Raises
    ------
    InputError
        If the runs are of other images, labels, classes or settings (the first that differs is named), one has no
        scores for k, one is given twice, or as `analyze`.

    Examples
    --------
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> other = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> options = {"samples": 100, "perplexity": 8, "seeds": 2, "layers": "2"}
    >>> found = compare(network, other, "digits", tmp_path / "compared", **options)
    >>> [pair.in_maps.verdict in ("ahead", "behind", "equivalent", "undecided") for pair in found.pairs]
    [True]
    """
    formats, out = read_formats(formats), as_path("out", out)
    runs = listed("runs", runs, tuple | list, "pairs of a run of A and a run of B")
    if any(len(both) != 2 for both in runs):
        raise InputError(f"runs must be pairs of a run of A and a run of B, got {short(runs)}")
    check_flag("skip_bad", skip_bad)
    check_margin(margin)
    check_pairing(pair)
    sides = [side for both in ((first, second), *runs) for side in both]
    store = None if store is None or (isinstance(store, str) and not store) else as_path("store", store)
    if _are_runs(sides, data):
        if data is not None or not (isinstance(settings, str) and settings == "default") or changes.keys() - {"k"}:
            raise InputError("run folders have their images and settings: of data and settings only k can be given")
        k = changed(Settings(), changes).neighbors[0] if changes else None
        found, folder = _read_all(sides, k, store), RunFolder(out, "analyze" if is_run(out) else "compare")
        layers = _layers_of(found)
        folder.check()
        with folder.locked(None):
            return _written(folder, found, layers, pair, margin, formats)
    networks = [str(side) if isinstance(side, Path) else side for side in sides]
    chosen = changed(preset(settings) if isinstance(settings, str) else settings, changes)
    if not isinstance(data, str | Path):
        data = as_images(data, image_size=None if chosen.crop else chosen.image_size)
    _check_labels(data, chosen)
    if isinstance(pair, Mapping):
        _check_layers(networks, pair, chosen, weights)
    folder = RunFolder(out)
    with analysing(
        folder, networks, data, settings=settings, weights=weights, device=device, formats=formats, store=store,
        skip_bad=skip_bad, **changes,
    ):  # fmt: skip
        found = [read_run(out, store=store)]
        return _written(folder, found, _layers_of(found), pair, margin, formats)


def _are_runs(sides: Sequence[Side], data: Any) -> bool:
    """Whether all are run folders; InputError if only some are, or if they are networks and there are no data."""
    networks = [side for side in sides if not is_run(side)]
    if not networks:
        return True
    named = f"{networks[0]!s:.80}" if isinstance(networks[0], str | Path) else type(networks[0]).__name__
    if len(networks) < len(sides):
        raise InputError(f"run folders can be compared with run folders alone, and {named} is no finished run")
    if data is None:
        raise InputError(f"data is required to compare networks, and {named} is no finished run: pass --data")
    return False


def _layers_of(found: Sequence[Run]) -> tuple[list[Layers], list[Layers]]:
    """The layers of A's runs, and of B's; InputError unless these can be compared."""
    layers = _of_networks(found)
    a, b = layers[0::2], layers[1::2]
    _check_runs(a, b)
    return a, b


def _written(  # noqa: PLR0917 - what there is to compare, and how
    folder: RunFolder, found: Sequence[Run], layers: tuple[list[Layers], list[Layers]],
    pair: str | Mapping[str, str], margin: float, formats: Sequence[str],
) -> Comparison:  # fmt: skip
    """Compare the layers of A's runs with those of B's, and write what comes of it to a folder that is locked."""
    one, (a, b) = found[0], layers
    comparison = compared(a, b, one.labels, one.classes, k=a[0][0].scores[0].k, pair=pair, margin=margin)
    for one_pair in comparison.pairs:
        logger.debug("%s with %s", one_pair.first.layer, one_pair.second.layer)
    _remove_pictures(folder.out)
    write_comparison(folder, comparison, formats)
    _draw_changed(folder, comparison, one, formats)
    if folder.kind == "analyze":
        folder.add()
    others = [run.folder for run in found if run.folder != folder.out]
    write_report([folder.out, *others], folder.out / REPORT)
    return comparison


def _check_labels(data: str | Path | Images, settings: Settings) -> None:
    """Raise InputError before anything is computed if images have no labels."""
    if isinstance(data, Images):
        data.require_labels("a comparison")
    elif str(data) not in DATASETS:
        check_data(data)
        if list_images(Path(data), settings.split).labels is None:
            raise InputError(f"the images of {data} have no labels: a comparison needs them")


def _check_layers(networks: Sequence[Source], pair: Mapping[str, str], settings: Settings, weights: str | Path) -> None:
    """Raise InputError before anything is computed if a layer that is paired is not there."""
    loaded = load_networks(
        networks[:2], weights=weights, image_size=settings.image_size, mean=settings.mean, std=settings.std,
        device="cpu",
    )  # fmt: skip
    selected = select_layers(loaded, read_layers(settings.layers))
    for network, layers, wanted in zip(loaded, selected, (list(pair), list(pair.values())), strict=True):
        names = output_names(network, layers, settings.image_size)
        for layer in wanted:
            check_among(f"layer of {network.name}", layer, names)


def _read_all(folders: Sequence[Any], k: int | None, store: Path | None) -> list[Run]:
    """Runs for one k, by default the first of the first."""
    first = read_run(folders[0], k=k, store=store)
    scored = next(iter(first.networks.values()))[0].scores[0]
    return [first, *(read_run(folder, k=scored.k, store=store) for folder in folders[1:])]


def _draw_changed(folder: RunFolder, found: Comparison, run: Run, formats: Sequence[str]) -> None:
    """Draw the images whose hits changed most, if they can be found where the run had them from."""
    positions, settings = found.changed().tolist(), run.about["settings"]
    if not positions:
        logger.info("no image's hits changed: none is drawn")
        return
    try:
        images = find_again(
            run.about["data"], run.files, run.about["images"]["contents"], split=settings["split"],
            image_size=None if settings["crop"] else settings["image_size"],
        )  # fmt: skip
        shown = [image_tensor(one) for one in pictures(images, positions, DPI)]  # each an inch wide
    except (InputError, OSError) as error:
        logger.info("the images that changed most are not drawn: %s", error)
        return
    a, b = found.hits
    titles = [(run.classes[run.labels[i]], f"{a[i]:.2f} → {b[i]:.2f}") for i in positions]
    figure, _ = plot_images(shown, titles, f"hits of {found.first} → {found.second}, mean of the layers compared")
    folder.figure("figures/changed", figure, formats)


def _is_same(one: AnalysedLayer, other: AnalysedLayer) -> bool:
    return one.X is not None and other.X is not None and np.array_equal(one.X, other.X)


def _remove_pictures(out: Path) -> None:
    """Remove the pictures of an earlier comparison, which this one may not draw, or not in that format."""
    for name in ("comparison", "changed"):
        for suffix in FORMATS:
            picture = out / "figures" / f"{name}.{suffix}"
            with explained(picture):
                picture.unlink(missing_ok=True)


def _of_networks(found: Sequence[Run]) -> list[Layers]:
    """The layers of each network, A's and B's by turns, of one run or of one run each."""
    if len(found) == 1:
        return list(found[0].networks.values())
    for run in found:
        if len(run.networks) != 1:
            raise InputError(f"{run.folder} is of {len(run.networks)} networks: a run folder of one is required")
        check_same(found[0], run)
    layers = [next(iter(run.networks.values())) for run in found]
    a, b = (own[0].network for own in layers[:2])
    for run, own, expected, other in zip(found, layers, (a, b) * len(found), (b, a) * len(found), strict=False):
        if own[0].network == other != expected:
            raise InputError(f"{run.folder} is of {other} and stands among the runs of {expected}: --runs takes A2,B2")
    if a == b:  # the folders tell them apart
        one, two = (run.folder for run in found[:2])
        ways = [(one.name, two.name), (str(one), str(two)), ("A", "B")]
        apart = next(both for both in ways if both[0] != both[1])
        for i in range(2):
            layers[i] = [replace(layer, network=f"{layer.network} ({apart[i]})") for layer in layers[i]]
    return list(layers)


def _check_runs(first: Sequence[Layers], second: Sequence[Layers]) -> None:
    """Raise InputError unless the runs of each network have the same layers, and each is another."""
    for runs in (first, second):
        name = runs[0][0].network
        for number, run in enumerate(runs):
            if [layer.layer for layer in run] != [layer.layer for layer in runs[0]]:
                both = (", ".join(layer.layer for layer in one) for one in (runs[0], run))
                raise InputError(f"the runs of {name} must have the same layers, got {' and '.join(both)}")
            for before in runs[:number]:
                if all(_is_same(x, y) for x, y in zip(before, run, strict=True)):
                    raise InputError(f"two of the runs of {name} are the same: --runs is for other seeds of training")
