"""What an engine gets: rows of P, and phases of the descent."""

from typing import NamedTuple

import numpy as np
import torch

from qdv_gpu.tsne.affinities import Affinities, SparseAffinities

MOMENTUM = (0.5, 0.8)  # during early exaggeration, and after it


class Phase(NamedTuple):
    """Some iterations with the same settings; `exaggeration` multiplies P."""

    iterations: int
    exaggeration: float
    momentum: float


def phases(iterations: int, exaggeration: float, exaggeration_iterations: int) -> list[Phase]:
    """The two phases of an embedding (van der Maaten & Hinton 2008, section 3.4)."""
    early = min(exaggeration_iterations, iterations)
    return [Phase(early, exaggeration, MOMENTUM[0]), Phase(iterations - early, 1.0, MOMENTUM[1])]


class Repulsion(NamedTuple):
    """How the repulsion is summed.

    Attributes
    ----------
    engine : {"exact", "fft", "auto"}
        Over all pairs, on a grid, or as takes less for the size that the map has.
    tolerance : float
        Of the force on a grid: its rms error, relative to its rms.
    """

    engine: str = "exact"
    tolerance: float = 0.005


class Rows(NamedTuple):
    """The rows of one or more P, one after the other, as the kernels read them.

    Attributes
    ----------
    first : torch.Tensor
        int64 [E]: the first row of each embedding's P.
    indptr : torch.Tensor
        int64 [R + 1].
    indices : torch.Tensor
        int32 [nnz], or [0] for dense P.
    values : torch.Tensor
        float32 [nnz].
    """

    first: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor

    def on_cpu(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
        """As numba's loops read them: columns uint32, which spares the test for counting from the end, or None."""
        first, indptr, indices, values = (part.numpy() for part in self)
        return first, indptr, indices.view(np.uint32) if indices.size else None, values


class Motion(NamedTuple):
    """Where E embeddings of N points are, how they move, and the gains of their steps: float32 [E, N, 2] each."""

    Z: torch.Tensor
    velocity: torch.Tensor
    gains: torch.Tensor

    @classmethod
    def at_rest(cls, Z: torch.Tensor) -> "Motion":
        """Without a velocity, every gain 1."""
        return cls(Z, torch.zeros_like(Z), torch.ones_like(Z))


def stacked(P: list[Affinities], *, copies: int) -> Rows:
    """Rows of all P, for `copies` embeddings in turn that share each."""
    sparse = [p for p in P if isinstance(p, SparseAffinities)]
    dense = [p for p in P if isinstance(p, torch.Tensor)]
    N = len(sparse[0].indptr) - 1 if sparse else len(dense[0])
    device = (sparse[0].values if sparse else dense[0]).device
    first = torch.arange(len(P), device=device).repeat_interleave(copies) * N
    if dense:
        indptr = torch.arange(len(P) * N + 1, device=device) * N
        values = dense[0].reshape(-1) if len(dense) == 1 else torch.cat([p.reshape(-1) for p in dense])
        return Rows(first, indptr, torch.empty(0, dtype=torch.int32, device=device), values)
    if len(sparse) == 1:
        return Rows(first, *sparse[0])
    indptr = torch.zeros(len(P) * N + 1, dtype=torch.int64, device=device)
    indptr[1:] = torch.cat([p.indptr.diff() for p in sparse]).cumsum(0)
    return Rows(first, indptr, torch.cat([p.indices for p in sparse]), torch.cat([p.values for p in sparse]))


class Problem(NamedTuple):
    """What one phase of the descent minimises, and how.

    Attributes
    ----------
    rows : Rows
    phase : Phase
    learning_rate : float
    gaussian : bool
        Similarity exp(-d^2) instead of 1 / (1 + d^2).
    """

    rows: Rows
    phase: Phase
    learning_rate: float
    gaussian: bool
