"""What the layers of a network make of a set of images: many layers from one forward pass."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qdv_gpu.arrays import like
from qdv_gpu.data.convert import as_images
from qdv_gpu.data.geometry import Geometry
from qdv_gpu.data.images import Images, prepare
from qdv_gpu.errors import InputError, check_among, check_count, check_flag, check_side, unknown
from qdv_gpu.machine import Halving, in_parallel, product_precision, threads
from qdv_gpu.networks.copies import shared_copy
from qdv_gpu.networks.guard import guarded
from qdv_gpu.networks.hooks import hooked
from qdv_gpu.networks.layers import LayerName, check_memory, is_dense, numbered, read_layers, trace_calls
from qdv_gpu.networks.load import Source, load_network
from qdv_gpu.networks.network import Network, check_replaced
from qdv_gpu.networks.tokens import check_tokens, reduced, reduction
from qdv_gpu.networks.variant import home
from qdv_gpu.progress import advance

logger = logging.getLogger(__name__)
T = TypeVar("T")
Store = Callable[[str, int, int, Tensor], Tensor]  # see ForwardPass.batches
CPU_TILE, CPU_PIXELS = 64, 1 << 18  # images of a tile on a CPU at most, and pixels
CUDA_BATCH = 256
CPU_BATCH, TILES_OF_A_THREAD = 64, 4  # at least
PRECISIONS = {"fp32": 2.0**-23, "tf32": 2.0**-10, "bf16": 2.0**-7}  # and the spacing of its numbers at 1


class _LastLayerSeenError(Exception):
    """Ends a forward pass that has given all that was asked for."""


def tile_images(device: torch.device, size: int) -> int:
    """Images that go through the network in one call on a CPU, where a layer's bits depend on it: a function of size.

    On a GPU 1: there a batch goes through as a whole.
    """
    if device.type != "cpu":
        return 1
    return 1 << (max(1, min(CPU_TILE, CPU_PIXELS // size**2)).bit_length() - 1)


def gains_by_channels_last(network: Network) -> bool:
    """Whether its convolutions may be faster on that layout: not oneDNN's of float64, which it does not have."""
    return network.device.type != "cpu" or network.dtype != torch.float64


def takes_channels_last(network: Network, inputs: Tensor) -> bool:
    """Whether the network gains by channels last and runs on inputs [B, C, H, W] that lie so in memory.

    One that flattens maps by `Tensor.view` does not.
    """
    if not gains_by_channels_last(network):
        return False
    try:
        with torch.inference_mode(), product_precision("ieee"):  # on a copy, since it may keep something in `self`
            copied = replace(network, module=shared_copy(network.module))
            copied(inputs.clone(memory_format=torch.channels_last))
    except (InputError, torch.OutOfMemoryError):
        return False
    return True


def default_batch(device: torch.device, size: int) -> int:
    """Images of a batch: enough for each thread of a CPU to have several tiles, since all wait for the last one."""
    if device.type != "cpu":
        return CUDA_BATCH
    return max(CPU_BATCH, TILES_OF_A_THREAD * threads() * tile_images(device, size))


def activations(
    network: Source,
    images: Any,
    *,
    layers: str | Iterable[str] | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
    precision: str = "fp32",
    tokens: str = "auto",
    crop: bool = False,
) -> dict[str, Any]:
    """Activations of several layers from one forward pass.

    Parameters
    ----------
    network : str, nn.Module or Network
        As for `load_network`; a module is not changed, and is in evaluation mode for the pass, which runs on its device
        and stops behind the last layer asked for.
    images : Images, array, Dataset, DataLoader or list of PIL images
        As for `as_images`.
    layers : str or iterable of str, optional
        Layer names or dotted module paths, as one text separated by commas; default the network's `layers`. A module
        that is called several times in a pass gives "name@1", "name@2", ...
    image_size : int, optional
        Side in pixels that the images are resized to; default the network's.
    batch_size : int, optional
        Default 256 on CUDA, halved when it runs out of memory; on a CPU it changes no bit of the result.
    precision : {"fp32", "tf32", "bf16"}
        float32; the same with products in TF32 (CUDA); or automatic mixed precision with bfloat16.
    tokens : {"auto", "cls", "mean", "all"}
        What is taken of a transformer's layer [T, C]: its class token, the mean of those that stand for parts of the
        image, or all T * C numbers; "auto" is the class token where there is one, and else the mean.
    crop : bool
        Resize the shorter side of the images and cut out the centre, as the network was tested; else they are squeezed
        into a square.

    Returns
    -------
    dict of str to array
        [N, D] for each layer, float32, or bfloat16 where mixed precision made a torch tensor so; D = C * H * W of its
        maps, in the order that the network has them in, or C of its tokens: torch tensors on the network's device, or
        arrays of the kind of `images`.

    Raises
    ------
    InputError
        For an unknown layer, one whose output is not a tensor with a row for each image, one whose size changes from
        batch to batch, or if not even one image fits the device.

    Examples
    --------
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> {name: X.shape for name, X in activations(network, torch.rand(10, 1, 8, 8), layers=["1", "2"]).items()}
    {'1': torch.Size([10, 144]), '2': torch.Size([10, 36])}
    """
    loaded = load_network(network, device=home(network))
    check_precision(precision, loaded.device)
    check_tokens(tokens)
    asked = read_layers(layers)
    selected = loaded.select(None if asked is None else [layer.path for layer in asked])
    check_flag("crop", crop)
    check_memory(loaded, loaded.image_size if image_size is None else image_size)
    seen = shown(as_images(images), loaded, image_size, crop=crop)
    held = hold(ForwardPass(loaded, seen, selected, image_size, batch_size, precision, tokens))
    if asked is not None:
        every = {layer.path for layer in asked if layer.call is None}
        if absent := next((str(one) for one in asked if one.call and str(one) not in held), None):
            raise unknown(f"call of a layer of {loaded.name}", absent, held)
        held = {n: X for n, X in held.items() if LayerName.parse(n).path in every or LayerName.parse(n) in asked}
    return {name: like(X.float(), images) for name, X in held.items()} if _is_array(images) else held


