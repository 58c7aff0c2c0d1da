"""Reproducible, batched t-SNE: exact, or on a grid by FFT where every pair is too many; cuML beside it."""

import functools
import importlib.util
import logging
import math
import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator

from qdv_gpu import kernels
from qdv_gpu.arrays import like, to_tensor
from qdv_gpu.errors import LARGEST, InputError, MissingPackageError, check_among, check_count, is_real, listed, short
from qdv_gpu.machine import resolve_device
from qdv_gpu.neighbors import check_range
from qdv_gpu.tsne.affinities import KINDS, Affinities, check_perplexity, joint_affinities
from qdv_gpu.tsne.engines.cuml import MAX_NEIGHBORS, cuml_embeddings
from qdv_gpu.tsne.engines.grid import TOLERANCES
from qdv_gpu.tsne.objective import SIMILARITIES, kl_divergence
from qdv_gpu.tsne.problem import Repulsion, phases
from qdv_gpu.tsne.schedule import always_exact, descend

logger = logging.getLogger(__name__)
EXAGGERATED = 250  # iterations with early exaggeration, unless told otherwise
ENGINES = ("auto", "exact", "fft", "cuml")
INIT_STD = 1e-4
LARGE = 1e4  # coordinate of a map that may be lost


@functools.cache
def warn_if_short(iterations: int, exaggeration_iterations: int) -> None:
    """Say once of so few iterations that a map does not come out of early exaggeration."""
    if iterations <= exaggeration_iterations:
        logger.warning(
            "%d iterations of t-SNE end within the early exaggeration of %d: such maps hardly show classes, and their "
            "neighborhood hit is near chance; 1000 are usual", iterations, exaggeration_iterations,
        )  # fmt: skip


