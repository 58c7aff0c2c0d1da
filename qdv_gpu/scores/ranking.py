"""Which of many networks keep the classes together best, and how sure their order is.

All of it speaks of V candidates on the same images at one layer. theta_i is the neighborhood hit (NH) of candidate i.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from qdv_gpu.errors import InputError
from qdv_gpu.scores.comparison import LEVEL, RUNS, Side
from qdv_gpu.scores.statistics import classes_of, image_covariance, one_image

DRAWS = 20_000  # of the Gaussian maxima: the level is met to within 0.15 %
BLOCK = 2**22  # numbers held at once
TINY = 1e-12  # differences of NH, or of variances relative to the whole, that are rounding


@dataclass(frozen=True)
class Estimates:
    """NH of V candidates and the two parts of its covariance Sigma.

    Attributes
    ----------
    nh : array
        float64 [V], averaged over maps and runs.
    images : array
        float64 [V, V]: what the images that were drawn add to the covariance; its df is `images_df`.
    noise : array
        float64 [V]: what the seeds of the maps, or the training runs, add to the variance of each, pooled over the
        candidates; NaN of two runs. Its df is `noise_df`.
    images_df, noise_df : float
    """

    nh: np.ndarray
    images: np.ndarray
    noise: np.ndarray
    images_df: float
    noise_df: float

    @property
    def sigma(self) -> np.ndarray:
        """Sigma, float64 [V, V]."""
        return self.images + np.diag(self.noise)

    @property
    def standard_error(self) -> np.ndarray:
        """Of each NH, float64 [V]; NaN of two runs."""
        return np.sqrt(np.diag(self.sigma))

    @property
    def known(self) -> bool:
        """Whether there is an error: of two runs there is none."""
        return not bool(np.isnan(self.noise).any())


@dataclass(frozen=True)
class Ranks:
    """What can be said of the order of V candidates.

    Attributes
    ----------
    nh : array
        float64 [V].
    low, high : array
        float64 [V]: 95 % interval of each NH by itself; NaN of two runs.
    can_be_best : array
        bool [V]: whether a candidate can still be the best; the true best is among them in at least 95 % of samples.
    ranks : array
        int64 [V, 2]: least and largest rank of each, 1 is the highest NH, and only those that can be best can have it.
        They hold for all at once in at least 90 % of samples: of the best and of all pairs they say it with 95 % each.
    optimism : float
        How much the highest NH is too high on average if all that can still be best are equal.
    """

    nh: np.ndarray
    low: np.ndarray
    high: np.ndarray
    can_be_best: np.ndarray
    ranks: np.ndarray
    optimism: float


@dataclass(frozen=True)
class Gains:
    """NH of V candidates less that of the baseline, which itself has 0.

    Attributes
    ----------
    delta, low, high : array
        float64 [V]; the intervals hold for all candidates (and layers) at once with 95 %, NaN of two runs.
    verdicts : tuple of {"ahead", "behind", "undecided", "baseline"}
    """

    delta: np.ndarray
    low: np.ndarray
    high: np.ndarray
    verdicts: tuple[str, ...]


def estimates(candidates: Sequence[Sequence[Side]], labels: Any) -> Estimates:
    """NH of V candidates, and its covariance.

    Sigma_ij = sum_c n_c / N^2 cov_c(phi_i, phi_j) + [i = j] s^2 / S, with phi the spread values averaged over maps
    and runs and s^2 the variance of NH over the S seeds, pooled over the candidates. Of three or more runs of each
    that over the runs takes its place. It is pooled since three runs alone say little of their variance. The images'
    part of Sigma_ii is at least 1 / N^2 (`one_image`).

    Parameters
    ----------
    candidates : sequence of sequence of Side
        The runs of each candidate, equally many.
    labels : array
        Integers [N].

    Raises
    ------
    InputError
        If there is no candidate, or the runs are not equally many.

    Examples
    --------
    >>> phi = torch.rand(3, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 2
    >>> sides = [[Side(phi + d, tuple((phi + d).mean(dim=1).tolist()))] for d in (0, 0.01, 0.3)]
    >>> found = ranks(estimates(sides, torch.arange(200) % 4))
    >>> found.can_be_best, found.ranks.tolist()
    (array([False, False,  True]), [[2, 3], [2, 3], [1, 1]])
    """
    if not candidates:
        raise InputError("at least one candidate is required")
    counts = {len(runs) for runs in candidates}
    R = max(counts)
    if len(counts) > 1 or R == 0:
        raise InputError(f"candidates must have equally many runs, at least one, got {sorted(counts)}")
    phi = torch.stack([torch.stack([run.spread.mean(dim=0) for run in runs]).mean(dim=0) for runs in candidates])
    means = [np.array([np.mean(run.nh) for run in runs]) for runs in candidates]
    repeats = [np.asarray(runs[0].nh, dtype=np.float64) for runs in candidates] if R == 1 else means
    df = sum(len(values) - 1 for values in repeats)
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in repeats)
    pooled = math.nan if 1 < R < RUNS else squares / df if df else 0.0
    classes, _, _ = classes_of(labels, phi[0])
    images = image_covariance(phi, labels)
    images += np.diag([one_image(variance, phi.shape[1]) for variance in np.diag(images).tolist()])
    return Estimates(
        nh=np.array([values.mean() for values in means]),
        images=images,
        noise=np.array([pooled / len(values) for values in repeats]),
        images_df=float(phi.shape[1] - len(classes)),
        noise_df=float(df) if df else math.inf,
    )


def ranks(found: Estimates) -> Ranks:
    """Which candidates can still be the best, and the ranks that each can have.

    Multiple comparisons with the best (Hsu): i can be best if theta_j - theta_i <= d_i se_ij for all j, with d_i the
    95 % point of max_j (G_j - G_i) / se_ij. Ranks from all pairs: j is surely above i if
    theta_j - theta_i > c se_ij, with c the 95 % point of the largest of them all; what cannot be best has at least
    rank 2, and what alone can be has rank 1. G ~ N(0, Sigma) is drawn 20,000 times with a fixed seed, and with it the
    variances in se_ij, whose few degrees of freedom so widen the points, as Student's t does.
    """
    V = len(found.nh)
    everything = np.tile([1, V], (V, 1))
    if not found.known:
        nan = np.full(V, math.nan)
        return Ranks(found.nh, nan, nan, np.ones(V, dtype=bool), everything, math.nan)
    observed = _ratios(found)  # [i, j]: of theta_j - theta_i
    largest = np.concatenate([block.max(axis=2) for block in _drawn_ratios(found)])  # [DRAWS, V]
    best = (observed <= np.quantile(largest, 1 - LEVEL, axis=0)[:, None]).all(axis=1)
    above = observed > np.quantile(largest.max(axis=1), 1 - LEVEL)
    spans = np.stack([1 + above.sum(axis=1), V - above.sum(axis=0)], axis=1)
    spans[~best, 0] = np.maximum(spans[~best, 0], 2)
    if best.sum() == 1:
        spans[best] = 1
    half = _own_halves(found)
    G, _, _ = _draws(found)
    return Ranks(
        nh=found.nh,
        low=np.clip(found.nh - half, 0, 1),
        high=np.clip(found.nh + half, 0, 1),
        can_be_best=best,
        ranks=spans,
        optimism=float(G[:, best].max(axis=1).mean()) if best.sum() > 1 else 0.0,
    )


def gains(found: Estimates, baseline: int, *, layers: int = 1) -> Gains:
    """Candidates against the one at position `baseline` (Dunnett): |theta_i - theta_b| <= c se_ib for all i at once.

    Parameters
    ----------
    found : Estimates
    baseline : int
    layers : int
        Of how many layers this is one: the intervals then hold for all of them (Bonferroni).
    """
    V = len(found.nh)
    delta = found.nh - found.nh[baseline]
    if found.known:
        largest = np.concatenate([np.abs(block[:, 0]).max(axis=1) for block in _drawn_ratios(found, [baseline])])
        half = np.quantile(largest, 1 - LEVEL / layers) * _errors(found)[baseline]
    else:
        half = np.where(np.arange(V) == baseline, 0.0, math.nan)
    low, high = delta - half, delta + half
    sure = np.abs(delta) > TINY
    verdicts = np.where(sure & (low > 0), "ahead", np.where(sure & (high < 0), "behind", "undecided")).tolist()
    verdicts[baseline] = "baseline"
    return Gains(delta, low, high, tuple(verdicts))


def _variances(found: Estimates, images: Any = 1.0, noise: Any = 1.0) -> np.ndarray:
    """Of theta_j - theta_i, float64 [..., V, V], with the two parts scaled."""
    own = np.diag(found.images)
    both = own[:, None] + own
    of_images = np.where(both - 2 * found.images > TINY * both, both - 2 * found.images, 0.0)
    of_noise = found.noise[:, None] + found.noise
    np.fill_diagonal(of_noise, 0.0)
    return of_images * images + of_noise * noise


def _errors(found: Estimates) -> np.ndarray:
    """se_ij, float64 [V, V]."""
    return np.sqrt(_variances(found))


def _ratios(found: Estimates) -> np.ndarray:
    """(theta_j - theta_i) / se_ij at [i, j]: 0 without a difference, infinite of one without an error."""
    delta, errors = found.nh - found.nh[:, None], _errors(found)
    sure = np.where(np.abs(delta) > TINY, np.copysign(math.inf, delta), 0.0)
    return np.divide(delta, errors, out=sure, where=errors > 0)


def _draws(found: Estimates) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """G float64 [DRAWS, V], and the scales [DRAWS] of the variances of images and noise that would be estimated."""
    random = np.random.default_rng(0)
    V = len(found.nh)
    root = _root(found.images)
    # Without BLAS, whose sums have another order on other numbers of threads.
    G = np.einsum("dk,ik->di", random.normal(size=(DRAWS, V)), root) + random.normal(size=(DRAWS, V)) * found.noise**0.5
    scales = [
        random.chisquare(df, DRAWS) / df if math.isfinite(df) and df > 0 else np.ones(DRAWS)
        for df in (found.images_df, found.noise_df)
    ]
    return G, scales[0], scales[1]


def _drawn_ratios(found: Estimates, rows: Sequence[int] | None = None) -> Iterator[np.ndarray]:
    """(G_j - G_i) / se_ij [draws, i, j] for i in `rows`, by default all, block by block."""
    V = len(found.nh)
    own = list(range(V)) if rows is None else list(rows)
    G, images, noise = _draws(found)
    unit_images, unit_noise = (_variances(found, *parts)[own] for parts in ((1.0, 0.0), (0.0, 1.0)))
    step = max(1, BLOCK // (V * len(own)))
    for start in range(0, DRAWS, step):
        part = slice(start, start + step)
        variances = unit_images * images[part, None, None] + unit_noise * noise[part, None, None]
        delta = G[part, None, :] - G[part][:, own, None]
        yield np.divide(delta, np.sqrt(variances), out=np.zeros_like(delta), where=variances > 0)


def _root(covariance: np.ndarray) -> np.ndarray:
    """Lower triangle A with A A^T the covariance, which need not be of full rank (Cholesky)."""
    V = len(covariance)
    A = np.zeros((V, V))
    for j in range(V):
        rest = covariance[j:, j] - (A[j:, :j] * A[j, :j]).sum(axis=1)
        if rest[0] > TINY * covariance[j, j]:
            A[j:, j] = rest / rest[0] ** 0.5
    return A


def _own_halves(found: Estimates) -> np.ndarray:
    """Half of the 95 % interval of each NH, with Welch's degrees of freedom."""
    parts = [(np.diag(found.images), found.images_df), (found.noise, found.noise_df)]
    variance = parts[0][0] + parts[1][0]
    weight = sum(part**2 / df for part, df in parts)
    df = np.divide(variance**2, weight, out=np.full(len(variance), found.images_df), where=weight > 0)
    return stats.t.ppf(1 - LEVEL / 2, df) * variance**0.5