def _is_array(images: Any) -> bool:
    return hasattr(images, "__array_interface__") or hasattr(images, "__cuda_array_interface__")


def check_precision(precision: str, device: torch.device) -> None:
    """Raise InputError for an unknown precision, or one that the device does not have."""
    check_among("precision", precision, PRECISIONS)
    if precision == "tf32" and device.type != "cuda":
        raise InputError("precision tf32 requires a CUDA device: use fp32 or bf16")


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Do forward passes in that precision."""
    with (
        product_precision("tf32" if precision == "tf32" else "ieee"),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        yield


def network_input(network: Network, pixels: Tensor, size: int | None = None) -> Tensor:
    """Images [B, C, H, W] as the network wants them: uint8 resized to `size`, or its own, and normalised; its dtype.

    Floating-point images are normalised already, and resized only to a `size` that is given.
    """
    own = None if pixels.is_floating_point() else network.image_size
    inputs = prepare(
        pixels,
        size=own if size is None else check_side(size),
        channels=network.channels,
        mean=network.mean,
        std=network.std,
        bgr=network.bgr,
    )
    return inputs.to(network.dtype)


def shown(images: Images, network: Network, image_size: int | None = None, *, crop: bool = False) -> Images:
    """The images as they are decoded for a network, which resizes them further if they are not of its size.

    With `crop`, and where a network was fine-tuned so, the shorter side is resized and the centre cut out, as the
    network was tested; else images of mixed sizes are squeezed into a square of `image_size`, or the network's.
    """
    sized = network.at_size(image_size)
    if crop or network.metadata.get("crop"):
        return images.at(Geometry(sized.image_size, sized.resize, sized.interpolation, squash=sized.squash))
    return images.at(Geometry(sized.image_size)) if images.mixed else images


def hold(pass_: "ForwardPass") -> dict[str, Tensor]:
    """Run the pass and keep every layer whole: float32 (or bfloat16) [N, D] on the network's device."""
    held: dict[tuple[str, int], Tensor] = {}
    lock = threading.Lock()

    def store(layer: str, call: int, start: int, output: Tensor) -> Tensor:
        with lock:
            if (layer, call) not in held:
                size = len(pass_.images), output[0].numel()
                try:
                    with torch.inference_mode(mode=False):  # or its user could not change it
                        held[layer, call] = torch.empty(size, dtype=_kept(output), device=output.device)
                except torch.OutOfMemoryError:
                    raise InputError(
                        f"CUDA is out of memory for {size[0]:,} x {size[1]:,} activations of layer {layer}: "
                        "choose fewer images or layers, or in an analysis --memory"
                    ) from None
        rows = held[layer, call][start : start + len(output)]
        rows.view_as(output).copy_(output)
        return rows

    for _ in pass_.batches(store):
        pass
    return pass_.labelled(
        {layer: [held[layer, call] for call in range(len(calls))] for layer, calls in pass_.calls.items()}
    )


