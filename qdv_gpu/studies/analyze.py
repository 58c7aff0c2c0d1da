"""The pipeline: networks and images in; stages in the store; a run folder with maps, scores, tables and figures out."""

import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qdv_gpu
from qdv_gpu.data.convert import as_images
from qdv_gpu.data.datasets import check_data, drawn, load_images, stratified
from qdv_gpu.data.images import Images
from qdv_gpu.errors import InputError, as_path, check_flag, listed
from qdv_gpu.features.budget import plan
from qdv_gpu.features.forward import check_precision, shown
from qdv_gpu.machine import command_line, free_memory, resolve_device, return_freed_memory, threads
from qdv_gpu.networks.layers import read_layers
from qdv_gpu.networks.load import Sources, load_networks, select_layers
from qdv_gpu.progress import whole
from qdv_gpu.report import figures, tables
from qdv_gpu.report.contrast import write_comparison
from qdv_gpu.report.folder import RunFolder, read_formats
from qdv_gpu.results.comparison import compared
from qdv_gpu.results.records import Analysis, Predictions
from qdv_gpu.results.run import embedding_file
from qdv_gpu.results.store import Store
from qdv_gpu.scores.statistics import class_neighbors
from qdv_gpu.studies.compute import compute, memory_taken, task_of
from qdv_gpu.studies.job import Job
from qdv_gpu.studies.output import tsne_of
from qdv_gpu.studies.report import REPORT, keep_thumbnails, write_report
from qdv_gpu.studies.settings import Settings, changed, preset
from qdv_gpu.tsne.estimator import EXAGGERATED, warn_if_short

logger = logging.getLogger(__name__)
COPIES = 0.01  # share of the images beyond which copies of others are warned of


def analyze(
    networks: Sources,
    data: Any,
    out: str | Path,
    *,
    settings: Settings | str = "default",
    weights: str | Path = "imagenet",
    device: str | torch.device = "auto",
    formats: Sequence[str] = ("png",),
    store: str | Path | None = None,
    skip_bad: bool = False,
    also: Sequence[Settings] = (),
    report: bool = True,
    **changes: Any,
) -> Analysis:
    """Score every layer of networks: activations, normalisation, PCA, t-SNE, neighborhood hit (Algorithm 1).

    Parameters
    ----------
    networks : str, nn.Module or Network, or sequence or dict of them
        As for `load_network`: "alexnet", "vgg19=runs/vgg19", "package.module:factory", ...; modules are not changed.
        The keys of a dict are their labels.
    data : str, Path or anything that `as_images` takes
        What `load_images` takes, whose test images are analysed, or the images themselves. Without labels there are
        maps and their trustworthiness, and no neighborhood hit.
    out : str or Path
        The run folder, a view of the results: run.json, layers.csv, table3.md and .csv, predictions.csv and .parquet,
        timings.json, embeddings/<network>/<layer>.npz (Z float32 [S, N, 2], labels, indices, class_neighbors
        float32 [C, C]), figures, thumbnails and report.html.
    settings : Settings or "default" or "paper"
    weights : str or Path
        For the networks that name no checkpoint, as for `load_network`.
    device : str or torch.device
        "auto" is a GPU if there is one.
    formats : sequence of str
        Of the figures: "png", "pdf", "svg".
    store : str or Path, optional
        Where stages are kept; see `Store.beside`. Whatever is there already is not computed again: a killed run goes on
        where it was, and another k, seed, layer or network costs only what is new.
    skip_bad : bool
        As for `load_images`.
    also : sequence of Settings
        Of analyses that will follow and differ in perplexity alone: their maps are computed in the same batches, and
        kept in the store.
    report : bool
        Whether to write report.html, and the thumbnails that it shows.
    **changes
        Settings by name, e.g. `perplexity=30`.

    Returns
    -------
    Analysis

    Raises
    ------
    InputError
        For anything in the input that is not as required, before anything is written; for NaN or infinite
        activations; for an `out` folder that holds something else, or that another run is writing to; for a full disk.

    Examples
    --------
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> result = analyze(network, "digits", tmp_path / "run", layers="2", samples=100, perplexity=8, seeds=1)
    >>> result.layer("Sequential", "2").of(k=5).chance
    0.09090909090909091
    """
    with analysing(
        RunFolder(as_path("out", out)), networks, data, settings=settings, weights=weights, device=device,
        formats=formats, store=store, skip_bad=skip_bad, also=also, report=report, **changes,
    ) as result:  # fmt: skip
        return result


