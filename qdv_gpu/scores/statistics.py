"""How sure we can be of a score: what each image contributes to it, and how much that varies."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array

from qdv_gpu.arrays import to_tensor
from qdv_gpu.errors import InputError

NORMAL = 1.96  # standard errors that a 95 % interval reaches to each side


class Classes(NamedTuple):
    """What `classes_of` finds in labels, and what stands for them where they are needed again.

    Attributes
    ----------
    labels, members, counts : torch.Tensor
        Class labels [C], the class number of each point int64 [N], and the class sizes int64 [C].
    """

    labels: torch.Tensor
    members: torch.Tensor
    counts: torch.Tensor


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


ERROR_NEIGHBORS = 31  # of each point at least, that its error needs
NEAR = 15  # neighbours whose share of a class says what is expected of a link
FEW = 2  # times k: of classes with no more others neighbours cannot say what is expected of a link


def _enough(others: torch.Tensor, k: int) -> torch.Tensor:
    """Whether neighbours say what is expected of a link, where a class has so many others.

    For k = 1 two others are enough: a point's own hit leaves nothing of what its neighbours share.
    """
    return others > (FEW * k if k > 1 else 1)


def error_neighbors(k: int, N: int) -> int:
    """How many neighbours of each of N points the standard error of NH for k needs."""
    return min(N - 1, max(ERROR_NEIGHBORS, k + NEAR + 1))


def spread_values(indices: torch.Tensor, labels: Any, *, k: int) -> torch.Tensor:
    """What each point adds to NH, for its error: as `influence_values`, but not with h(j) of the k nearest themselves.

    Of k = 1 these h(j) are M_ji, and nothing would be left of what neighbours share. Here the share of j's class is
    taken from its neighbours k + 1, k + 2, ... instead, no more of them than there are others of its class: beyond
    these a class that is all together has no one left. Of a class with at most 2 k others (for k = 1 one other) it is
    h(j) after all.

    Parameters
    ----------
    indices : torch.Tensor
        Neighbours int64 [N, m], as many as `error_neighbors` says.
    labels : array
        Integers [N].

    Returns
    -------
    torch.Tensor
        float64 [N], on the CPU, where sums have an order.
    """
    N, m = indices.shape
    if m == k:
        return influence_values(indices, labels)
    indices = indices.cpu()
    _, members, counts = classes = classes_of(labels, indices)
    others = (counts - 1)[members]
    agree = matches(indices, classes).to(torch.int64)  # [N, m]
    h = agree[:, :k].sum(dim=1).double() / k
    further = others.clamp(max=m) - k
    near = _first(agree, further + k) - agree[:, :k].sum(dim=1)
    expected = torch.where(_enough(others, k), near.double() / further.clamp(min=1), h)
    balance = agree[:, :k] - expected[:, None]  # [N, k], M_ji - share of j's class
    return h + _sums(balance.reshape(-1), indices[:, :k].reshape(-1), N) / k


def link_variance(neighbors: Sequence[torch.Tensor], labels: Any, *, k: int) -> float:
    """What links of two points add to the variance of the `spread_values` and not to that of NH: V_2.

    (N k)^-2 sum over linked pairs of (w_ij g_ij)^2, with w the number of directions of the link and
    g_ij = M_ij - a(i) - a(j) + (p(i) + p(j)) / 2, where a is the share of a point's class among its 15 nearest (for
    k >= 15 among the next 15; no more than there are others of its class) and p the mean of a over the class. Links of
    classes with at most 2 k others (for k = 1 one other) are left out. Of several maps w g is averaged first.

    Parameters
    ----------
    neighbors : sequence of torch.Tensor
        int64 [N, m] of each map, as many as `error_neighbors` says.
    """
    N = len(neighbors[0])
    total = csr_array((N, N))
    for indices in (one.cpu() for one in neighbors):
        classes = _, members, counts = classes_of(labels, indices)
        agree = matches(indices, classes).to(torch.float64)
        others = (counts - 1)[members]
        start = k if k >= NEAR and indices.shape[1] > k else 0
        within = agree[:, start : start + NEAR]
        window = others.clamp(1, within.shape[1])
        a = _first(within, window) / window
        p = (_sums(a, members, len(counts)) / counts)[members]
        expected = (a - p / 2).numpy()
        rows, columns = np.repeat(np.arange(N), k), indices[:, :k].reshape(-1).numpy()
        many = _enough(others, k).numpy()
        links = (agree[:, :k].reshape(-1).numpy() - expected[rows] - expected[columns]) * (many[rows] & many[columns])
        total = total + csr_array((links, (rows, columns)), shape=(N, N))
    both = (total + total.T) / len(neighbors)  # each pair twice
    return float(both.power(2).sum()) / 2 / (N * k) ** 2


def standard_error(phi: Any, labels: Any, *, seed_values: Any = None, links: float = 0.0) -> float:
    """Standard error of NH, for the test images drawn class by class and the seeds of the map.

    sqrt(sum_c (n_c / N)^2 s_c^2 / n_c - V_2 + s_seeds^2 / S), with s_c^2 the variance of phi within class c and
    s_seeds^2 that of NH over the S seeds. The images' part is at least 1 / N^2: see `one_image`.

    Parameters
    ----------
    phi : array
        Influence or spread values [N], averaged over the seeds, or [S, N], which are averaged here.
    labels : array
        Integers [N], at least two points in each class.
    seed_values : array, optional
        NH of each seed, [S]. With fewer than two, the term of the seeds is left out: the error is then that of
        this one map.
    links : float
        V_2, of `link_variance`; of the images' variance a quarter stays at least.
    """
    variance = image_variance(phi, labels)
    variance = max(variance - links, variance / 4)
    variance += one_image(variance, to_tensor(phi).shape[-1])
    if seed_values is not None:
        nh = to_tensor(seed_values).to(torch.float64)
        if nh.numel() > 1:
            variance += float(nh.var()) / nh.numel()
    return variance**0.5


def image_variance(phi: Any, labels: Any) -> float:
    """Variance of the mean of phi [N] or [S, N], averaged over S, for images drawn class by class."""
    return image_variance_and_freedom(phi, labels)[0]


def image_variance_and_freedom(phi: Any, labels: Any) -> tuple[float, float]:
    """The same and, by Satterthwaite, its degrees of freedom: few where most of it is that of a class of few images.

    Of parts v_c of the variance these are (sum_c v_c)^2 / sum_c v_c^2 / (n_c - 1); infinity where nothing varies.
    """
    values = to_tensor(phi).to(torch.float64).cpu()  # where sums have an order
    values = values.mean(dim=0) if values.ndim == 2 else values
    members, counts = _classes_of_two(labels, values)
    means = _sums(values, members, len(counts)) / counts
    parts = counts * (_sums((values - means[members]).square(), members, len(counts)) / (counts - 1))
    total, weight = float(parts.sum()), float((parts.square() / (counts - 1)).sum())
    return total / len(values) ** 2, total**2 / weight if weight > 0 else math.inf


def one_image(variance: float, N: int) -> float:
    """What a variance of NH over N images lacks of 1 / N^2, that of one image's hit.

    Where all images hit nothing varies, which does not say that images like these all hit: the one that does not may
    not have been drawn.
    """
    return max(0.0, N**-2 - variance)


def image_covariance(phi: Any, labels: Any) -> np.ndarray:
    """Covariances float64 [V, V] of the means of phi [V, N], for images drawn class by class; see `image_variance`.

    sum_c n_c / N^2 cov_c, with cov_c that within class c.
    """
    values = to_tensor(phi).to(torch.float64).cpu()
    members, counts = _classes_of_two(labels, values.T)
    means = torch.stack([_sums(row, members, len(counts)) for row in values]) / counts  # [V, C]
    rest = (values - means[:, members]).numpy()
    weights = (counts.double() / (counts - 1))[members].numpy() / values.shape[1] ** 2
    # Row by row and not by a matrix product, whose sums have another order on other numbers of threads.
    return np.array([(rest * (weights * row)).sum(axis=1) for row in rest])


def _classes_of_two(labels: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Class number of each row and the class sizes; InputError unless all are of two at least."""
    classes, members, counts = classes_of(labels, rows)
    if int(counts.min()) < 2:
        rare = int(classes[counts.argmin()])
        raise InputError(f"a standard error needs at least 2 points in every class, class {rare} has 1")
    return members, counts


