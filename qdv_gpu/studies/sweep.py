"""Many variants of networks and settings: a grid of points, each trained and analysed once, wherever there is room."""

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qdv_gpu.data.datasets import check_data, check_per_class
from qdv_gpu.data.images import Images
from qdv_gpu.errors import InputError, as_path, check_among, check_count, check_flag, check_text, listed
from qdv_gpu.networks.account import describe_variant
from qdv_gpu.networks.layers import read_layers
from qdv_gpu.networks.load import file_digest, load_network, select_layers
from qdv_gpu.report.folder import RunFolder, read_formats
from qdv_gpu.results.ranking import Ranking
from qdv_gpu.results.run import RUN
from qdv_gpu.results.store import Store
from qdv_gpu.sealed import read_sealed, write_sealed
from qdv_gpu.studies.analyze import images_of
from qdv_gpu.studies.executors import (
    Progress,
    StopSweepError,
    Task,
    in_process,
    in_processes,
    on_dask,
    on_slurm,
    read_slurm,
    slots_of,
    tasks_of,
)
from qdv_gpu.studies.grid import MAX_POINTS, Sheet, changed_keys, read_sweep
from qdv_gpu.studies.point import ERROR, LOG, RESULT, STARTED, SWEEP, Kept, Point, State, damaged_files, state_of
from qdv_gpu.studies.report import REPORT, keep_thumbnails, write_report
from qdv_gpu.studies.swept import Rung, collected, ranking_of, surely_worse, write_sweep

logger = logging.getLogger(__name__)
HALVED = ("epochs", "images")
SHARES = (0.25, 0.5)  # of epochs or images, before all of them
Place = Callable[[Path, Sequence[Task], Progress], None]


@dataclass(frozen=True)
class Sweep:
    """The outcome of `sweep`.

    Attributes
    ----------
    out : Path
    rungs : list of Rung
        One, or with `halve` several; the last is of the points as they were asked for.
    figures : list of Path
    """

    out: Path
    rungs: list[Rung]
    figures: list[Path]

    @property
    def ranking(self) -> Ranking | None:
        """Of the last rung; None if it could not be ranked."""
        return self.rungs[-1].ranking

    def log(self, point: Point) -> Path:
        """Where a point's log is."""
        return point.folder(self.out) / LOG

    @property
    def failed(self) -> list[tuple[Point, State]]:
        """Points that are not done, as they were not to be or could not."""
        pairs = [pair for rung in self.rungs for pair in zip(rung.points, rung.states, strict=True)]
        return [(point, state) for point, state in pairs if state.kind != "done"]


