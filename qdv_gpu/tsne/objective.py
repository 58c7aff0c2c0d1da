"""What t-SNE minimises: KL(P || Q)."""

import torch

from qdv_gpu.errors import unknown
from qdv_gpu.tsne.affinities import Affinities, SparseAffinities

SIMILARITIES = ("student-t", "gaussian")
KL_BLOCK = 1 << 19  # pairs held at once in float64


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
    if similarity not in SIMILARITIES:
        raise unknown("similarity", similarity, SIMILARITIES)
    gaussian = similarity == "gaussian"
    x, y = Z.to(torch.float64).T.contiguous()
    N = len(x)
    own = torch.arange(N, device=Z.device)
    step = max(1, KL_BLOCK // max(1, len(P.values) // N if isinstance(P, SparseAffinities) else N))
    attraction = total = 0.0
    for rows in own.split(step):
        if isinstance(P, SparseAffinities):
            bounds = P.indptr[int(rows[0]) : int(rows[-1]) + 2]
            entries = slice(int(bounds[0]), int(bounds[-1]))
            i, j, p = rows.repeat_interleave(bounds.diff()), P.indices[entries].long(), P.values[entries].double()
        else:
            i, j, p = rows[:, None], own, P[rows].double()
        D = (x[i] - x[j]).square_().add_((y[i] - y[j]).square_())
        attraction += float((torch.xlogy(p, p) + p * (D if gaussian else D.log1p_())).sum())
        total += float(p.sum())
    return attraction + total * float(_log_normalisers(x, y, gaussian=gaussian).logsumexp(0))


def _log_normalisers(x: torch.Tensor, y: torch.Tensor, *, gaussian: bool) -> torch.Tensor:
    """log of the sum over j != i of the similarity, float64 [N], for coordinates float64 [N]."""
    result = torch.empty_like(x)
    if not x.is_cuda:
        from qdv_gpu.kernels import cpu

        cpu.log_normalisers(x.numpy(), y.numpy(), gaussian, result.numpy())
        return result
    for rows in torch.arange(len(x), device=x.device).split(max(1, KL_BLOCK // len(x))):
        D = (x[rows, None] - x).square_().add_((y[rows, None] - y).square_())  # [step, N]
        D[rows - rows[0], rows] = torch.inf
        result[rows] = torch.logsumexp(-D if gaussian else -D.log1p_(), 1)
    return result
