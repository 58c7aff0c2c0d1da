"""What t-SNE minimises: KL(P || Q)."""

import numpy as np
import torch

from qdv_gpu import kernels
from qdv_gpu.errors import check_among
from qdv_gpu.tsne.affinities import Affinities, SparseAffinities

SIMILARITIES = ("student-t", "gaussian")
CPU_PAIRS = 1 << 19  # pairs held at once in float64 on a CPU
CUDA_PAIRS = 1 << 24  # and on a GPU, which each operator then takes longer over than over its launch


def kl_divergence(P: Affinities, Z: torch.Tensor, *, similarity: str = "student-t") -> float:
    """KL(P || Q) = sum p_ij log(p_ij / q_ij) over all pairs, in float64 (van der Maaten & Hinton 2008, eq. 2).

    Parameters
    ----------
    P : SparseAffinities or torch.Tensor [N, N]
        Joint affinities, as `joint_affinities` gives them.
    Z : torch.Tensor
        Embedding [N, 2] on P's device.
    similarity : {"student-t", "gaussian"}
        q_ij proportional to 1 / (1 + d_ij^2) or to exp(-d_ij^2), i != j.
    """
    check_among("similarity", similarity, SIMILARITIES)
    gaussian = similarity == "gaussian"
    x, y = Z.to(torch.float64).T.contiguous()
    N, sparse = len(x), P if isinstance(P, SparseAffinities) else None
    own = torch.arange(N, device=Z.device)
    step = max(1, (CUDA_PAIRS if Z.is_cuda else CPU_PAIRS) // max(1, len(sparse.values) // N if sparse else N))
    ends = [*sparse.indptr[::step].tolist(), len(sparse.values)] if sparse else []  # of each chunk's entries
    attraction, total = x.new_zeros(()), x.new_zeros(())
    for number, rows in enumerate(own.split(step)):
        if sparse:
            entries = slice(*ends[number : number + 2])
            counts = sparse.indptr[number * step : number * step + len(rows) + 1].diff()
            i = rows.repeat_interleave(counts, output_size=entries.stop - entries.start)
            j, p = sparse.indices[entries].long(), sparse.values[entries].double()
        else:
            assert isinstance(P, torch.Tensor)
            i, j, p = rows[:, None], own, P[rows].double()
        D = (x[i] - x[j]).square_().add_((y[i] - y[j]).square_())
        attraction += (D if gaussian else D.log1p_()).mul_(p).add_(torch.xlogy(p, p)).sum()
        total += p.sum()
    return float(attraction + total * log_normaliser(x, y, gaussian=gaussian))


def log_normaliser(x: torch.Tensor, y: torch.Tensor, *, gaussian: bool) -> torch.Tensor:
    """log of the sum of the similarity over all pairs i != j, float64 [], for coordinates float64 [N]."""
    home, x, y = x.device, kernels.reachable(x), kernels.reachable(y)
    result = torch.empty_like(x)
    if x.is_cuda:
        grid, N = (-(-len(x) // 32),), np.int32(len(x))
        kernels.run("objective", "similarities", x, y, result, N, grid=grid, block=128, GAUSSIAN=int(gaussian))
        return result.logsumexp(0) if gaussian else result.sum().log_()
    from qdv_gpu.kernels import cpu

    if gaussian:
        cpu.gaussian_normalisers(x.numpy(), y.numpy(), result.numpy())
        return result.logsumexp(0).to(home)
    shares = result[: (len(x) + 1) // 2]
    cpu.student_normalisers(x.numpy(), y.numpy(), shares.numpy())
    return shares.sum().mul_(2).log_().to(home)
