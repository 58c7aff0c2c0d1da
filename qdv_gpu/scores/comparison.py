"""How much better one network keeps the classes together than another, layer by layer, and how sure that is.

All of it speaks of two networks on the same images, A and B; a difference is B's less A's.
"""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from qdv_gpu.errors import InputError, short
from qdv_gpu.scores.statistics import classes_of, image_variance, image_variance_and_freedom, matches, one_image

LEVEL = 0.05  # of error, over all layers
RUNS = 3  # of each network, that speak of more than the networks at hand


@dataclass(frozen=True)
class Side:
    """One run of a network at one layer.

    Attributes
    ----------
    spread : torch.Tensor
        `spread_values`, float64 [S, N] of S maps, or [1, N] in the layer's own space.
    nh : tuple of float
        Neighborhood hit of each map.
    """

    spread: torch.Tensor
    nh: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """NH of B less NH of A at one layer.

    Attributes
    ----------
    delta : float
    standard_error, df : float
        NaN where there is none, as of two runs.
    low, high : float
        Interval that holds for all layers at once, with 95 % confidence.
    p, p_holm : float
        Two-sided, of this layer alone, and after Holm's correction for all.
    equivalent : bool
        Whether the difference is surely within the margin (two one-sided tests).
    verdict : {"ahead", "behind", "equivalent", "undecided"}
        Of B: by the interval, and else by the margin.
    """

    delta: float
    standard_error: float
    df: float
    low: float
    high: float
    p: float
    p_holm: float
    equivalent: bool
    verdict: str


def differences(
    pairs: Sequence[tuple[Sequence[Side], Sequence[Side]]], labels: Any, *, margin: float = 0.02
) -> list[Difference]:
    """Compare two networks at L pairs of layers.

    The variance of a difference is that of the images, drawn class by class, from D(i) = phi_B(i) - phi_A(i), each
    averaged over its maps (and runs), what each network's own lacks of that of `one_image`, and that of the maps' seeds
    s_A^2 / S + s_B^2 / S, with Welch's degrees of freedom. Of three or more runs of each network that of the runs takes
    the seeds' place: then it speaks of networks trained so, and not of two of them. Intervals are simultaneous
    (Bonferroni), p-values Holm's.

    Parameters
    ----------
    pairs : sequence of (sequence of Side, sequence of Side)
        For each pair of layers the runs of A and of B, equally many.
    labels : array
        Integers [N].
    margin : float
        Differences of NH within it count as none.

    Raises
    ------
    InputError
        If the margin is not positive, or there is no pair.

    Examples
    --------
    >>> phi = torch.rand(3, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 2
    >>> sides = [[Side(phi + d, tuple((phi + d).mean(dim=1).tolist()))] for d in (0, 0.3)]
    >>> [found] = differences([(sides[0], sides[1])], torch.arange(200) % 4)
    >>> round(found.delta, 3), found.verdict
    (0.3, 'ahead')
    """
    check_margin(margin)
    if not pairs:
        raise InputError("at least one pair of layers is required")
    found = [_difference(a, b, labels) for a, b in pairs]
    L = len(found)
    raw = np.array([_p_value(delta, error, df) for delta, error, df in found])
    holm = _holm(raw)
    result = []
    for (delta, error, df), p, adjusted in zip(found, raw.tolist(), holm, strict=True):
        half = _quantile(1 - LEVEL / (2 * L), df) * error
        within = _quantile(1 - LEVEL / L, df) * error
        equivalent = bool(abs(delta) + within < margin)  # False of NaN
        verdict = "ahead" if delta - half > 0 else "behind" if delta + half < 0 else "undecided"
        if verdict == "undecided" and equivalent:
            verdict = "equivalent"
        result.append(Difference(delta, error, df, delta - half, delta + half, p, adjusted, equivalent, verdict))
    return result


def check_margin(margin: float) -> None:
    """Raise InputError unless `margin` is a difference of NH within which there may be none."""
    if not isinstance(margin, numbers.Real) or not 0 < margin < 1:
        raise InputError(f"margin must be a difference of NH above 0 and below 1, got {short(margin)}")


def ahead_from(found: Sequence[Difference], *, sign: int = 1) -> int | None:
    """From which layer on B is ahead (or with sign -1 behind), to the last; None from none.

    Tested from the last layer backwards, one-sided at 2.5 %, until the first that fails: no correction is needed.
    """
    first = None
    for position in reversed(range(len(found))):
        one = found[position]
        p = _p_value(one.delta, one.standard_error, one.df) / 2
        if not (sign * one.delta > 0 and p <= LEVEL / 2):
            break
        first = position
    return first


