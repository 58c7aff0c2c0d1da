"""Which layers of a network are held, in which forward pass, and which are recomputed, within a budget of memory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qdv_gpu.errors import InputError
from qdv_gpu.features.pca import Workspace, workspace
from qdv_gpu.files import readable

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
class Task:
    """The layers of one network that are to be reduced and embedded.

    Attributes
    ----------
    network : str
        For messages.
    layers : sequence of Layer
        In forward order.
    images : int
    image_bytes : int
        What the forward pass of one image needs, layers aside.
    pca : int
    embedding : int
        Bytes that t-SNE and the scores of one layer need.
    tile : int
        Images that go through the network together at least.
    batch : int
        And at most.
    device : {"cpu", "cuda"}
    """

    network: str
    layers: Sequence[Layer]
    images: int
    image_bytes: int
    pca: int
    embedding: int
    tile: int
    batch: int
    device: str = "cpu"

    def work(self, layer: Layer, memory: float = 0) -> Workspace:
        """The PCA's workspace of at most `memory` bytes, or the smallest."""
        return workspace(self.images, max(layer.widths), self.pca, memory=memory, device=self.device)

    def held(self, layers: Sequence[Layer]) -> int:
        """Least bytes with which these are computed in one pass, and then reduced and embedded one by one."""
        row = sum(layer.row for layer in layers)
        return row * self.images + max(self.forward(row), *(self.work(layer).bytes for layer in layers), self.embedding)

    def recomputed(self, layer: Layer) -> int:
        """Least bytes with which the layer is computed anew, tile by tile, whenever its rows are read."""
        return max(self.forward(layer.row) + self.work(layer).bytes, self.embedding)

    def forward(self, row: int) -> int:
        """Least bytes of a forward pass that gives `row` bytes an image."""
        return min(self.tile, self.images) * (self.image_bytes + row)

    def least(self, layer: Layer) -> int:
        """Least bytes that work for the layer."""
        return min(self.held([layer]), self.recomputed(layer))


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
            names = ", ".join(name or "the output" for name in held)
            yield f"{network}: {which}, {batch} images at a time, holds {names} ({readable(total)})"
        for name in self.recomputed:
            yield (
                f"{network}: {name} ({readable(sizes[name])}) is recomputed {self.batches[name]} images at a time, "
                f"with {self.workspaces[name].columns} columns in its PCA"
            )


def plan(tasks: Sequence[Task], *, budget: int, reserved: int = 0) -> list[Plan]:
    """Decide for each network and layer; those that fit together are held after one pass.

    Parameters
    ----------
    tasks : sequence of Task
        One after the other; each has all the memory.
    budget : int
        Bytes to stay within.
    reserved : int
        Bytes of it that are taken, by weights and images.

    Raises
    ------
    InputError
        If not even the tiles of one image of a layer fit; the message says the least that works for all layers.
    """
    needs = [(reserved + task.least(layer), layer.name, task.network) for task in tasks for layer in task.layers]
    least, name, network = max(needs, default=(0, "", ""))
    if least > budget:
        raise InputError(
            f"memory of {readable(budget)} is too small for layer {name} of {network}: at least "
            f"{readable(1.006 * least)} is required"  # rounded up
        )
    return [_plan(task, budget - reserved) for task in tasks]


def _plan(task: Task, room: int) -> Plan:
    passes: list[list[Layer]] = []
    recomputed = []
    for layer in task.layers:
        if passes and task.held([*passes[-1], layer]) <= room:
            passes[-1].append(layer)
        elif task.held([layer]) <= room:
            passes.append([layer])
        else:
            recomputed.append(layer)

    def batch(row: int, spare: int) -> int:
        fits = max(task.tile, min(room // BATCH_SHARE, spare) // (task.image_bytes + row))
        return min(task.batch, 1 << fits.bit_length() - 1)

    batches, workspaces = {}, {}
    for layer in recomputed:
        images = batch(layer.row, room - task.work(layer).bytes)
        batches[layer.name] = images
        workspaces[layer.name] = task.work(layer, room - images * (task.image_bytes + layer.row))
    for held in passes:
        row = sum(layer.row for layer in held)
        spare = room - row * task.images
        for layer in held:
            batches[layer.name] = batch(row, spare)
            workspaces[layer.name] = task.work(layer, spare)
    return Plan(
        [[layer.name for layer in held] for held in passes], [layer.name for layer in recomputed], batches, workspaces
    )
