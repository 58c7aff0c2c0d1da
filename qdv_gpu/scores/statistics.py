"""How sure we can be of a score: what each image contributes to it, and how much that varies."""

from typing import Any

import torch

from qdv_gpu.arrays import to_tensor
from qdv_gpu.errors import InputError


def hits(indices: torch.Tensor, labels: Any) -> torch.Tensor:
    """NH of each point (eq. 2), float64 [N], from its neighbours `indices` int64 [N, k] and the labels [N]."""
    return matches(indices, labels).sum(dim=1).to(torch.float64) / indices.shape[1]


def influence_values(indices: torch.Tensor, labels: Any) -> torch.Tensor:
    """What each point contributes to NH, as a neighbour as well as with neighbours.

    With M_ji = [y_i = y_j] and h the `hits`, phi(i) = h(i) + (1/k) sum_{j : i in N_k(j)} (M_ji - h(j)). Neighbouring
    points share neighbours, so their hits are correlated; the spread of phi accounts for that (`standard_error`).

    Parameters
    ----------
    indices : torch.Tensor
        Neighbours int64 [N, k].
    labels : array
        Integers [N].

    Returns
    -------
    torch.Tensor
        float64 [N]; the mean is NH. The sums are of integers, hence the same bits on every run.
    """
    k = indices.shape[1]
    agree = matches(indices, labels).to(torch.int64)  # [N, k]
    own = agree.sum(dim=1)  # [N], k h(i)
    balance = k * agree - own[:, None]  # [N, k], k (M_ji - h(j)) for row j
    received = torch.zeros_like(own).index_add_(0, indices.reshape(-1), balance.reshape(-1))
    return (k * own + received).to(torch.float64) / k**2


def standard_error(phi: Any, labels: Any, *, seed_values: Any = None) -> float:
    """Standard error of NH, for the test images drawn class by class and the seeds of the map.

    sqrt(sum_c (n_c / N)^2 s_c^2 / n_c + s_seeds^2 / S), with s_c^2 the variance of phi within class c and s_seeds^2
    that of NH over the S seeds.

    Parameters
    ----------
    phi : array
        Influence values [N], averaged over the seeds, or [S, N], which are averaged here.
    labels : array
        Integers [N], at least two points in each class.
    seed_values : array, optional
        NH of each seed, [S]. With fewer than two, the term of the seeds is left out: the error is then that of
        this one map.
    """
    values = to_tensor(phi).to(torch.float64).cpu()  # where sums have an order
    values = values.mean(dim=0) if values.ndim == 2 else values
    classes, members, counts = classes_of(labels, values)
    if int(counts.min()) < 2:
        rare = int(classes[counts.argmin()])
        raise InputError(f"a standard error needs at least 2 points in every class, class {rare} has 1")
    means = _sums(values, members, len(counts)) / counts
    variances = _sums((values - means[members]).square(), members, len(counts)) / (counts - 1)
    variance = float((counts * variances).sum()) / len(values) ** 2
    if seed_values is not None:
        nh = to_tensor(seed_values).to(torch.float64)
        if nh.numel() > 1:
            variance += float(nh.var()) / nh.numel()
    return variance**0.5


def matches(indices: torch.Tensor, labels: Any) -> torch.Tensor:
    """M_ji = [y_i = y_j], bool [N, k], for i the neighbours of each j."""
    _, members, _ = classes_of(labels, indices)
    return members[indices] == members[:, None]


def classes_of(labels: Any, rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Class labels [C], the class number of each point [N] and the class sizes [C], on the device of `rows`."""
    y = to_tensor(labels)
    if y.ndim != 1 or y.is_floating_point() or y.is_complex():
        raise InputError(f"labels must be integers of shape [N], got {y.dtype} of shape {list(y.shape)}")
    if rows is not None:
        if len(y) != len(rows):
            raise InputError(f"labels and points must be equally many, got {len(y)} labels and {len(rows)} points")
        y = y.to(rows.device)
    classes, members, counts = torch.unique(y, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise InputError(f"at least two classes are needed, all {len(y)} labels are the same")
    return classes, members, counts


def _sums(values: torch.Tensor, members: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Sum of `values` in each class, float64 [C], one after the other."""
    return torch.bincount(members, weights=values, minlength=n_classes)