class TSNE(BaseEstimator):
    """t-distributed stochastic neighbour embedding in two dimensions (van der Maaten & Hinton 2008).

    Minimises KL(P || Q), with P of Wang & Liu (CIKM 2024), eq. 4. The exact engine sums over every pair in an order
    that depends on N alone, the FFT engine in one that depends on the map alone: the same seed gives the same bits on
    the same device, on the CPU with any number of threads, alone or in a batch.

    Parameters
    ----------
    perplexity : float
        Effective number of neighbours, at least 1 and at most (N - 1) / 3.
    iterations : int
        Number of iterations, those with early exaggeration included. All of them are done unless `kl_tolerance` is set.
    early_exaggeration : float
        Factor on P during the first `exaggeration_iterations` iterations, at least 1.
    exaggeration_iterations : int
        Iterations with early exaggeration and momentum 0.5; the others have momentum 0.8. A map that early
        exaggeration contracts to a point, which happens to noise, goes on from its start instead.
    learning_rate : float or "auto"
        As in scikit-learn, whose gradient also keeps the factor 4. "auto" is
        max(N / early_exaggeration / 4, 50) for Student-t. A Gaussian's attraction grows with the distance without
        bound, and a step beyond N / early_exaggeration / 4 would overshoot, so there the floor of 50 is left out.
    init : "random", "pca" or array
        Start: N(0, 1e-4^2) from `seed`, the same on every device; the first two principal components scaled to
        a standard deviation of 1e-4; or float [N, 2], or of the result's shape.
    similarity : {"student-t", "gaussian"}
        q_ij proportional to 1 / (1 + d_ij^2), or to exp(-d_ij^2): symmetric SNE, eq. 5 of the paper.
    affinities : {"knn", "full"}
        p_ij > 0 for the 3 * perplexity nearest neighbours (of more than 20,000 points on a CPU with faiss, or 50,000 on
        a GPU, at least 98 % of them), or for all pairs (memory N^2).
    engine : {"auto", "exact", "fft", "cuml"}
        How the repulsion is summed: over every pair; on a grid by FFT, in a time that grows with the points and with
        the map's area; or t-SNE by cuML. "auto" takes exact or fft, anew every 25 iterations, as a model of their
        costs says of the points and the size of the map, never a clock: on a grid from about 2,100 points on, on a GPU
        20,000. Without CuPy it moves from a GPU to the CPU.
    fft_tolerance : float
        Error of the force on a grid, root mean square relative to that of the force itself, from 0.0002 to 0.05: it
        decides the spacing. Where half of a sample's forces err by more than half of it, as in clusters smaller than
        the spacing, finer grids are taken. Maps that no grid resolves are summed exactly, or, where that would take
        more than ten times as long, a warning is logged.
    kl_tolerance : float, optional
        Stop after early exaggeration once KL(P || Q) falls by no more than this share of itself in 50 iterations, from
        0 to 0.1; each embedding of a batch by itself. By default none stops before `iterations`.
    seed : int
        Of the random start.
    device : str or torch.device
        "auto" stays where a torch or CuPy array is, and takes a GPU if there is one for any other array.

    Attributes
    ----------
    embedding_ : array float32, of the shape that `fit_transform` returns
    kl_divergence_ : float, or float64 array of the shape before [N, 2]
        KL(P || Q) over all pairs, in float64.
    iterations_ : int, or int64 array of the shape before [N, 2]
    engine_ : str
        "exact", "fft" or "cuml"; in the order of their first use where "auto" took both: "fft, exact".
    learning_rate_ : float
    n_features_in_ : int
    """

    def __init__(
        self,
        *,
        perplexity: float = 30.0,
        iterations: int = 1000,
        early_exaggeration: float = 12.0,
        exaggeration_iterations: int = EXAGGERATED,
        learning_rate: float | str = "auto",
        init: Any = "random",
        similarity: str = "student-t",
        affinities: str = "knn",
        engine: str = "auto",
        fft_tolerance: float = 0.005,
        kl_tolerance: float | None = None,
        seed: int = 0,
        device: str | torch.device = "auto",
    ) -> None:
        self.perplexity = perplexity
        self.iterations = iterations
        self.early_exaggeration = early_exaggeration
        self.exaggeration_iterations = exaggeration_iterations
        self.learning_rate = learning_rate
        self.init = init
        self.similarity = similarity
        self.affinities = affinities
        self.engine = engine
        self.fft_tolerance = fft_tolerance
        self.kl_tolerance = kl_tolerance
        self.seed = seed
        self.device = device

    def fit(self, X: Any, y: Any = None) -> "TSNE":
        """Embed X as `fit_transform` does and return the estimator; y is ignored."""
        self.fit_transform(X)
        return self

    def fit_transform(
        self,
        X: Any,
        y: Any = None,
        *,
        seeds: int | Sequence[int] | None = None,
        perplexities: Sequence[float] | None = None,
    ) -> Any:
        """Embed the points of X.

        Parameters
        ----------
        X : array [N, d] or [B, N, d]
            numpy, torch or CuPy, any real dtype; N >= 4. A batch is embedded in one go, each with its own P.
        y : ignored
            For scikit-learn's pipelines.
        seeds : int or sequence of int, optional
            Embed each X this many times, with the seeds seed, seed + 1, ..., or with these seeds, from one P.
        perplexities : sequence of float, optional
            Embed each X with each of these instead of `perplexity`, all in one go.

        Returns
        -------
        The kind of array that X is, float32 [N, 2]; [B, N, 2] for a batch; with `seeds` [S, N, 2] or [B, S, N, 2]; with
        Q perplexities [Q, N, 2], [B, Q, N, 2], [Q, S, N, 2] or [B, Q, S, N, 2].

        Raises
        ------
        InputError
            If X or a parameter breaks a rule, or the embedding overflows.
        MissingPackageError
            If an engine needs a package that is not installed.
        """
        points = _validated(X, self.device)  # [B, N, d]
        home = points.device
        if home.type == "cuda" and self.engine == "auto" and not kernels.available():
            warnings.warn('t-SNE runs on the CPU without CuPy: pip install "qdv_gpu[cuda13]"', stacklevel=2)
            points = points.cpu()
        B, N, d = points.shape
        several = (self.perplexity,) if perplexities is None else listed("perplexities", perplexities, what="numbers")
        self._check_parameters(N, several)
        warn_if_short(int(self.iterations), int(self.exaggeration_iterations))
        chosen = self._seeds(seeds)
        S, Q = len(chosen), len(several)
        batch = [B] if np.ndim(X) == 3 else []
        shape = (*batch, *([Q] if perplexities is not None else []), *([S] if seeds is not None else []), N, 2)
        start = self._start(points.repeat_interleave(Q, dim=0), chosen, shape)  # [B * Q * S, N, 2]
        engine = self.engine_for(N, points.device.type)
        rate = self._resolved_rate(N)
        pairs = [(x, perplexity) for x in points for perplexity in several]
        P = [joint_affinities(x, perplexity=perplexity, kind=self.affinities) for x, perplexity in pairs]
        if engine == "cuml":
            options = self.get_params()
            Z = torch.cat([cuml_embeddings(x, {**options, "perplexity": p}, chosen, rate) for x, p in pairs])
            done = [self.iterations] * len(Z)
        else:
            Z, done, used = descend(
                P,
                start,
                phases=phases(self.iterations, float(self.early_exaggeration), self.exaggeration_iterations),
                learning_rate=rate,
                gaussian=self.similarity == "gaussian",
                repulsion=Repulsion(engine, float(self.fft_tolerance)),
                kl_tolerance=None if self.kl_tolerance is None else float(self.kl_tolerance),
            )
            engine = ", ".join(used)
        kl = self._divergences(P, Z.view(len(P), S, N, 2), rate)
        single = len(shape) == 2
        self.kl_divergence_ = kl.item() if single else kl.reshape(shape[:-2])
        self.iterations_ = done[0] if single else np.array(done).reshape(shape[:-2])
        self.engine_, self.learning_rate_, self.n_features_in_ = engine, rate, d
        self.embedding_ = like(Z.reshape(shape).to(home), X)
        return self.embedding_

    def _divergences(self, P: list[Affinities], Z: torch.Tensor, rate: float) -> np.ndarray:
        """KL float64 [P, S] of maps Z [P, S, N, 2]; warns of those that are worse than all points in one place.

        InputError if one overflowed.
        """
        largest = float(Z.abs().max())
        if not math.isfinite(largest):
            raise InputError(f"the embedding overflowed with learning_rate {rate:g}: a smaller one or auto is needed")
        kl = np.array(
            [[kl_divergence(p, z, similarity=self.similarity) for z in maps] for p, maps in zip(P, Z, strict=True)]
        )
        if largest > LARGE:
            point = [kl_divergence(p, torch.zeros_like(Z[0, 0]), similarity=self.similarity) for p in P]
            if lost := int((kl > np.array(point)[:, None]).sum()):
                logger.warning(
                    "%d of %d maps fit the data worse than one with all points in one place would, and span up to %.1g:"
                    " learning_rate %g or the start is too large for them", lost, kl.size, 2 * largest, rate,
                )  # fmt: skip
        return kl

    def _check_parameters(self, N: int, perplexities: Sequence[float]) -> None:
        if not perplexities:
            raise InputError("perplexities must be one or more numbers, got none")
        for perplexity in perplexities:
            check_perplexity(perplexity, N)
        check_count("iterations", self.iterations, least=1)
        check_count("exaggeration_iterations", self.exaggeration_iterations, least=0)
        check_count("seed", self.seed, least=0)
        _check_number("early_exaggeration", self.early_exaggeration, 1)
        low, high = TOLERANCES
        _check_number("fft_tolerance", self.fft_tolerance, low, high, f"a number within {low:g} and {high:g}")
        if self.kl_tolerance is not None:
            _check_number("kl_tolerance", self.kl_tolerance, 0, 0.1, "None or a number within 0 and 0.1")
        if not (isinstance(self.learning_rate, str) and self.learning_rate == "auto"):
            _check_number(
                "learning_rate", self.learning_rate, 1 / LARGEST, rule="auto or a number within 1e-30 and 1e+30"
            )
        for name, allowed in (("similarity", SIMILARITIES), ("affinities", KINDS), ("engine", ENGINES)):
            check_among(name, getattr(self, name), allowed)
        if isinstance(self.init, str):
            check_among("init", self.init, ("random", "pca"))

    def _seeds(self, seeds: int | Sequence[int] | None) -> list[int]:
        """The seeds to embed with."""
        if seeds is None or isinstance(seeds, numbers.Integral):
            count = check_count("seeds", 1 if seeds is None else seeds, least=1)
            return [int(self.seed) + number for number in range(count)]
        found = [check_count("seeds", seed, least=0) for seed in listed("seeds", seeds, what="integers")]
        if not found or len(set(found)) < len(found):
            raise InputError(f"seeds must be one or more different integers, got {found}")
        return found

    def _resolved_rate(self, N: int) -> float:
        if not isinstance(self.learning_rate, str):
            return float(self.learning_rate)
        rate = N / self.early_exaggeration / 4
        return rate if self.similarity == "gaussian" else max(rate, 50.0)

    def check_engine(self, device: str) -> None:
        """Raise InputError or MissingPackageError if the engine asked for cannot run on "cpu" or "cuda"."""
        if device == "cuda" and self.engine in ("exact", "fft") and not kernels.available():
            raise MissingPackageError(f'engine {self.engine} on a GPU needs CuPy: pip install "qdv_gpu[cuda13]"')
        if self.engine == "cuml":
            self._check_cuml(device)

    def engine_for(self, N: int, device: str) -> str:
        """Which engine embeds N points on "cpu" or "cuda"; errors as `check_engine`.

        "auto" where the map's size will decide between exact and fft.
        """
        self.check_engine(device)
        return "exact" if self.engine == "auto" and always_exact(N, device) else self.engine

    def _check_cuml(self, device: str) -> None:
        if importlib.util.find_spec("cuml") is None:
            raise MissingPackageError(
                'engine cuml needs a package that is not installed: pip install "qdv_gpu[cuda13]"'
            )
        if device != "cuda":
            raise InputError(f"engine cuml requires a CUDA device, got {device}")
        if self.similarity != "student-t" or self.affinities != "knn" or not isinstance(self.init, str):
            raise InputError(
                "engine cuml requires similarity student-t, affinities knn and init random or pca, got "
                f"{self.similarity}, {self.affinities} and {self.init if isinstance(self.init, str) else 'an array'}"
            )
        if self.kl_tolerance is not None:
            raise InputError(f"engine cuml does all its iterations: it takes no kl_tolerance, got {self.kl_tolerance}")
        if int(3 * self.perplexity) + 1 > MAX_NEIGHBORS:
            largest = (MAX_NEIGHBORS - 1) // 3
            raise InputError(f"engine cuml requires a perplexity of at most {largest}, got {self.perplexity}")

    def _start(self, points: torch.Tensor, seeds: list[int], shape: tuple[int, ...]) -> torch.Tensor:
        """Where the embeddings start, float32 [B * S, N, 2] on the points' device."""
        (B, N, _), S = points.shape, len(seeds)
        if not isinstance(self.init, str):
            init = to_tensor(self.init, points.device)
            if tuple(init.shape) not in {(N, 2), shape}:
                raise InputError(f"init must have shape {[N, 2]} or {list(shape)}, got {list(init.shape)}")
            if init.is_complex() or not (init.to(torch.float64).abs() <= LARGEST).all():
                raise InputError(f"init must be real, finite and at most {LARGEST:g} in size")
            return init.to(torch.float32).expand(shape).reshape(B * S, N, 2)
        if self.init == "pca":
            return torch.stack([_first_components(x) for x in points]).repeat_interleave(S, dim=0)
        draws = [INIT_STD * _normal(seed, N) for seed in seeds]
        return torch.stack(draws).repeat(B, 1, 1).to(points.device)


