"""Which layers of a network are held, in which forward pass, and which are recomputed, within a budget of memory."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qdv_gpu.errors import InputError
from qdv_gpu.pca import Workspace, workspace

UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}
# Bytes of a forward pass for each byte of the largest input and output of one of its modules: these, copies in the
# layout that a convolution wants, and what waits beside them for a sum or concatenation.
FORWARD = 3
BATCH_SHARE = 4  # a forward pass gets at most a quarter of the memory, as long as an image fits


@dataclass(frozen=True)
class Layer:
    """A layer to be planned for: `widths` are the features of each of its calls, `element` bytes of an activation."""

    name: str
    widths: tuple[int, ...]
    element: int = 4

    @property
    def row(self) -> int:
        """Bytes for one image."""
        return sum(self.widths) * self.element


@dataclass(frozen=True)
class Plan:
    """How to compute the layers of one network within a budget.

    Attributes
    ----------
    passes : list of list of str
        Layers that are held together after one forward pass, for each pass.
    recomputed : list of str
        Layers whose tiles are recomputed each time that they are read.
    batches : dict of str to int
        Images in a batch of the pass that a layer comes from.
    workspaces : dict of str to Workspace
        Of the layer's PCA.
    """

    passes: list[list[str]]
    recomputed: list[str]
    batches: dict[str, int]
    workspaces: dict[str, Workspace]

    def lines(self, network: str, sizes: Mapping[str, int]) -> Iterable[str]:
        """The plan in words; `sizes` are the bytes of each layer."""
        for number, held in enumerate(self.passes, start=1):
            total = sum(sizes[name] for name in held)
            which = f"pass {number} of {len(self.passes)}" if len(self.passes) > 1 else "one pass"
            batch = self.batches[held[0]]
            yield f"{network}: {which}, {batch} images at a time, holds {', '.join(held)} ({readable(total)})"
        for name in self.recomputed:
            yield (
                f"{network}: {name} ({readable(sizes[name])}) is recomputed {self.batches[name]} images at a time, "
                f"with {self.workspaces[name].block} columns in its PCA"
            )


def plan(
    layers: Iterable[Layer],
    *,
    network: str,
    images: int,
    image_bytes: int,
    n_components: int,
    embedding: int,
    batch: int,
    budget: int,
    reserved: int = 0,
) -> Plan:
    """Decide for each layer; those that fit together are held after one pass.

    Parameters
    ----------
    layers : iterable of Layer
        In forward order.
    network : str
        For messages.
    images : int
    image_bytes : int
        What the forward pass of one image needs, layers aside.
    n_components : int
    embedding : int
        Bytes that t-SNE and the scores of one layer need.
    batch : int
        Images in a batch, at most.
    budget : int
        Bytes to stay within.
    reserved : int
        Bytes of it that are taken, by weights and images.

    Raises
    ------
    InputError
        If not even the tiles of one image of a layer fit; the message says the least that works.
    """
    room = budget - reserved
    passes: list[list[Layer]] = []
    recomputed: list[Layer] = []
    batches: dict[str, int] = {}
    workspaces: dict[str, Workspace] = {}

    def batch_of(row: int) -> int:
        fits = max(1, room // BATCH_SHARE // (image_bytes + row))
        return min(batch, 1 << fits.bit_length() - 1)

    def work(layer: Layer, spare: float) -> Workspace:
        return workspace(images, max(layer.widths), n_components, memory=spare)

    def peak(held: list[Layer]) -> int:
        """Least bytes with which these can be computed, and then reduced and embedded one after the other."""
        row = sum(layer.row for layer in held)
        return row * images + max(
            batch_of(row) * (image_bytes + row), *(work(layer, 0).bytes for layer in held), embedding
        )

    for layer in layers:
        if passes and peak([*passes[-1], layer]) <= room:
            passes[-1].append(layer)
        elif peak([layer]) <= room:
            passes.append([layer])
        else:
            recomputed.append(layer)
    for layer in recomputed:
        tile, smallest = image_bytes + layer.row, work(layer, 0).bytes
        least = reserved + max(tile + smallest, embedding)
        if least > budget:
            raise InputError(
                f"memory of {readable(budget)} is too small for layer {layer.name} of {network}: at least "
                f"{readable(1.006 * least)} is required"
            )
        batches[layer.name] = min(batch_of(layer.row), max(1, (room - smallest) // tile))
        workspaces[layer.name] = work(layer, room - batches[layer.name] * tile)
    for held in passes:
        row = sum(layer.row for layer in held)
        for layer in held:
            batches[layer.name] = batch_of(row)
            workspaces[layer.name] = work(layer, room - row * images)
    return Plan(
        [[layer.name for layer in held] for held in passes],
        [layer.name for layer in recomputed],
        batches,
        workspaces,
    )


def parse_bytes(text: str) -> int:
    """Bytes of "4GB", "512 MiB", "2e9".

    Raises
    ------
    InputError
        If it is not a positive number with or without a unit.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    try:
        number = float(match[1]) * UNITS[match[2].upper()] if match else 0
    except (ValueError, KeyError):
        number = 0
    if not 1 <= number < math.inf:
        raise InputError(f"memory must be a size like 4GB or 512MiB, got {text!r}")
    return int(number)


def readable(size: float) -> str:
    """ "1.3 GB" for 1,284,505,600."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