def sweep(
    source: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    workers: int | None = None,
    gpus: Sequence[str] | None = None,
    slurm: str | Path | Mapping[str, Any] | None = None,
    dask: str | None = None,
    halve: str | None = None,
    fail_fast: bool = False,
    retry_failed: bool = False,
    extend: bool = False,
    max_points: int = MAX_POINTS,
    formats: Sequence[str] = ("png",),
    store: str | Path | None = None,
) -> Sweep:
    """Train and analyse every point of a grid, wherever there is room, and rank the candidates.

    A candidate is one setting of everything; a point is one of its runs. What is done is not done again: the same call
    goes on after anything, and two sweeps that share a store compute a common point once. The result is the same
    wherever it is computed (on a CPU, as a training's threads are a setting, by default 1).

    Parameters
    ----------
    source : str, Path or dict
        A file in TOML, as in `qdv_gpu.studies.grid`, or a dict of the same.
    out : str or Path
        Gets report.html, sweep.csv and .parquet (a row for each point), ranking.md, figures, and a folder for each
        point and training. The first point is the baseline.
    workers : int, optional
        Compute in so many processes at a time on this machine, by default in this process.
    gpus : sequence of str, optional
        Which GPUs these use by turns; alone, one process for each.
    slurm : str, Path or dict, optional
        Compute as an array job, with submitit's options, of a file in TOML or a dict.
    dask : str, optional
        Compute on the workers of the Dask scheduler at this address.
    halve : {"epochs", "images"}, optional
        Begin with a quarter of the epochs, or of the training images (of the images, without training), go on with
        half of them and then all, each time without the candidates that are surely not the best so far (95 % each
        time), but for the baseline.
    fail_fast : bool
        Stop at the first point that fails.
    retry_failed : bool
        Compute again the points that failed in an earlier call.
    extend : bool
        Add the points to those that `out` has already.
    max_points : int
    formats, store
        As for `analyze`.

    Returns
    -------
    Sweep

    Raises
    ------
    InputError
        For anything in the file or the options that is not as required, before anything is computed; if `out` holds
        another sweep. A point that fails is no error: it is among `failed`.

    Examples
    --------
    >>> analysis = {"data": "digits", "analyze": {"samples": 100}, "perplexity": 8, "seeds": 1, "layers": "relu,layer4"}
    >>> training = {"weights": "none", "epochs": 1, "batch_size": 50, "finetune": {"samples": 50}, "image_size": 32}
    >>> grid = {"network": ["resnet18[width=0.1]", "resnet18[width=0.1, activation=elu]"]}
    >>> found = sweep({"run": {**analysis, **training}, "grid": grid}, tmp_path / "swept")
    >>> [candidate.name for candidate in found.ranking.candidates]
    ['resnet18[width=0.1]', 'resnet18[width=0.1, activation=elu]']
    """
    formats, out = read_formats(formats), as_path("out", out)
    for name, value in (("fail_fast", fail_fast), ("retry_failed", retry_failed), ("extend", extend)):
        check_flag(name, value)
    sheet, points = read_sweep(source, max_points=max_points)
    run = place(workers=workers, gpus=gpus, slurm=slurm, dask=dask)
    check_points(sheet, points)
    looked = check_images(rungs(points, halve))
    folder, kept = RunFolder(out, "sweep"), Store.beside(out, store)
    folder.check()
    kept.check(folder.out)
    about = {"sweep": sheet.plain}
    with folder.locked(about):
        asked = _asked(folder.out, sheet, points, extend=extend)
        planned = rungs(asked, halve)
        if asked != points:
            looked = check_images(planned)
        _keep(folder.out, sheet, asked, kept)
        _forget_others(folder.out, looked)
        del looked  # images take memory that the points need
        reached = _climbed(folder.out.absolute(), planned, kept, run, fail_fast=fail_fast, retry_failed=retry_failed)
        figures = write_sweep(folder, reached, formats)
        done = [state for rung in reached for state in rung.states if state.kind == "done"]
        stages = sorted({stage for state in done for stage in state.about["stages"]})
        folder.claim(REPORT)
        if reached[-1].ranking is not None:
            stages = sorted({*stages, keep_thumbnails(folder, _images(reached[-1].points[0]), kept)})
        folder.finish(about | {"stages": stages, "store": str(kept.path.absolute())})
        kept.refer(folder.out)
        write_report(folder.out)
    return Sweep(out, reached, figures)


def rungs(points: Sequence[Point], halve: str | None) -> list[list[Point]]:
    """The points with a quarter of their epochs or images, with half of them, and as they are; or only as they are.

    Raises
    ------
    InputError
        If there is nothing that can be halved, what is left of two points is the same, or nothing would be dropped.
    """
    if halve is None:
        return [list(points)]
    check_among("way to halve", halve, HALVED)
    if max(Counter(point.candidate for point in points).values()) == 2:
        raise InputError("--halve needs one run of each candidate, or at least three: two give no interval")
    shorter = [[_shortened(point, halve, share) for point in points] for share in SHARES]
    ladder: dict[tuple[str, ...], list[Point]] = {}
    for rung in (*shorter, list(points)):  # of one epoch there is no half
        ladder[tuple(point.digest for point in rung)] = rung
        first = {point.digest: whole for point, whole in zip(reversed(rung), reversed(points), strict=True)}
        for point, whole in zip(rung, points, strict=True):
            if first[point.digest] is not whole:
                pair = f"{first[point.digest].label} and {whole.label}"
                raise InputError(f"--halve {halve}: {pair} are the same with a part of their {halve}: {point.label}")
    return list(ladder.values())


def _shortened(point: Point, halve: str, share: float) -> Point:
    """A point with a share of its epochs or images."""
    table: Any = point.training if point.training is not None else point.settings
    name = halve if halve == "epochs" else "samples"
    if halve == "epochs" and point.training is None:
        raise InputError("--halve epochs needs a training: name epochs, or use --halve images")
    most = getattr(table, name)
    if most == "all":
        study = "finetune" if point.training else "analyze"
        raise InputError(f"--halve images needs a number of images: set {study}.samples")
    least = max(1, round(most * share))
    changed = replace(table, **{name: least})
    part = {"training": changed} if point.training is not None else {"settings": changed}
    return replace(point, label=f"{point.label}, {least} {halve}", **part)


