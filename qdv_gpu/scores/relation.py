"""Whether networks whose maps keep the classes together better are also right more often."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from qdv_gpu.errors import InputError
from qdv_gpu.scores.comparison import LEVEL
from qdv_gpu.scores.statistics import classes_of

LEAST = 5  # candidates, for a coefficient
PERMUTATIONS = 9_999


@dataclass(frozen=True)
class Relation:
    """NH of V candidates at L layers against their accuracy.

    Attributes
    ----------
    nh : array
        float64 [L, V].
    accuracy : array
        float64 [V].
    r, low, high : array
        float64 [L]: correlation and Fisher's 95 % interval; NaN of fewer than 5 candidates, or of equal ones.
    p : array
        float64 [L]: share of permutations of the accuracies in which the largest |r| of all layers is as large.
    """

    nh: np.ndarray
    accuracy: np.ndarray
    r: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray


def halves(labels: Any) -> np.ndarray:
    """Which images are in the first half, bool [N]: of each class every other one, in an order with a fixed seed.

    On the same images NH and accuracy are alike by chance: a network that got easy images gets both right. NH of one
    half and accuracy of the other are not.

    >>> first = halves(np.arange(100) % 4)
    >>> int(first.sum()), np.bincount(np.arange(100)[first] % 4).tolist()
    (50, [13, 12, 13, 12])
    """
    _, members, counts = classes_of(labels, None)
    classes, random = members.numpy(), np.random.default_rng(0)
    order = random.permutation(len(classes))
    order = order[np.argsort(classes[order], kind="stable")]  # class by class
    first = np.zeros(len(classes), dtype=bool)
    first[order[::2]] = True
    if counts.min() < 2:
        raise InputError("halves of the images need at least 2 points in every class")
    return first


def relation(nh: Any, accuracy: Any) -> Relation:
    """Correlation of NH at L layers with accuracy, over V candidates.

    Parameters
    ----------
    nh : array
        float [L, V].
    accuracy : array
        float [V]; of other images than NH is, or it is alike by chance (`halves`).

    Examples
    --------
    >>> found = relation([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]], [0.2, 0.1, 0.4, 0.3, 0.6, 0.5])
    >>> round(float(found.r[0]), 3), bool(0.02 < found.p[0] < 0.1)
    (0.829, True)
    """
    values, right = np.atleast_2d(np.asarray(nh, np.float64)), np.asarray(accuracy, np.float64)
    if right.ndim != 1 or values.shape[1] != len(right):
        raise InputError(f"NH and accuracy must be of equally many, got {values.shape[1]} and {right.size} values")
    L, V = values.shape
    r = p = low = high = np.full(L, math.nan)
    if V >= LEAST:
        a, b = _standardised(values), _standardised(right[None])[0]
        r = np.clip((a * b).sum(axis=1), -1, 1)
        with np.errstate(divide="ignore"):  # of |r| = 1
            middle, half = np.arctanh(r), stats.norm.ppf(1 - LEVEL / 2) / math.sqrt(V - 3)
        low, high = np.tanh(middle - half), np.tanh(middle + half)
        random = np.random.default_rng(0)
        orders = np.argsort(random.random((PERMUTATIONS, V)), axis=1)
        known = a[~np.isnan(r)]
        most = np.abs(np.einsum("lv,pv->pl", known, b[orders])).max(axis=1, initial=0)
        as_large = (most[:, None] >= np.abs(r) - 1e-9).sum(axis=0)
        p = np.where(np.isnan(r), math.nan, (1 + as_large) / (1 + PERMUTATIONS))
    return Relation(values, right, r, low, high, p)


def _standardised(rows: np.ndarray) -> np.ndarray:
    """Rows less their means, of length 1; NaN if all in a row are equal."""
    rest = rows - rows.mean(axis=1, keepdims=True)
    length = np.sqrt((rest**2).sum(axis=1, keepdims=True))
    return np.divide(rest, length, out=np.full_like(rest, math.nan), where=length > 1e-12)