def _validated(X: Any, device: str | torch.device) -> torch.Tensor:
    """X as float32 or float64 [B, N, d] on the device to work on."""
    try:
        points = to_tensor(X)
    except TypeError as error:
        raise InputError(f"X must be an array of real numbers: {error}") from None
    if points.is_complex():
        raise InputError(f"X must be real, got dtype {points.dtype}")
    if points.ndim not in (2, 3):
        raise InputError(f"X must have shape [N, d] or [B, N, d], got {list(points.shape)}")
    if points.shape[-1] == 0:
        raise InputError(f"X must have at least one feature, got shape {list(points.shape)}")
    if points.shape[-2] < 4:
        raise InputError(f"X must have at least 4 points, got shape {list(points.shape)}")
    if points.shape[0] == 0:
        raise InputError(f"X must hold at least one set of points, got shape {list(points.shape)}")
    placed = (
        isinstance(device, str)
        and device == "auto"
        and (isinstance(X, torch.Tensor) or hasattr(X, "__cuda_array_interface__"))
    )
    points = points.to(points.device if placed else resolve_device(device))
    if not points.is_floating_point():
        check_range(points)
    if points.dtype not in (torch.float32, torch.float64):
        points = points.to(torch.float32 if points.is_floating_point() else torch.float64)
    finite = points.isfinite().all(dim=-1)
    if not finite.all():
        where = [int(index) for index in (~finite).nonzero()[0]]
        raise InputError(f"X must be finite: row {where[-1]}{f' of set {where[0]}' if len(where) == 2 else ''} is not")
    check_range(points)
    points = points.reshape(-1, *points.shape[-2:])
    if (points == points[:, :1]).all(dim=-1).all(dim=-1).any():
        warnings.warn("all points are equal: the map shows its start, not the data", stacklevel=3)
    return points