@dataclass
class ForwardPass:
    """Iterating runs the images through the network and yields {layer: [b, D]} batch by batch, float32 or bfloat16.

    It can be iterated again, which runs the images again. On a CPU a batch is cut into tiles of a size that depends on
    that of the images alone, each of which goes through a copy of the network on one thread: the bits of a result
    depend neither on the number of threads nor on the size of the batch, and a network that keeps something in `self`
    during its forward pass keeps each tile's apart.
    """

    network: Network
    images: Images
    layers: Mapping[str, str]
    image_size: int | None = None
    batch_size: int | None = None
    precision: str = "fp32"
    tokens: str = "auto"
    calls: dict[str, list[int]] = field(default_factory=dict)  # features of each call of each layer, once known
    taken: dict[tuple[str, int], str | None] = field(default_factory=dict)  # of the tokens of each layer's calls
    halving: Halving = field(default_factory=Halving)  # shared by passes over parts of the layers
    channels_last: bool | None = None  # the layout of its inputs; by default as the network takes the first two images

    def __post_init__(self) -> None:
        self.size = self.image_size or self.network.image_size
        if self.batch_size is None:
            self.batch_size = default_batch(self.network.device, self.size)
        self.batch_size = check_count("batch size", self.batch_size)
        self.element = 4  # bytes of an activation
        self.copies: list[nn.Module] = []

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for tiles in self.batches(_copied):
            batch = _together(tiles)
            tiles.clear()  # or they would stay as long as the batch
            yield batch
            del batch

    def batches(self, store: Store) -> Iterator[list[dict[str, Tensor]]]:
        """Run the images and yield, batch by batch, what `store` returns of each tile.

        It is called as soon as a layer is computed, with the layer, the number of the call, the first image and the
        output [b, ...], and returns a copy [b, D]: the network may overwrite the output. On a CPU several threads call
        it.
        """
        tile = tile_images(self.network.device, self.size)
        step = -(-(self.batch_size or 1) // tile) * tile
        order = torch.arange(len(self.images)).split(step)
        for rows, pixels in zip(order, self.images.batches(order, self.network.device), strict=True):
            if self.channels_last is None:
                two = network_input(self.network, pixels[:2], self.image_size)
                self.channels_last = takes_channels_last(self.network, two)
            fresh = not self.calls
            with product_precision("tf32" if self.precision == "tf32" else "ieee"):
                if pixels.is_cuda:
                    found = self.halving(partial(self._run, store), pixels, rows)
                else:
                    tiles, found = list(zip(pixels.split(tile), rows.split(tile), strict=True)), []
                    first = 0 if self.calls else 1  # which finds the calls
                    for some in (tiles[:first], tiles[first:]):
                        found += in_parallel(lambda one: self._run(store, *one), some)
                if fresh:
                    self._compare_alone(pixels, rows, found[0])
            advance("activations", int(rows[-1]) + 1, len(self.images))
            yield found
            found.clear()  # or it would stay while the next batch is computed

    def run(self) -> None:
        """Run the pass for what it finds out: `calls`, and whether the layers are such as can be analysed."""
        for _ in self.batches(_copied):
            pass

    @property
    def widths(self) -> dict[str, int]:
        """Features of each output."""
        return self.labelled(self.calls)

    def labelled(self, calls: Mapping[str, Sequence[T]]) -> dict[str, T]:
        """Outputs by name: "relu", or "relu@1", "relu@2" if the module is called several times."""
        return {
            str(label): value
            for name in self.layers
            for label, value in zip(numbered(name, len(calls[name])), calls[name], strict=True)
        }

    def tiles(self, layer: str) -> "LayerTiles":
        """The rows of one output, batch by batch, recomputed each time they are iterated."""
        source = layer if layer in self.layers else LayerName.parse(layer).path
        calls = {source: self.calls[source]} if source in self.calls else {}
        return LayerTiles(replace(self, layers={source: self.layers[source]}, calls=calls), layer)

    def _run(
        self, store: Store, pixels: Tensor, rows: Tensor, *, channels_last: bool | None = None
    ) -> dict[str, Tensor]:
        """One tile through the network."""
        network, last = self.network, self.channels_last if channels_last is None else channels_last
        layout = torch.channels_last if last else torch.contiguous_format
        seen: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        names = {path: [name for name in self.layers if self.layers[name] == path] for path in self.layers.values()}
        expected = sum(map(len, self.calls.values()))

        def keep(path: str, _module: nn.Module, _inputs: Any, _options: Any, output: Any) -> None:
            for name in names[path]:
                output = self._checked(name, len(seen[name]), output, len(pixels))
                seen[name].append(store(name, len(seen[name]), int(rows[0]), output))
            if sum(map(len, seen.values())) == expected:
                raise _LastLayerSeenError

        module = network.module if pixels.is_cuda else self._borrowed()
        before = dict(module.named_modules())
        try:
            with (
                torch.inference_mode(),
                torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
                hooked(module, names, after=keep),
            ):
                inputs = network_input(network, pixels, self.image_size)
                inputs = inputs.clone(memory_format=layout)  # since the network may write to them
                with guarded(f"{network.name} cannot be run on a batch of {len(inputs)}"):
                    module(inputs)
        except _LastLayerSeenError:
            pass
        except InputError as error:
            if error.__cause__ is not None:  # raised by the network's code
                trace_calls(network, self.size)  # which says so if it is the size that the network cannot take
            raise
        finally:
            if not pixels.is_cuda:
                self.copies.append(module)
        others = check_replaced(network.name, before, module)
        for name, outputs in seen.items():
            if not outputs and self.layers[name] in others:
                raise InputError(
                    f"layer {name} of {network.name} is made anew in each forward pass: make it in __init__"
                )
            if len(outputs) < max(1, len(self.calls.get(name, ()))):
                raise InputError(
                    f"layer {name} of {network.name} is not used in its forward pass{' each time' * bool(outputs)}"
                )
        self.calls = {name: [output.shape[1] for output in outputs] for name, outputs in seen.items()}
        self.element = max(output.element_size() for outputs in seen.values() for output in outputs)
        return self.labelled(seen)

    def _compare_alone(self, pixels: Tensor, rows: Tensor, found: Mapping[str, Tensor]) -> None:
        """Run the last image of the first tile again, alone and in torch's default layout; warn of other numbers."""
        last = len(next(iter(found.values()))) - 1
        try:
            alone = self._run(_copied, pixels[last : last + 1], rows[last : last + 1], channels_last=False)
        except InputError as error:
            if error.__cause__ is None:
                raise
            return  # a network that takes no single image
        pairs = [(found[name][last].float(), X[0].float()) for name, X in alone.items()]
        sizes = torch.stack([torch.stack([(a - b).abs().amax(), a.abs().amax()]) for a, b in pairs]).tolist()
        spacing = max(PRECISIONS[self.precision], torch.finfo(self.network.dtype).eps)
        for name, (difference, largest) in zip(alone, sizes, strict=True):
            if difference > spacing**0.5 * largest:
                logger.warning(
                    "layer %s of %s gives an image other numbers when it is run again alone (by %.1g of the largest): "
                    "it draws random numbers, keeps something from batch to batch, takes statistics of a batch or "
                    "reads maps as they lie in memory, and its scores depend on that",
                    name, self.network.name, difference / largest if largest else 1,
                )  # fmt: skip
                return

    def _borrowed(self) -> nn.Module:
        """A copy of the network that no other thread is using."""
        try:
            return self.copies.pop()
        except IndexError:
            return shared_copy(self.network.module)

    def _checked(self, name: str, call: int, output: Any, batch: int) -> Tensor:
        """The output, of tokens what is taken of them; InputError unless it has a row of one size for each image."""
        where = f"layer {name} of {self.network.name}" if name else f"the output of {self.network.name}"
        if not isinstance(output, Tensor):
            raise InputError(f"{where} gives a {type(output).__name__}, not a tensor: choose a layer inside it")
        if not is_dense(output) or output.is_meta or output.is_complex():
            kind = "nested" if output.is_nested else "meta" if output.is_meta else f"{output.layout} {output.dtype}"
            raise InputError(f"{where} must give a dense tensor of real numbers, got {kind.replace('torch.', '')}")
        if output.ndim < 2 or len(output) != batch:
            raise InputError(f"{where} must give a row for each of {batch} images, got shape {list(output.shape)}")
        if (name, call) not in self.taken:
            self.taken[name, call] = reduction(self.network, (*output.shape[1:],), self.tokens)
        output = reduced(self.network, output.detach(), self.taken[name, call])  # it may have left inference mode
        features, before = output[0].numel(), self.calls.get(name)
        if before and call == len(before):
            raise InputError(f"{where} is called more often for one batch than for another")
        if before and features != before[call]:
            raise InputError(f"{where} changes its size from batch to batch: {before[call]}, then {features}")
        return output


@dataclass(frozen=True)
class LayerTiles:
    """Re-iterable row tiles [b, D] of one layer, float32 or bfloat16, from a pass that ends with it."""

    pass_: ForwardPass
    layer: str

    def __iter__(self) -> Iterator[Tensor]:
        for outputs in self.pass_:
            tile = outputs[self.layer]
            outputs.clear()
            yield tile
            del tile


def _kept(output: Tensor) -> torch.dtype:
    return torch.bfloat16 if output.dtype == torch.bfloat16 else torch.float32


def _copied(_layer: str, _call: int, _start: int, output: Tensor) -> Tensor:
    return output.to(_kept(output), memory_format=torch.contiguous_format, copy=True).flatten(1)


def _together(tiles: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return tiles[0] if len(tiles) == 1 else {name: torch.cat([tile[name] for tile in tiles]) for name in tiles[0]}
