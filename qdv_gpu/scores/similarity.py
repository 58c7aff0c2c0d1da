"""What two layers share, and how well a linear map reads the classes off one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdv_gpu.arrays import to_tensor
from qdv_gpu.errors import InputError
from qdv_gpu.neighbors import as_points
from qdv_gpu.scores.statistics import classes_of

FOLDS = 5
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean variance of a feature


def linear_cka(X: Any, Y: Any) -> float:
    """Debiased linear CKA of two layers on the same images: 1 if they are alike but for rotation and scale, 0 if not.

    Kornblith et al. 2019, with the unbiased HSIC of Song et al. 2012 (zero diagonal), so that layers of many features
    are not alike by chance; near 0 it may be negative.

    Parameters
    ----------
    X, Y : array
        [N, d] and [N, m], N >= 4.

    Raises
    ------
    InputError
        If they are not of the same images, of fewer than four, or `knn` refuses one.

    Examples
    --------
    >>> X = torch.randn(100, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> round(linear_cka(X, 3 * X.flip(1)), 6)
    1.0
    """
    return float(cka_matrix([X], [Y])[0, 0])


def cka_matrix(first: Sequence[Any], second: Sequence[Any]) -> Tensor:
    """`linear_cka` of each layer of one network with each of another, float64 [A, B], each layer read once."""
    a, b = ([_Gram.of(X) for X in layers] for layers in (first, second))
    sizes = {gram.N for gram in (*a, *b)}
    if len(sizes) > 1 or min(sizes) < 4:
        raise InputError(
            f"CKA needs layers of the same 4 or more images, got {', '.join(map(str, sorted(sizes)))} rows"
        )
    own = [[float(gram.hsic(gram)) for gram in layers] for layers in (a, b)]
    found = torch.zeros(len(a), len(b), dtype=torch.float64)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            scale = max(own[0][i], 0.0) * max(own[1][j], 0.0)
            found[i, j] = float(x.hsic(y)) / scale**0.5 if scale > 0 else 0.0
    return found


@dataclass(frozen=True)
class _Gram:
    """The Gram matrix of a layer with a zero diagonal, which is not made: centred features [N, d], the diagonal that
    is left out [N], and the sums of its rows [N]."""

    features: Tensor
    diagonal: Tensor
    rows: Tensor

    @classmethod
    def of(cls, X: Any) -> "_Gram":
        features = as_points(to_tensor(X))
        if features.numel():  # to about 1, by a power of two, as fourth powers follow
            features = torch.ldexp(features, -features.abs().max().frexp().exponent)
        features = features - features.mean(dim=0)
        diagonal = features.square().sum(dim=1)
        return cls(features, diagonal, features @ features.sum(dim=0) - diagonal)

    @property
    def N(self) -> int:
        return len(self.features)

    def hsic(self, other: "_Gram") -> Tensor:
        """Unbiased HSIC of the two."""
        N = self.N
        trace = (self.features.T @ other.features).square().sum() - self.diagonal @ other.diagonal
        middle = self.rows.sum() * other.rows.sum() / ((N - 1) * (N - 2))
        return (trace + middle - 2 / (N - 2) * (self.rows @ other.rows)) / (N * (N - 3))


def probe_hits(X: Any, labels: Any) -> Tensor:
    """Whether a linear classifier, trained on other images, finds the class of each: bool [N].

    Ridge regression on the classes, by five folds drawn class by class; the ridge is chosen within the other four.
    The mean is the accuracy of a linear probe (Alain & Bengio 2017) on images that neither it nor the network has seen.

    Parameters
    ----------
    X : array
        A layer's components [N, n].
    labels : array
        Integers [N], at least two classes.

    Examples
    --------
    >>> labels = torch.arange(60) % 3
    >>> probe_hits(torch.nn.functional.one_hot(labels).double(), labels).double().mean().item()
    1.0
    """
    features = as_points(to_tensor(X)).cpu()
    _, members, counts = classes_of(labels, features)
    N, C = len(features), len(counts)
    folds = torch.empty(N, dtype=torch.int64)
    random = np.random.default_rng(0)
    for c in range(C):
        own = torch.from_numpy(random.permutation(np.flatnonzero(members.numpy() == c)))
        folds[own] = torch.arange(len(own)) % FOLDS
    # What a regression needs of each fold: sums over its rows of (x, 1) (x, 1)' and of (x, 1) y'.
    rows = torch.cat([features, torch.ones(N, 1, dtype=torch.float64)], dim=1)
    targets = torch.nn.functional.one_hot(members, C).double()
    parts = [torch.nonzero(folds == fold)[:, 0] for fold in range(FOLDS)]
    grams = torch.stack([rows[part].T @ rows[part] for part in parts])
    rights = torch.stack([rows[part].T @ targets[part] for part in parts])
    found = torch.zeros(N, dtype=torch.bool)
    for fold, test in enumerate(parts):
        inner = (fold + 1) % FOLDS
        train = [other for other in range(FOLDS) if other not in (fold, inner)]
        tried = [
            int(_right(_weights(grams[train].sum(0), rights[train].sum(0), ridge), rows, members, parts[inner]).sum())
            for ridge in RIDGES
        ]
        train = [*train, inner]
        best = _weights(grams[train].sum(0), rights[train].sum(0), RIDGES[int(np.argmax(tried))])
        found[test] = _right(best, rows, members, test)
    return found


def _weights(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Of a ridge regression with an offset, [n + 1, C], from sums over the training rows."""
    n = len(gram) - 1
    mean = gram[:n, n] / gram[n, n]
    centred = gram[:n, :n] - gram[n, n] * mean[:, None] * mean
    penalty = ridge * centred.diagonal().mean().clamp(min=1e-300) * torch.eye(n, dtype=gram.dtype)
    slopes = torch.linalg.solve(centred + penalty, right[:n] - mean[:, None] * right[n])
    return torch.cat([slopes, (right[n] / gram[n, n] - mean @ slopes)[None]])


def _right(weights: Tensor, rows: Tensor, members: Tensor, test: Tensor) -> Tensor:
    """Which of the test rows get the class that is theirs."""
    return (rows[test] @ weights).argmax(dim=1) == members[test]
