"""Two networks, or two runs, set against each other: which is ahead, at which layer, and is that more than noise?"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdv_gpu.data.datasets import DATASETS, load_images
from qdv_gpu.data.decode import load_image
from qdv_gpu.errors import InputError, as_path
from qdv_gpu.networks.load import Source
from qdv_gpu.report.contrast import write_comparison
from qdv_gpu.report.folder import RunFolder, read_formats
from qdv_gpu.report.pictures import plot_images
from qdv_gpu.results.comparison import Comparison, Layers, compared
from qdv_gpu.results.run import Run, check_same, is_run, read_run
from qdv_gpu.scores.comparison import check_margin
from qdv_gpu.studies.analyze import analyze
from qdv_gpu.studies.settings import Settings, changed

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
        For networks: as for `analyze`, with labels.
    out : str or Path
        Gets comparison.json, .csv and .md and figures/comparison.png; of networks also all that `analyze` writes.
    runs : sequence of pairs
        Further runs (other seeds of training) of A and of B. Three or more of each speak of networks trained so, and
        not only of these two.
    pair : {"position", "name", "cka"} or mapping of str to str
        Which layers belong together, as for `compared`.
    margin : float
        Differences of NH within it count as none.
    settings, weights, device, formats, store, skip_bad, **changes
        As for `analyze`, for networks; of them k, formats and store also for run folders.

    Returns
    -------
    Comparison

    Raises
    ------
    InputError
        If the runs are of other images, labels, classes or settings (the first that differs is named), one has no
        scores for k, or as `analyze`.

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
    sides = [(first, second), *runs]
    if not all(isinstance(both, tuple | list) and len(both) == 2 for both in sides):
        raise InputError(f"runs must be pairs of a run of A and a run of B, got {runs!r:.80}")
    flat = [side for both in sides for side in both]
    check_margin(margin)
    if all(is_run(side) for side in flat):
        k = changed(Settings(), changes).neighbors[0] if "k" in changes else None
        found = [read_run(side, k=k, store=store) for side in flat]  # type: ignore[arg-type]  # they are paths
        folder = RunFolder(out)
        if not is_run(out):
            _check_own(out)
    else:
        if any(is_run(side) for side in flat):
            raise InputError("either networks or run folders can be compared: a run folder and a network were given")
        if data is None:
            raise InputError("data is required to compare networks: pass --data, or run folders")
        networks = [str(side) if isinstance(side, Path) else side for side in flat]
        analyze(
            networks, data, out, settings=settings, weights=weights, device=device, formats=formats, store=store,
            skip_bad=skip_bad, **changes,
        )  # fmt: skip
        found, folder = [read_run(out, store=store)], RunFolder(out)
    layers = _of_networks(found, len(flat))
    a, b = layers[0::2], layers[1::2]
    one = found[0]
    comparison = compared(a, b, one.labels, one.classes, k=a[0][0].scores[0].k, pair=pair, margin=margin)
    for one_pair in comparison.pairs:
        logger.debug("%s with %s", one_pair.first.layer, one_pair.second.layer)
    write_comparison(folder, comparison, formats)
    _draw_changed(folder, comparison, one, formats)
    return comparison


def _draw_changed(folder: RunFolder, found: Comparison, run: Run, formats: Sequence[str]) -> None:
    """Draw the images whose hits changed most, if they can be found where the run had them from."""
    positions = found.changed().tolist()
    try:
        images = _images(run, positions)
    except (InputError, OSError) as error:
        logger.info("the images that changed most are not drawn: %s", error)
        return
    a, b = found.hits
    titles = [(run.classes[run.labels[i]], f"{a[i]:.2f} → {b[i]:.2f}") for i in positions]
    figure, _ = plot_images(images, titles, f"hits of {found.first} → {found.second}")
    folder.figure("figures/changed", figure, formats)


def _images(run: Run, positions: Sequence[int]) -> list[Tensor]:
    """Some images of a run, uint8 [C, H, W]."""
    data = run.about["data"]
    if data in DATASETS:
        split = load_images(data, run.about["settings"]["split"])
        return [split[int(run.files[i])] for i in positions]
    top = Path(data) if Path(data).is_dir() else Path(data).parent
    if not top.is_dir() or data == "arrays":
        raise InputError(f"{data} is no folder of images")
    return [load_image(top / run.files[i]) for i in positions]


def _of_networks(found: Sequence[Run], count: int) -> list[Layers]:
    """The layers of each network, A's and B's by turns, of one run or of one run each."""
    if len(found) == 1:
        return list(found[0].networks.values())
    for run in found:
        if len(run.networks) != 1:
            raise InputError(f"{run.folder} is of {len(run.networks)} networks: a run folder of one is required")
        check_same(found[0], run)
    layers = [next(iter(run.networks.values())) for run in found]
    names = [own[0].network for own in layers]
    for places in (range(0, count, 2), range(1, count, 2)):
        shapes = {tuple(layer.layer for layer in layers[i]) for i in places}
        if len(shapes) > 1:
            raise InputError(f"the runs of {names[places[0]]} have other layers")
    if names[0] == names[1]:  # the folders tell them apart
        for i, run in enumerate(found):
            layers[i] = [replace(layer, network=f"{layer.network} ({run.folder.name})") for layer in layers[i]]
    return list(layers)


def _check_own(out: Path) -> None:
    """Raise InputError if a folder holds something that is no comparison."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is no folder: choose another --out")
    if out.is_dir() and any(out.iterdir()):
        try:
            json.loads((out / "comparison.json").read_text())
        except (OSError, ValueError):
            raise InputError(f"{out} is not empty and holds no comparison.json: choose another --out") from None
