"""The descent of a batch of embeddings, phase after phase, by numba or by CUDA kernels."""

from collections.abc import Callable
from functools import partial

import torch

from qdv_gpu.progress import advance
from qdv_gpu.tsne.affinities import Affinities
from qdv_gpu.tsne.engines import cpu, fft_cuda
from qdv_gpu.tsne.engines.cuda import descend_cuda
from qdv_gpu.tsne.objective import kl_divergence
from qdv_gpu.tsne.problem import Motion, Phase, Problem, Repulsion, stacked

COLLAPSED = 1e-6  # standard deviation of an embedding that is a point; random starts have 1e-4
WATCHED = 50  # iterations between two looks at KL, where it decides when to stop
EXACT = Repulsion("exact")

Engine = Callable[[Problem, Motion, Callable[[int], None]], tuple[Motion, list[str]]]
Run = Callable[[Problem, Motion], Motion]


def always_exact(N: int, device: str) -> bool:
    """Whether on "cpu" or "cuda" the exact sum takes less than even the smallest grid."""
    seconds = (fft_cuda if device == "cuda" else cpu).seconds
    return seconds(N, None) <= seconds(N, 32 * 32)


def descend(
    P: list[Affinities],
    start: torch.Tensor,
    *,
    phases: list[Phase],
    learning_rate: float,
    gaussian: bool,
    repulsion: Repulsion = EXACT,
    kl_tolerance: float | None = None,
) -> tuple[torch.Tensor, list[int], list[str]]:
    """Minimise KL(P || Q) with momentum and gains (van der Maaten & Hinton 2008, section 3.4).

    Each phase starts at rest, as in scikit-learn. Where neighbourhoods are weak (noise, or few points), early
    exaggeration contracts the map to a point, from which float32 does not recover; such an embedding goes on from
    its start instead.

    Parameters
    ----------
    P : list of G joint affinities of N points, all sparse or all dense
    start : torch.Tensor
        float32 [E, N, 2], E a multiple of G: the first E / G embeddings have the first P, and so on.
    phases : list of Phase
    learning_rate : float
    gaussian : bool
        Similarity exp(-d^2) instead of 1 / (1 + d^2).
    repulsion : Repulsion, optional
        By default exact.
    kl_tolerance : float, optional
        An embedding stops in the last phase once its KL falls by no more than this share of itself in 50 iterations.

    Returns
    -------
    float32 [E, N, 2] on the device of `start`, the iterations of each embedding, and the engines that summed the
    repulsion, in the order of their first use.
    """
    rows = stacked(P, copies=len(start) // len(P))
    if repulsion.engine == "auto" and always_exact(start.shape[1], start.device.type):
        repulsion = EXACT
    if not start.is_cuda:
        engine: Engine = partial(cpu.descend_cpu, repulsion=repulsion)
    elif repulsion.engine == "exact":
        engine = descend_cuda
    else:
        engine = partial(fft_cuda.descend_fft_cuda, repulsion=repulsion)
    Z, total, before, used = start, sum(phase.iterations for phase in phases), 0, dict[str, None]()

    def done(count: int) -> None:
        nonlocal before
        before += count
        advance("t-SNE", before, total)

    def run(problem: Problem, motion: Motion) -> Motion:
        motion, engines = engine(problem, motion, done)
        used.update(dict.fromkeys(engines))
        return motion

    *earlier, last = phases
    for phase in earlier if kl_tolerance is not None else phases:
        Z = run(Problem(rows, phase, learning_rate, gaussian), Motion.at_rest(Z)).Z
        collapsed = Z.std(dim=1).amax(dim=1) < COLLAPSED
        Z = torch.where(collapsed[:, None, None] & (phase.exaggeration > 1), start, Z)
    if kl_tolerance is None:
        return Z, [total] * len(Z), list(used)

    def kl(e: int, z: torch.Tensor) -> float:
        return kl_divergence(P[e * len(P) // len(start)], z, similarity="gaussian" if gaussian else "student-t")

    Z, iterations = _until_flat(run, Problem(rows, last, learning_rate, gaussian), Z, kl, tolerance=kl_tolerance)
    if before < total:
        done(total - before)
    return Z, [total - last.iterations + count for count in iterations], list(used)


def _until_flat(
    run: Run, problem: Problem, Z: torch.Tensor, kl: Callable[[int, torch.Tensor], float], *, tolerance: float
) -> tuple[torch.Tensor, list[int]]:
    """The phase of a problem, in which embedding e of Z stops where kl(e, its map) does; and the iterations of each.

    Each goes on alone from where it was, with its velocity and its gains: what the others do changes nothing.
    """
    motion, going = Motion.at_rest(Z), list(range(len(Z)))
    result, iterations, before = Z.clone(), [0] * len(Z), [float("inf")] * len(Z)
    for first in range(0, problem.phase.iterations, WATCHED):
        turns = min(WATCHED, problem.phase.iterations - first)
        rows = problem.rows._replace(first=problem.rows.first[going])
        motion = run(problem._replace(rows=rows, phase=problem.phase._replace(iterations=turns)), motion)
        result[going] = motion.Z
        for e in going:
            iterations[e] = first + turns
        if first + turns == problem.phase.iterations:
            break
        kept = []
        for place, e in enumerate(going):
            now = kl(e, motion.Z[place])
            if not before[e] - now <= tolerance * now:
                kept.append(place)
            before[e] = now
        if not kept:
            break
        going, motion = [going[place] for place in kept], Motion(*(part[kept] for part in motion))
    return result, iterations