def _climbed(
    out: Path, planned: Sequence[Sequence[Point]], store: Store, run: Place, *, fail_fast: bool, retry_failed: bool
) -> list[Rung]:
    """Compute rung after rung, each without the candidates that are surely not the best of the one before.

    The baseline stays, since gains are over it.
    """
    reached: list[Rung] = []
    dropped: list[str] = []
    alive = list(range(len(planned[0])))
    for number, rung in enumerate(planned):
        points = [rung[i] for i in alive]
        later = [[other[i] for i in alive] for other in planned[number + 1 :]]
        _write_points(out, [*(one.points for one in reached), points, *later])
        whole = _compute(out, points, store, run, fail_fast=fail_fast, retry_failed=retry_failed)
        states = [state_of(out, point, store) for point in points]
        found = collected(out, points, states, store)
        ranking = ranking_of(found, points, dropped=dropped)
        reached.append(Rung(points, states, found, ranking))
        if not whole:
            break
        if rung is not planned[-1]:
            worse = [name for name in surely_worse(ranking) if name != rung[0].label]
            alive = [i for i in alive if rung[i].label not in worse]
            dropped += worse
            said = "; ".join(worse) or "none"
            logger.info("%d of %d points go on; dropped, as surely not the best: %s", len(alive), len(points), said)
    return reached


def check_points(sheet: Sheet, points: Sequence[Point]) -> None:
    """Load each network once, with random weights: say what is wrong with it, its layers too, and what it changes."""
    for data in dict.fromkeys(point.data for point in points):
        try:
            check_data(data)
        except InputError as error:
            raise sheet.error_at(str(error), "data", data) from None
    of_network: dict[str, list[Point]] = {}
    for point in points:
        of_network.setdefault(point.network, []).append(point)
    for name, own in of_network.items():
        size = (own[0].settings if own[0].training is None else own[0].training).image_size
        try:
            network = load_network(name, weights="none", image_size=size, device="cpu")
            for layers in dict.fromkeys(point.settings.layers for point in own):
                select_layers([network], read_layers(layers))
        except InputError as error:
            raise sheet.error_at(str(error), "network", name) from None
        if network.base is not None:
            for line in describe_variant(network, size).lines():
                logger.info("%s", line)


def check_images(planned: Sequence[Sequence[Point]]) -> list[tuple[list[Point], Images]]:
    """Load the images that each point of each rung is analysed on: what they are too few for is said, or if unlabelled.

    Returns
    -------
    The points that are analysed on the same images, and these.

    Raises
    ------
    InputError
    """
    found = []
    for points in _of_same_images(planned):
        point = points[0]
        try:
            images = _images(point)
            images.require_labels("a sweep")
            for point in points:
                point.settings.check_images(images)
                samples = point.training and point.training.samples
                if isinstance(samples, int):
                    check_per_class("finetune.samples", samples, len(images.classes))
        except InputError as error:
            halved = "" if point in planned[-1] else "--halve: "
            raise InputError(f"{halved}{point.label}: {error}") from None
        found.append((points, images))
    return found


def _of_same_images(planned: Sequence[Sequence[Point]]) -> list[list[Point]]:
    """The points of all rungs, those together that are analysed on the same images."""
    same: dict[tuple[Any, ...], list[Point]] = {}
    for point in (one for rung in planned for one in rung):
        own = point.settings
        key = point.data, point.skip_bad, own.split, own.samples, own.crop, own.image_size
        same.setdefault(key, []).append(point)
    return list(same.values())


def _forget_others(out: Path, looked: Sequence[tuple[Sequence[Point], Images]]) -> None:
    """Have points computed again whose images or checkpoint, of the same names, are others by now."""
    digest_of = functools.cache(file_digest)
    for points, images in looked:
        for point in (one for one in points if (one.folder(out) / RESULT).is_file()):
            with suppress(OSError, InputError):  # a damaged file is found later
                said = read_sealed(point.folder(out) / "analysis" / RUN, images=dict)["images"]
                checkpoint, now = read_sealed(point.folder(out) / RESULT).get("checkpoint"), None
                if (said.get("contents"), said.get("labels")) != (images.digest, images.labels_digest):
                    now = "images"
                elif digest_of(point.network, point.weights) not in (checkpoint, None):
                    now = "weights"
                if now:
                    logger.warning("%s, run %d was of other %s, and is computed again", point.label, point.run, now)
                    (point.folder(out) / RESULT).unlink()