def _check_number(name: str, value: Any, least: float, most: float = LARGEST, rule: str | None = None) -> None:
    if not is_real(value) or not least <= value <= most:
        raise InputError(f"{name} must be {rule or f'a finite number of at least {least:g}'}, got {short(value)}")


def _normal(seed: int, N: int) -> torch.Tensor:
    """Standard normal float32 [N, 2] drawn on the CPU, so that a seed means the same on every device."""
    return torch.randn((N, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


def _first_components(X: torch.Tensor) -> torch.Tensor:
    """The first two principal components of X [N, d], float32 [N, 2], the first with a standard deviation of 1e-4.

    The sign makes the entry of largest size positive. Components that do not exist are 0.
    """
    C = X.to(torch.float64) - X.to(torch.float64).mean(dim=0)
    if C.shape[1] <= C.shape[0]:
        scores = C @ torch.linalg.eigh(C.T @ C).eigenvectors[:, -2:].flip(1)
    else:
        values, vectors = torch.linalg.eigh(C @ C.T)
        scores = (vectors[:, -2:] * values[-2:].clamp(min=0).sqrt()).flip(1)
    Z = torch.zeros((len(C), 2), dtype=torch.float64, device=C.device)
    Z[:, : scores.shape[1]] = scores
    largest = Z.gather(0, Z.abs().argmax(dim=0, keepdim=True))
    std = Z[:, 0].std(correction=0)
    return (Z * torch.where(largest < 0, -1, 1) * (INIT_STD / std if std > 0 else 0.0)).to(torch.float32)
