"""What a sweep would do, and what of a point is in the store and why not; nothing is written."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from qdv_gpu.errors import unknown
from qdv_gpu.features.forward import network_input
from qdv_gpu.files import readable_time
from qdv_gpu.machine import on_threads, resolve_device
from qdv_gpu.networks.network import Network
from qdv_gpu.results.store import Key, Store
from qdv_gpu.studies.analyze import find_jobs
from qdv_gpu.studies.executors import read_slurm, slots_of, slurm_script, tasks_of
from qdv_gpu.studies.finetune import WEIGHTS, Prepared
from qdv_gpu.studies.grid import read_sweep
from qdv_gpu.studies.job import Job
from qdv_gpu.studies.point import Kept, Point, state_of
from qdv_gpu.studies.sweep import check_images, check_points, place, rungs


@dataclass(frozen=True)
class Outlook:
    """What is to be done for a point.

    Attributes
    ----------
    point : Point
    trained : bool or None
        Whether its weights are in the store; None if it is not trained.
    layers, maps : tuple of int
        How many are in the store, and how many there are.
    seconds : float
        That what is missing may take on this machine, alone.
    """

    point: Point
    trained: bool | None
    layers: tuple[int, int]
    maps: tuple[int, int]
    seconds: float


def outlook(points: Sequence[Point], store: Store) -> list[Outlook]:
    """Look up each point's stages in the store, and estimate the time of what is missing.

    A step of training is timed once for each network, size and batch; the analysis is estimated as its progress is.
    """
    steps: dict[tuple[Any, ...], float] = {}
    found = []
    for point in points:
        prepared, job = _stages(point, store)
        seconds, trained = 0.0, None
        if prepared is not None and point.training is not None:
            trained = store.holds([prepared.key.digest])
            batch = min(point.training.batch_size, len(prepared.train))
            same = point.network, prepared.network.image_size, batch, point.training.threads
            if not trained:
                if same not in steps:
                    steps[same] = _step_seconds(prepared.network, batch, point.training.threads)
                seconds += steps[same] * point.training.epochs * -(-len(prepared.train) // batch)
        known = trained is not False
        there = sum(known and (o.complete or o.found is not None) for o in job.outputs)
        maps = [record for output in job.outputs for record in output.maps.values()]
        mapped = sum(known and record is not None for record in maps)
        found.append(Outlook(point, trained, (there, len(job.outputs)), (mapped, len(maps)), seconds + job.cost()))
    return found


def _stages(point: Point, store: Store) -> tuple[Prepared | None, Job]:
    """A point's training, and its analysis: of its trained network if there is one, else of what it starts from."""
    options: dict[str, Any] = {"weights": point.weights, "skip_bad": point.skip_bad}
    device, prepared, source = resolve_device(point.device), None, point.network
    if point.training is not None:
        prepared = Prepared.of(point.network, point.data, point.training, device=device, **options)
        weights = store.path / prepared.key.folder / WEIGHTS
        source = point.trained(weights) if weights.is_file() else point.network
    jobs, _ = find_jobs({point.label: source}, point.data, point.settings, device=device, store=store, **options)
    return prepared, jobs[0]


def _step_seconds(network: Network, batch: int, threads: int | None) -> float:
    """Of one step of training on so many random images, with the copy of a network that a training may change."""
    x = torch.rand(batch, network.channels, network.image_size, network.image_size, device=network.device)
    y, times = torch.zeros(batch, dtype=torch.int64, device=network.device), []
    network.module.train()
    try:
        with on_threads(threads):
            for _ in range(3):
                begun = time.perf_counter()
                functional.cross_entropy(network(network_input(network, x)), y).backward()
                if x.is_cuda:
                    torch.cuda.synchronize(x.device)
                times.append(time.perf_counter() - begun)
    finally:
        network.module.eval()
        network.module.zero_grad(set_to_none=True)
    return min(times)


