"""What is computed of one network's analysis, stage by stage, and the memory that it needs."""

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from qdv_gpu.features.budget import FORWARD, Layer, Plan, Task
from qdv_gpu.features.forward import ForwardPass, default_batch, hold, tile_images
from qdv_gpu.features.pca import reduce
from qdv_gpu.machine import measured
from qdv_gpu.networks.layers import trace_calls
from qdv_gpu.progress import part
from qdv_gpu.results.store import Store
from qdv_gpu.scores.quality import score_maps
from qdv_gpu.studies.job import OUTPUT, Job
from qdv_gpu.studies.output import Output, tsne_of
from qdv_gpu.studies.settings import Settings

logger = logging.getLogger(__name__)
TIED = 0.05  # share of the images, with neighbours that are drawn by lot, beyond which that is warned of
SOURCE = 9  # bytes for each byte of an image of its own size: it, and two copies in float32
DECODED = 16  # and of those that wait, where files are decoded batch by batch
# Bytes of neighbours, affinities and their copies for each image and unit of perplexity; of blocks of distances.
AFFINITIES, SEARCH = {"cpu": 200, "cuda": 320}, {"cpu": 0, "cuda": 10**9}


def memory_taken(jobs: Sequence[Job], settings: Settings) -> int:
    """Bytes of weights and images on the networks' device."""
    weights = [tensor for job in jobs for tensor in job.network.module.state_dict().values()]
    largest = max((tensor.nbytes for tensor in weights), default=0)
    copied = largest // 2 if settings.precision == "bf16" else 0  # the one in use
    held = [job.images.pixels for job in jobs if job.images.pixels is not None]
    on_device = {pixels.data_ptr(): pixels.nbytes for pixels in held if pixels.device == jobs[0].network.device}
    return sum(tensor.nbytes for tensor in weights) + copied + sum(on_device.values())


def task_of(job: Job, settings: Settings) -> Task:
    """What is to be computed of one network, and what it needs."""
    network, images, N = job.network, job.images, len(job.images)
    kind, S, size = network.device.type, settings.seeds, settings.image_size or network.image_size
    layers = [Layer(source, tuple(job.calls([source])[source]), job.element) for source, _ in job.missing()]
    widest = max((output.features for output in job.outputs), default=0)
    d = min(settings.pca or widest, widest, N)
    row = AFFINITIES[kind] * settings.perplexity + 350 * S + 40 * S * max(settings.neighbors) + 48 * d
    image_bytes = 0
    if layers:
        calls = trace_calls(network, settings.image_size)
        largest = max(math.prod(call.input or ()) + math.prod(call.output or ()) for call in calls)
        pixels = images[0].numel()
        waiting = DECODED if images.pixels is None and kind == "cpu" else 0
        image_bytes = max(FORWARD * largest * 4, SOURCE * pixels) + waiting * pixels
    return Task(
        network.name,
        layers,
        images=N,
        image_bytes=image_bytes,
        pca=min(settings.pca, N, max(widest, 1)),
        embedding=int(row * N) + SEARCH[kind],
        tile=tile_images(network.device, size),
        batch=default_batch(network.device, size),
        device=kind,
    )


def compute(job: Job, planned: Plan, store: Store, also: Sequence[Settings]) -> None:
    """Compute what is missing of one network, stage by stage, each kept as soon as it is there.

    Of the settings `also`, which differ in perplexity alone, maps are computed in the same batches.
    """
    network, settings, missing = job.network, job.settings, dict(job.missing())
    job.keep_outputs(store)
    row = job.element * len(job.images)
    for line in planned.lines(network.name, {source: row * sum(calls) for source, calls in job.calls(missing).items()}):
        logger.info(line)
    together = sum(map(len, planned.passes))
    for sources, fits in [*((some, True) for some in planned.passes), *(([one], False) for one in planned.recomputed)]:
        if network.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of other sizes, which the budget does not count
        pass_ = ForwardPass(
            network, job.images, {source: job.path(source) for source in sources}, settings.image_size,
            planned.batches[sources[0]], settings.precision, settings.tokens, job.calls(sources),
            channels_last=job.found["channels_last"],
        )  # fmt: skip
        held: dict[str, Tensor] = {}
        timing = {"seconds": 0.0, "peak_bytes": 0.0}
        if fits:
            with measured(network.device) as timing, part(job.forward_cost() * len(sources) / together, network.name):
                held = hold(pass_)
            timing["seconds"] = round(timing["seconds"] / len(held), 3)
        for output in [output for source in sources for output in missing[source]]:
            X = _reduce(job, output, pass_, held, planned, timing, store)
            if X is not None:
                _embed_and_score(job, output, X, store, also)
    for output in job.outputs:
        if not output.complete:
            X = torch.from_numpy(output.components().arrays["X"]).to(network.device)
            _embed_and_score(job, output, X, store, also)