def class_differences(
    first: Sequence[Sequence[torch.Tensor]], second: Sequence[Sequence[torch.Tensor]], labels: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B's NH less A's of each class, at one layer.

    Parameters
    ----------
    first, second : sequence of sequence of torch.Tensor
        Of each run of A, and of B, the neighbours int [N, k] in its maps.
    labels : array
        Integers [N].

    Returns
    -------
    delta, standard_error, p : array
        float64 [C]. The error is that of the images and, of three or more runs, of the runs; of two runs it and p are
        NaN. p is by Student's t with n_c - 1 degrees of freedom, or fewer where the images of a smaller class make most
        of the error (Satterthwaite's; with runs, Welch's), after the correction of Benjamini and Hochberg for the
        classes; NaN of a class of two images, and for k = 1, where the error is too small. NH of a
        class is the mean of psi_c(i) = (N / n_c) [1(y_i = c) h(i) + (1 / k) sum_{j in c : i in N_k(j)} (M_ji - h(j))]
        over all images.
    """
    of_runs = [np.stack([_class_values(run, labels) for run in runs]) for runs in (first, second)]  # [R, C, N]
    R, k = len(first), first[0][0].shape[1]
    D = of_runs[1].mean(axis=0) - of_runs[0].mean(axis=0)  # [C, N]
    sizes = classes_of(labels, None).counts.cpu().numpy()
    images, freedom = np.array([image_variance_and_freedom(torch.from_numpy(row), labels) for row in D]).T
    freedom = np.minimum(freedom, sizes - 1)
    parts: list[tuple[np.ndarray, Any]] = [(images, freedom)]
    if R >= RUNS:
        parts += [(values.mean(axis=2).var(axis=0, ddof=1) / R, R - 1) for values in of_runs]
    variance, weight = sum(part for part, _ in parts), sum(part**2 / degrees for part, degrees in parts)
    df = np.divide(variance**2, weight, out=freedom, where=weight > 0)
    delta, error = D.mean(axis=1), np.where(1 < R < RUNS, math.nan, np.sqrt(variance))
    p = np.array([_p_value(*one) for one in zip(delta.tolist(), error.tolist(), df.tolist(), strict=True)])
    told = (sizes > 2) & (k > 1) & ~np.isnan(error)
    p[told] = stats.false_discovery_control(p[told]) if told.any() else p[told]
    return delta, error, np.where(told, p, math.nan)


def _class_values(neighbors: Sequence[torch.Tensor], labels: Any) -> np.ndarray:
    """psi_c of each image, averaged over the maps, float64 [C, N]."""
    total: np.ndarray | None = None
    for indices in neighbors:
        _, members, counts = classes_of(labels, indices)
        C, (N, k) = len(counts), indices.shape
        agree = matches(indices.long(), labels).to(torch.int64)
        own = agree.sum(dim=1)
        balance = (k * agree - own[:, None]).reshape(-1)
        cells = (members[:, None] * N + indices.long()).reshape(-1)  # class of j, and i
        psi = torch.zeros(C * N, dtype=torch.int64, device=cells.device).index_add_(0, cells, balance)
        psi[members * N + torch.arange(N, device=cells.device)] += k * own
        values = (psi.view(C, N).double() * (N / (k**2 * counts.double()))[:, None]).cpu().numpy()
        total = values if total is None else total + values
    assert total is not None
    return total / len(neighbors)


def _difference(a: Sequence[Side], b: Sequence[Side], labels: Any) -> tuple[float, float, float]:
    """Difference, its standard error and degrees of freedom."""
    R = len(a)
    if R != len(b) or R == 0:
        raise InputError(f"each network must have equally many runs, at least one, got {R} and {len(b)}")
    means = [np.array([np.mean(side.nh) for side in sides]) for sides in (a, b)]  # of each run
    delta = float(means[1].mean() - means[0].mean())
    if R == 2:
        return delta, math.nan, math.nan
    phi = [torch.stack([side.spread.mean(dim=0) for side in sides]).mean(dim=0) for sides in (a, b)]
    classes, _, _ = classes_of(labels, phi[0])
    images, freedom = image_variance(phi[1] - phi[0], labels), len(phi[0]) - len(classes)
    images += sum(one_image(image_variance(own, labels), len(own)) for own in phi)
    repeats = [np.asarray(sides[0].nh) for sides in (a, b)] if R == 1 else means
    parts = [(images, freedom)]
    parts += [(float(values.var(ddof=1)) / len(values), len(values) - 1) for values in repeats if len(values) > 1]
    variance = sum(part for part, _ in parts)
    weight = sum(part**2 / degrees for part, degrees in parts)
    return delta, variance**0.5, variance**2 / weight if weight > 0 else float(freedom)


def _p_value(delta: float, error: float, df: float) -> float:
    """Two-sided."""
    if math.isnan(error):
        return math.nan
    return float(2 * stats.t.sf(abs(delta) / error, df)) if error > 0 else float(delta == 0)


def _quantile(level: float, df: float) -> float:
    return float(stats.t.ppf(level, df)) if not math.isnan(df) else math.nan


def _holm(p: np.ndarray) -> list[float]:
    """p-values after Holm's correction.

    >>> _holm(np.array([0.01, 0.04, 0.03]))
    [0.03, 0.06, 0.06]
    """
    L, order = len(p), np.argsort(p)
    adjusted = np.empty(L)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * (L - np.arange(L))))
    return [float(f"{value:.12g}") for value in adjusted]
