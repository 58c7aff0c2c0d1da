"""t-SNE in plain float64 torch, and the point sets that the kernels are tried on."""

import torch

from qdv_gpu.tsne.affinities import SparseAffinities


def cloud(n, scale=1.0, seed=0):
    return scale * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def far_apart(n, seed=0):
    """Clusters whose centres are 1e4 apart."""
    centres = 1e4 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    return cloud(n, seed=seed) + centres[torch.arange(n) % 3]


def matrix(P):
    """P as a float64 [N, N] tensor."""
    if not isinstance(P, SparseAffinities):
        return P.double()
    N = len(P.indptr) - 1
    dense = torch.zeros(N, N, dtype=torch.float64)
    dense[torch.arange(N).repeat_interleave(P.indptr.diff()), P.indices.long()] = P.values.double()
    return dense


def kl(P, Z, *, gaussian):
    """sum p_ij log(p_ij / q_ij) for P [N, N] and Z [N, 2], both float64."""
    D = (Z[:, None] - Z[None]).square().sum(-1)
    log_w = -D if gaussian else -torch.log1p(D)
    log_q = log_w - torch.logsumexp(log_w[~torch.eye(len(Z), dtype=torch.bool)], 0)
    return torch.xlogy(P, P).sum() - (P * log_q).sum()


def gradient(P, Z, *, gaussian, exaggeration=1.0):
    """Gradient [N, 2] of the KL divergence by automatic differentiation.

    Exaggeration multiplies P's part but not the normaliser's, as the loss P log Q with sum(P) = 1 is split.
    """
    Z = Z.double().requires_grad_()
    P = P.double()
    (total,) = torch.autograd.grad(kl(P, Z, gaussian=gaussian), Z)
    if exaggeration == 1:
        return total
    D = (Z[:, None] - Z[None]).square().sum(-1)
    (pull,) = torch.autograd.grad((P * (D if gaussian else torch.log1p(D))).sum(), Z)
    return total + (exaggeration - 1) * pull


def descend(P, Z, *, iterations, exaggeration, momentum, rate, gaussian):
    """Gradient descent with momentum and gains, float64 [N, 2]."""
    Z = Z.double()
    velocity, gains = torch.zeros_like(Z), torch.ones_like(Z)
    for _ in range(iterations):
        slope = gradient(P, Z, gaussian=gaussian, exaggeration=exaggeration)
        gains = torch.where(slope * velocity < 0, gains + 0.2, gains * 0.8).clamp(min=0.01)
        velocity = momentum * velocity - rate * gains * slope
        Z = Z + velocity
    return Z