@contextmanager
def analysing(
    folder: RunFolder, networks: Sources, data: Any, *, settings: Settings | str, weights: str | Path,
    device: str | torch.device, formats: Sequence[str], store: str | Path | None, skip_bad: bool,
    also: Sequence[Settings] = (), report: bool = True, **changes: Any,
) -> Iterator[Analysis]:  # fmt: skip
    """As `analyze`; other processes are kept out of the folder for as long as the block lasts."""
    if not isinstance(settings, str | Settings):
        raise InputError(f"settings must be Settings or a preset's name, got {type(settings).__name__}")
    chosen = changed(preset(settings) if isinstance(settings, str) else settings, changes)
    formats, also = read_formats(formats), listed("also", also, Settings, "settings")
    check_flag("skip_bad", skip_bad)
    check_flag("report", report)
    if isinstance(data, str | Path):
        check_data(data)
    target = resolve_device(device)
    tsne_of(chosen, target).check_engine(target.type)
    check_precision(chosen.precision, target)
    kept = Store.beside(folder.out, store)
    jobs, images = find_jobs(
        networks, data, chosen, weights=weights, device=target, skip_bad=skip_bad, store=kept, run=folder
    )
    taken = memory_taken(jobs, chosen)
    budget = chosen.memory or taken + free_memory(target) * 4 // 5
    most = replace(chosen, perplexity=chosen.perplexity + sum(one.perplexity for one in also))
    plans = plan([task_of(job, most) for job in jobs], budget=budget, reserved=taken)  # raises, and nothing is written
    warn_if_short(chosen.iterations, EXAGGERATED)
    about = _about(jobs, images, chosen, target)
    with folder.locked(about), kept.used(), whole(sum(job.cost() for job in jobs)):
        try:
            for job, planned in zip(jobs, plans, strict=True):
                with kept.computing(job.looked) as waited:
                    if waited:  # so most or all of it is there by now
                        job.look(kept)
                        [planned] = plan([task_of(job, most)], budget=budget, reserved=taken)
                    for line in job.reused():
                        logger.info(line)
                    compute(job, planned, kept, also)
        except KeyboardInterrupt:
            outputs = [output for job in jobs for output in job.outputs]
            done = sum(output.complete for output in outputs)
            logger.warning("%d of %d layers are finished and kept in %s", done, len(outputs), kept.path)
            raise
        result = _view(folder, jobs, images, chosen, formats)
        found = {job.network.name: [output.address() for output in job.outputs] for job in jobs}
        stages = {key.digest for job in jobs for key in job.stages()}
        if report:
            stages.add(keep_thumbnails(folder, images, kept))
            folder.claim(REPORT)
        folder.finish(about | {"outputs": found, "stages": sorted(stages), "store": str(kept.path.absolute())})
        kept.refer(folder.out)
        if report:
            write_report(folder.out)
        yield result


def find_jobs(
    networks: Sources, data: Any, settings: Settings, *, weights: str | Path, device: torch.device, skip_bad: bool,
    store: Store, run: RunFolder | None = None,
) -> tuple[list[Job], Images]:  # fmt: skip
    """Load networks and images, and look up what the store has of their analysis; nothing is written.

    Raises
    ------
    InputError
        As `analyze`; if the folder `run`, where there is one, holds something else.
    """
    loaded = load_networks(
        networks, weights=weights, image_size=settings.image_size, mean=settings.mean, std=settings.std, device=device
    )
    asked = read_layers(settings.layers)
    selected = select_layers(loaded, asked)
    images = images_of(data, settings, skip_bad=skip_bad)
    settings.check_images(images)
    _check_floats(images, settings)
    if run is not None:
        run.check()
        store.check(run.out)
    if settings.memory is not None and device.type == "cpu":
        return_freed_memory()
    limit = settings.memory and settings.memory // 2
    views = {network.name: shown(images, network, settings.image_size, crop=settings.crop) for network in loaded}
    views = {one: view.hashed().to(device, limit=limit) for one, view in views.items()}
    _check_drawn(next(iter(views.values())))
    jobs = [
        Job.find(network, views[network.name], layers, asked=asked, settings=settings, store=store)
        for network, layers in zip(loaded, selected, strict=True)
    ]
    return jobs, images


def _check_floats(images: Images, settings: Settings) -> None:
    """Raise InputError if images that networks get as they are shall be normalised; warn if they seem to want it."""
    if not images[0].is_floating_point():
        return
    if settings.mean is not None or settings.std is not None:
        raise InputError(
            f"mean and std are for images of uint8, and those of {images.name} are of floating point, which networks "
            "get as they are: normalise them as in training and give no mean and std, or hand over uint8"
        )
    some = torch.stack([images[i] for i in range(min(8, len(images)))])
    if some.min() >= 0:  # normalised ones are on both sides
        logger.warning(
            "the images of %s are of floating point in %s: networks get them as they are, without a mean and std, "
            "which is right only if they were trained so",
            images.name, "0..1, as ToTensor leaves them" if some.max() <= 1 else f"0..{some.max():g}",
        )  # fmt: skip