def _reduce(  # noqa: PLR0917 - what comes of a forward pass
    job: Job, output: Output, pass_: ForwardPass, held: dict[str, Tensor], planned: Plan,
    timing: Mapping[str, float], store: Store,
) -> Tensor | None:  # fmt: skip
    """Components X [N, n] of one output, which is taken out of `held` or recomputed; of the network's own output none.

    Of that the predictions are kept.
    """
    name, source, settings = str(output.name), output.name.path, job.settings
    tiles = held.pop(name).split(planned.batches[source]) if name in held else pass_.tiles(name)
    if source == OUTPUT:
        job.keep_predictions(torch.cat([tile.float() for tile in tiles]), store)
        return None
    where, workspace = f"{job.network.name} {name}", planned.workspaces[source]
    with measured(job.network.device) as reduced, part(output.pca_cost(), where):
        X = reduce(tiles, settings.pca, normalise=settings.normalise, name=where, workspace=workspace)
    output.keep_components(X, workspace.columns, {"activations": timing, "pca": reduced}, store)
    return X


def _embed_and_score(job: Job, output: Output, X: Tensor, store: Store, also: Sequence[Settings]) -> None:
    """The maps and scores of one layer that are missing, from its components X [N, n]."""
    where = f"{job.network.name} {output.name}"
    if output.missing_seeds:
        _embed(job, output, X, store, also)
    new = [k for k, record in output.scores.items() if record is None]
    if new:
        with measured(job.network.device) as spent, part(output.scores_cost(), where):
            Z = torch.from_numpy(output.Z).to(job.network.device)
            scored = score_maps(X, Z, job.images.labels, k=new, seeds=list(output.maps))
        for scores in scored:
            output.keep_scores(scores, spent, store)
    best = output.scored(output.settings.neighbors[0]).mean
    said = f"NH {best.nh:.3f} ± {best.standard_error:.3f}"
    if job.images.labels is None:
        said = f"trustworthiness {best.trustworthiness:.3f}"
    logger.info("%s: %s (%d features)", where, said, output.features)
    if new and best.tied > TIED:
        logger.warning(
            "%s: for %.0f %% of the images the nearest neighbours are drawn by lot from equally far ones, as of copies "
            "or in a layer of few values: how the map spreads these says nothing",
            where, 100 * best.tied,
        )  # fmt: skip
    costs = output.record(job.network.name, 0, len(job.images)).stages
    logger.debug("%s: %s", where, ", ".join(f"{stage} {cost['seconds']:.2f} s" for stage, cost in costs.items()))


def _embed(job: Job, output: Output, X: Tensor, store: Store, also: Sequence[Settings]) -> None:
    """The maps of one layer that are missing, and in the same batch those of other perplexities with the same seeds."""
    seeds, device = output.missing_seeds, job.network.device
    others = output.beside(also, store) if output.engine != "cuml" else []
    batch = [output, *(one for one in others if one.missing_seeds == seeds)]
    with measured(device) as spent, part(output.maps_cost(), f"{job.network.name} {output.name}"):
        tsne = tsne_of(output.settings, device)
        perplexities = [one.settings.perplexity for one in batch]
        Z = tsne.fit_transform(X, seeds=seeds, perplexities=perplexities)  # [perplexities, seeds, N, 2]
    spent["seconds"] = round(spent["seconds"] / (len(batch) * len(seeds)), 3)
    for one, maps, divergences in zip(batch, Z, np.asarray(tsne.kl_divergence_), strict=True):
        for seed, z, kl in zip(seeds, maps, divergences, strict=True):
            one.keep_map(seed, z, {"kl": float(kl), "engine": tsne.engine_, "timing": spent}, store)