def class_neighbors(neighbors: torch.Tensor, labels: Any, classes: int) -> np.ndarray:
    """Share of each class among the neighbours of each: float32 [C, C], a row for each class.

    Parameters
    ----------
    neighbors : torch.Tensor
        Integers [S, N, k]; the shares are means over the S maps.
    labels : array
        Integers [N] from 0.
    classes : int
        C; of a class without points the row is 0.

    Examples
    --------
    >>> class_neighbors(torch.tensor([[[1], [0], [1]]]), [0, 0, 1], 2).tolist()
    [[1.0, 0.0], [1.0, 0.0]]
    """
    y = to_tensor(labels).to(torch.int64).cpu()
    pairs = y[:, None] * classes + y[neighbors.cpu().long()]  # [S, N, k]
    counts = torch.bincount(pairs.flatten(), minlength=classes**2).view(classes, classes).double()
    return (counts / counts.sum(dim=1, keepdim=True).clamp_min(1)).float().numpy()


def matches(indices: torch.Tensor, labels: Any) -> torch.Tensor:
    """M_ji = [y_i = y_j], bool [N, k], for i the neighbours of each j."""
    _, members, _ = classes_of(labels, indices)
    return members[indices] == members[:, None]


def classes_of(labels: Any, rows: torch.Tensor | None) -> Classes:
    """The classes of labels [N], or the same again, on the device of `rows` [N, ...].

    Raises
    ------
    InputError
        If labels are not integers [N], not as many as rows, or all the same.
    """
    y = labels.members if isinstance(labels, Classes) else to_tensor(labels)
    if y.ndim != 1 or y.is_floating_point() or y.is_complex():
        raise InputError(f"labels must be integers of shape [N], got {y.dtype} of shape {list(y.shape)}")
    if rows is not None and len(y) != len(rows):
        raise InputError(f"labels and points must be equally many, got {len(y)} labels and {len(rows)} points")
    device = y.device if rows is None else rows.device
    if isinstance(labels, Classes):
        return Classes(*(part.to(device) for part in labels))
    found = Classes(*torch.unique(y.to(device), return_inverse=True, return_counts=True))
    if len(found.labels) < 2:
        raise InputError(f"at least two classes are needed, all {len(y)} labels are the same")
    return found


def _first(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Sums [N] of the first `counts` [N], at least one, of each row of values [N, m]."""
    return values.cumsum(dim=1).gather(1, counts.clamp(min=1)[:, None] - 1)[:, 0]


def _sums(values: torch.Tensor, members: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Sum of `values` in each class, float64 [C], one after the other."""
    return torch.bincount(members, weights=values, minlength=n_classes)