def why(out: str | Path, name: str) -> list[str]:
    """Which stages of a point are not in the store, and what in their keys no stage there has.

    Parameters
    ----------
    name : str
        Of the point's folder, or enough of its beginning or end to tell it from the others.

    Raises
    ------
    InputError
        If there is no such point, or several.
    """
    out = Path(out)
    kept = Kept.read(out)
    points, store = kept.points, Store(kept.store)
    alike = [point for point in points if point.name.startswith(name) or point.name.endswith(name)]
    chosen = [point for point in alike if point.name == name] or alike
    if len(chosen) != 1:
        raise unknown("point", name, [point.name for point in points])
    [point] = chosen
    prepared, job = _stages(point, store)
    lines = [f"{point.name}: {state_of(out, point, store).kind}"]
    if prepared is not None:
        lines.append(_said(prepared.key, store))
        if not store.holds([prepared.key.digest]):
            return [*lines, "components, maps and scores: their keys hold the weights, which are to be trained first"]
    for output in job.outputs:
        keys = [output.components_key, *map(output.map_key, output.maps), *map(output.scores_key, output.scores)]
        missing = [key for key in keys if not store.holds([key.digest])]
        there = f"{output.name}: {len(keys) - len(missing)} of {len(keys)} stages are in the store"
        lines.append(there if not missing else f"{there}; {_said(missing[0], store)}")
    return lines


def _said(key: Key, store: Store) -> str:
    """Of one key, whether its stage is there, or how it differs from the nearest."""
    if store.holds([key.digest]):
        return f"{key.folder}: in the store"
    nearest = store.nearest(key)
    if nearest is None:
        return f"{key.folder}: not in the store, which holds no {key.stage}"
    if not nearest:
        return f"{key.folder}: damaged"
    differing = ", ".join(f"{name} ({_short(old)} there, {_short(new)} here)" for name, (old, new) in nearest.items())
    return f"{key.folder}: not in the store; the nearest there differs in {differing}"


def _short(value: Any) -> str:
    """A value of a key, digests cut."""
    values = value if isinstance(value, list) else [value]
    cut = [one[:8] if isinstance(one, str) and len(one) == 64 else str(one) for one in values]
    return ", ".join(cut)


def foreseen(
    source: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    max_points: int,
    store: str | Path | None = None,
    workers: int | None = None,
    gpus: Sequence[str] | None = None,
    slurm: str | Path | Mapping[str, Any] | None = None,
    dask: str | None = None,
    halve: str | None = None,
) -> tuple[list[list[str]], list[str]]:
    """What `sweep` would do, in words: a table of its points, and lines below it; arguments and errors as for `sweep`.

    Nothing is written.
    """
    sheet, points = read_sweep(source, max_points=max_points)
    place(workers=workers, gpus=gpus, slurm=slurm, dask=dask)
    check_points(sheet, points)
    planned = rungs(points, halve)
    check_images(planned)
    found = outlook(points, Store.beside(Path(out), store))
    rows = [["point", "run", "training", "layers in the store", "maps", "seconds"]]
    for one in found:
        training = one.point.training
        trained = "none" if training is None else "in the store" if one.trained else f"{training.epochs} epochs"
        shown = [f"{there} of {of}" for there, of in (one.layers, one.maps)]
        rows.append([one.point.label, str(one.point.run), trained, *shown, f"{one.seconds:.0f}"])
    total, at_once = sum(one.seconds for one in found), len(slots_of(workers, gpus)) if workers or gpus else 1
    lines = [
        f"{len(points)} points in {len(tasks_of(points))} tasks; {readable_time(total / at_once)} on this machine"
        + (f", {at_once} at a time" if at_once > 1 else "")
    ]
    if len(planned) > 1:
        lines.append(f"{len(planned) - 1} shorter rungs come first, in time of their own; fewer points may be left")
    if slurm is not None:
        lines.append(slurm_script(Path(out).absolute(), len(tasks_of(points)), read_slurm(slurm)))
    return rows, lines
