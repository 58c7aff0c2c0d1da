"""The descent of a batch of embeddings, phase after phase, by numba or by CUDA kernels."""

from functools import partial

import torch

from qdv_gpu.progress import advance
from qdv_gpu.tsne.affinities import Affinities
from qdv_gpu.tsne.engines import fft, fft_cuda
from qdv_gpu.tsne.engines.cpu import descend_cpu
from qdv_gpu.tsne.engines.cuda import descend_cuda
from qdv_gpu.tsne.problem import Phase, Problem, Repulsion, stacked

COLLAPSED = 1e-6  # standard deviation of an embedding that is a point; random starts have 1e-4


def descend(
    P: list[Affinities],
    start: torch.Tensor,
    *,
    phases: list[Phase],
    learning_rate: float,
    gaussian: bool,
    repulsion: Repulsion | None = None,
) -> torch.Tensor:
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

    Returns
    -------
    float32 [E, N, 2] on the device of `start`.
    """
    rows = stacked(P, copies=len(start) // len(P))
    repulsion = repulsion or Repulsion()
    costs = fft_cuda if start.is_cuda else fft
    if repulsion.engine == "exact" or (repulsion.engine == "auto" and costs.always_exact(start.shape[1])):
        repulsion.used["exact"] = None
        run = descend_cuda if start.is_cuda else descend_cpu
    else:
        run = partial(fft_cuda.descend_fft_cuda if start.is_cuda else fft.descend_fft, repulsion=repulsion)
    Z, total, before = start, sum(phase.iterations for phase in phases), 0

    def done(count: int) -> None:
        nonlocal before
        before += count
        advance("t-SNE", before, total)

    for phase in phases:
        Z = run(Problem(rows, phase, learning_rate, gaussian), Z, done)
        collapsed = Z.std(dim=1).amax(dim=1) < COLLAPSED
        Z = torch.where(collapsed[:, None, None] & (phase.exaggeration > 1), start, Z)
    return Z