def _images(point: Point) -> Images:
    """That a point is analysed on."""
    return images_of(point.data, point.settings, skip_bad=point.skip_bad)


def place(*, workers: int | None, gpus: Sequence[str] | None, slurm: Any, dask: str | None) -> Place:
    """Where tasks are computed; InputError for more than one place, or one that is not there."""
    if workers is not None:
        check_count("workers", workers, most=1024)
    if gpus is not None:
        gpus = listed("gpus", gpus, str, "numbers as texts")
    if dask is not None:
        check_text("dask", dask)
    named = {"--workers or --gpus": workers or gpus, "--slurm": slurm, "--dask": dask}
    if len(given := [name for name, value in named.items() if value is not None]) > 1:
        raise InputError(f"one place to compute at is required, got {' and '.join(given)}")
    if workers or gpus:
        slots = slots_of(workers, gpus)
        return lambda out, tasks, progress: in_processes(out, tasks, progress, slots)
    if slurm is not None:
        options = read_slurm(slurm)
        return lambda out, tasks, progress: on_slurm(out, tasks, progress, options)
    if dask is not None:
        return lambda out, tasks, progress: on_dask(out, tasks, progress, dask)
    return in_process


def _asked(out: Path, sheet: Sheet, points: list[Point], *, extend: bool) -> list[Point]:
    """The points of the sweep: with those of an earlier call that it adds to."""
    try:
        before = Kept.read(out)
    except FileNotFoundError:
        return points
    known = {point.digest: point for point in before.asked}
    if {point.digest for point in points} != set(known) and not extend:
        keys = ", ".join(changed_keys(before.table, sheet.plain)) or "the defaults of this version"
        raise InputError(f"{out} holds another sweep: {keys} changed; pass --extend to add points, or another --out")
    if not extend:
        return [known[point.digest] for point in points]
    seeds = {(point.candidate, point.training and point.training.seed) for point in before.asked}  # of another run too
    new = [point for point in points if (point.candidate, point.training and point.training.seed) not in seeds]
    return [*before.asked, *_told_apart(new, before.asked, before.table, sheet.plain)]


def _keep(out: Path, sheet: Sheet, points: list[Point], store: Store) -> None:
    """Write sweep.json."""
    said = {"table": sheet.plain, "file": sheet.name, "cwd": os.getcwd(), "store": str(store.path.absolute())}
    write_sealed(out / SWEEP, {**said, "asked": [point.said() for point in points], "points": []})


def _told_apart(new: list[Point], old: list[Point], before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Point]:
    """New points whose labels are those of other candidates, with what has changed in [run] added to their labels."""
    taken = {point.label: point.candidate for point in old}
    run = {key: value for key, value in after.get("run", {}).items() if before.get("run", {}).get(key) != value}
    more = "".join(f", {key}={value}" for key, value in run.items())
    same = [taken.get(point.label, point.candidate) == point.candidate for point in new]
    return [p if alike else replace(p, label=p.label + more) for p, alike in zip(new, same, strict=True)]


def _write_points(out: Path, rungs: Sequence[Sequence[Point]]) -> None:
    """Have sweep.json list the points of all rungs that are left, for the processes that compute them, and `status`."""
    said = read_sealed(out / SWEEP)
    write_sealed(out / SWEEP, {**said, "points": [point.said() for rung in rungs for point in rung]})


def _compute(
    out: Path, points: Sequence[Point], store: Store, run: Place, *, fail_fast: bool, retry_failed: bool
) -> bool:
    """Compute what is missing; whether it was not stopped by a failure."""
    missing = []
    for point in points:
        state = state_of(out, point, store)
        if state.kind == "done" or (state.kind == "failed" and not retry_failed and "signal" not in state.about):
            continue
        if state.kind != "running":
            for file in damaged_files(point.folder(out)):
                logger.warning("%s is damaged, and is computed again", file)
            for name in (ERROR, STARTED):
                (point.folder(out) / name).unlink(missing_ok=True)
        missing.append(point)
    logger.info("%d points, %d of them are to be computed", len(points), len(missing))
    try:
        run(out, tasks_of(missing), Progress(out, store, len(missing), fail_fast))
    except StopSweepError:
        return False
    return True