def _check_drawn(images: Images) -> None:
    """Warn of images for which the standard error of NH is too small, as it takes each for one drawn by itself."""
    if images.labels is None:
        return
    copies = len(images) - len({images.hashes[i] for i in images.indices.tolist()})
    if copies > COPIES * len(images):
        logger.warning(
            "%d of the %d images of %s are copies of others: as neighbours they raise NH, and its error is too small",
            copies, len(images), images.name,
        )  # fmt: skip
    sizes = torch.bincount(images.labels)
    pairs = int((sizes == 2).sum())
    if 4 * pairs >= len(images):
        logger.warning("%d of the classes of %s have two images: the error of NH is too small", pairs, images.name)


def images_of(data: Any, settings: Settings, *, skip_bad: bool) -> Images:
    """The images that an analysis is of."""
    side = None if settings.crop else settings.image_size
    if isinstance(data, str | Path):
        return load_images(data, settings.split, samples=settings.samples, image_size=side, skip_bad=skip_bad)
    images = as_images(data, image_size=side)
    if images.labels is None:
        return images.take(drawn(len(images), settings.samples))
    return images.take(stratified(images.labels, images.classes, settings.samples))


def _about(jobs: Sequence[Job], images: Images, settings: Settings, device: torch.device) -> dict[str, Any]:
    """What run.json says, but for the stages."""
    return {
        "settings": asdict(settings),
        "data": images.name,
        "images": {"contents": images.digest, "labels": images.labels_digest, "samples": len(images)},
        "classes": list(images.classes),
        "skipped": images.skipped,
        "networks": {job.network.name: job.about() for job in jobs},
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "threads": threads(),
        "command": command_line(),
        "versions": {
            "qdv_gpu": qdv_gpu.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def _view(
    folder: RunFolder, jobs: Sequence[Job], images: Images, settings: Settings, formats: Sequence[str]
) -> Analysis:
    """Write tables and figures from what is in the store."""
    layers = [layer for job in jobs for layer in job.records(len(images))]
    predictions = {job.network.name: said for job in jobs if (said := job.predictions()) is not None}
    labels = None if images.labels is None else images.labels.numpy()
    folder.claim(*(embedding_file(layer.network, layer.layer) for layer in layers))
    for layer in layers:
        own = {"Z": layer.Z, "indices": images.indices.numpy()}
        if labels is not None:
            near = layer.scores[0].neighbors
            own |= {"labels": labels, "class_neighbors": class_neighbors(near, labels, len(images.classes))}
        folder.arrays(embedding_file(layer.network, layer.layer), **own)
    rows = [row for layer in layers for row in layer.rows()]
    folder.text("layers.csv", tables.csv_text(rows, tables.COLUMNS))
    folder.text("table3.csv", tables.scores_csv(layers))
    folder.text("table3.md", tables.nh_markdown(layers, settings.neighbors, iterations=settings.iterations))
    columns = tables.predictions_table(images.names, labels, images.classes, predictions, layers)
    folder.text("predictions.csv", tables.columns_csv(columns))
    folder.parquet("predictions.parquet", columns)
    folder.json("timings.json", {f"{layer.network}/{layer.layer}": layer.stages for layer in layers})
    pictures = folder.figure("figures/maps", figures.maps_figure(layers, labels, images.classes), formats)
    comparison = None
    if labels is not None:
        curves = figures.nh_figure(layers, labels, settings.neighbors[0])
        pictures += folder.figure("figures/nh", curves, formats)
        _say_accuracy(jobs, predictions, labels, len(images.classes))
        if len(jobs) == 2:
            first, second = ([layer for layer in layers if layer.network == job.network.name] for job in jobs)
            comparison = compared([first], [second], labels, images.classes, k=settings.neighbors[0])
            pictures += write_comparison(folder, comparison, formats)
    return Analysis(folder.out, layers, predictions, pictures, comparison)


def _say_accuracy(
    jobs: Sequence[Job], predictions: Mapping[str, Predictions], labels: np.ndarray, classes: int
) -> None:
    """Say what shows that a network gets its images as it was trained to, with classes in the order that it knows."""
    for name in (job.network.name for job in jobs):
        if name in predictions:
            share = 100 * predictions[name].accuracy(labels)
            logger.info("%s: accuracy %.1f%% on these %s images", name, share, f"{len(labels):,}")
        else:
            logger.info("%s: no accuracy, since it has not one number for each class of the images (%d)", name, classes)
