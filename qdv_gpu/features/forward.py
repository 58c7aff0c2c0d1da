"""What the layers of a network make of a set of images: many layers from one forward pass."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qdv_gpu.arrays import like, to_tensor
from qdv_gpu.data.images import Images, prepare
from qdv_gpu.errors import InputError, unknown
from qdv_gpu.machine import Halving, product_precision
from qdv_gpu.networks.network import Network

T = TypeVar("T")
Report = Callable[[str], None]
Store = Callable[[str, int, int, Tensor], Tensor]  # see ForwardPass.batches
BATCH = {"cpu": 64, "cuda": 256}
PRECISIONS = ("fp32", "tf32", "bf16")


class _LastLayerSeenError(Exception):
    """Ends a forward pass that has given all that was asked for."""


def activations(
    network: Network,
    images: Any,
    *,
    layers: Iterable[str] | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
    precision: str = "fp32",
    report: Report = print,
) -> dict[str, Any]:
    """Activations of several layers from one forward pass.

    Parameters
    ----------
    network : Network
        From `load_network`; the pass runs on its device and stops behind the last layer asked for.
    images : Images or array
        From `load_images`, or uint8 [N, C, H, W] (numpy, torch or CuPy).
    layers : iterable of str, optional
        Layer names or dotted module paths; default the network's `layers`. A module that is called several times
        in a pass gives "name@1", "name@2", ...
    image_size : int, optional
        Side in pixels that the images are resized to; default the network's.
    batch_size : int, optional
        Default 64 on the CPU, 256 on CUDA; halved, with a word to `report`, when CUDA runs out of memory.
    precision : {"fp32", "tf32", "bf16"}
        float32; the same with products in TF32 (CUDA); or automatic mixed precision with bfloat16.

    Returns
    -------
    dict of str to array
        [N, D] for each layer, float32, or bfloat16 where mixed precision made a torch tensor so; D = C * H * W of its
        maps in that order: torch tensors on the network's device, or arrays of the kind of `images`.

    Raises
    ------
    InputError
        For an unknown layer, one whose output is not a tensor with a row for each image, one whose size changes from
        batch to batch, or if not even one image fits the device.
    """
    dataset = images if isinstance(images, Images) else _as_images(images)
    check_precision(precision, network.device)
    pass_ = ForwardPass(
        network, dataset, network.select(layers), image_size, batch_size, precision=precision, report=report
    )
    held = hold(pass_)
    return held if isinstance(images, Images) else {name: like(X.float(), images) for name, X in held.items()}


def check_precision(precision: str, device: torch.device) -> None:
    """Raise InputError for an unknown precision, or one that the device does not have."""
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
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
    """Resize uint8 images [B, C, H, W] to `size`, or the network's own, and normalise them to its dtype."""
    inputs = prepare(
        pixels,
        size=size or network.image_size,
        channels=network.channels,
        mean=network.mean,
        std=network.std,
        bgr=network.bgr,
    )
    return inputs.to(network.dtype)


def hold(pass_: "ForwardPass") -> dict[str, Tensor]:
    """Run the pass and keep every layer whole: float32 (or bfloat16) [N, D] on the network's device."""
    held: dict[str, list[Tensor]] = defaultdict(list)

    def store(layer: str, call: int, start: int, output: Tensor) -> Tensor:
        if call == len(held[layer]):
            size = len(pass_.images), output[0].numel()
            try:
                with torch.inference_mode(mode=False):  # or its user could not change it
                    held[layer].append(torch.empty(size, dtype=_kept(output), device=output.device))
            except torch.OutOfMemoryError:
                raise InputError(
                    f"CUDA is out of memory for {size[0]:,} x {size[1]:,} activations of layer {layer}: "
                    "choose fewer images or layers, or in an analysis --memory"
                ) from None
        rows = held[layer][call][start : start + len(output)]
        rows.view_as(output).copy_(output)
        return rows

    for _ in pass_.batches(store):
        pass
    return pass_.labelled(held)


@dataclass
class ForwardPass:
    """Iterating runs the images through the network and yields {layer: [b, D]} batch by batch, float32 or bfloat16.

    It can be iterated again, which runs the images again.
    """

    network: Network
    images: Images
    layers: Mapping[str, str]
    image_size: int | None = None
    batch_size: int | None = None
    precision: str = "fp32"
    report: Report = print
    halving: Halving | None = None  # shared by passes over parts of the layers

    def __post_init__(self) -> None:
        if self.batch_size is None:
            self.batch_size = BATCH[self.network.device.type]
        if self.batch_size < 1:
            raise InputError(f"batch size must be at least 1, got {self.batch_size}")
        self.halving = self.halving or Halving(self.report)
        self.calls: dict[str, list[int]] = {}  # features of each call of each layer, known after the first batch
        self.element = 4  # bytes of an activation

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.batches(_copied)

    def batches(self, store: Store) -> Iterator[dict[str, Tensor]]:
        """Run the images and yield, batch by batch, what `store` returns.

        It is called as soon as a layer is computed, with the layer, the number of the call, the first image and the
        output [b, ...], and returns a copy [b, D]: the network may overwrite the output.
        """
        assert self.halving is not None
        order = torch.arange(len(self.images)).split(self.batch_size)
        for rows, pixels in zip(order, self.images.batches(order, self.network.device), strict=True):
            # what is yielded has no name here, or it would stay while the next batch is computed
            yield _together(self.halving(partial(self._forward, store), pixels, rows))

    def run(self) -> None:
        """Run the pass for what it finds out: `calls`, and whether the network takes these images."""
        for _ in self:
            pass

    @property
    def widths(self) -> dict[str, int]:
        """Features of each output."""
        return self.labelled(self.calls)

    def labelled(self, calls: Mapping[str, Sequence[T]]) -> dict[str, T]:
        """Outputs by name: "relu", or "relu@1", "relu@2" if the module is called several times."""
        return {
            f"{name}@{number}" if len(calls[name]) > 1 else name: value
            for name in self.layers
            for number, value in enumerate(calls[name], start=1)
        }

    def source(self, layer: str) -> str:
        """The name in `layers` that an output belongs to: "relu" for "relu@2"."""
        return layer if layer in self.layers else layer.rpartition("@")[0]

    def tiles(self, layer: str) -> "LayerTiles":
        """The rows of one layer, batch by batch, recomputed each time they are iterated."""
        source = self.source(layer)
        return LayerTiles(replace(self, layers={source: self.layers[source]}), layer)

    def _forward(self, store: Store, pixels: Tensor, rows: Tensor) -> dict[str, Tensor]:
        network = self.network
        size = self.image_size or network.image_size
        seen: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        expected = sum(map(len, self.calls.values()))

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                self._check(name, len(seen[name]), output, len(pixels))
                seen[name].append(store(name, len(seen[name]), int(rows[0]), output))
                if sum(map(len, seen.values())) == expected:
                    raise _LastLayerSeenError

            return hook

        handles = []
        try:
            for name, path in self.layers.items():
                handles.append(network.module.get_submodule(path).register_forward_hook(keep(name)))
            with torch.inference_mode(), computing(self.precision, network.device):
                inputs = network_input(network, pixels, size)
                if inputs.is_cuda:  # convolutions are fastest on it, and pass it on
                    inputs = inputs.contiguous(memory_format=torch.channels_last)
                network.module(inputs)
        except _LastLayerSeenError:
            pass
        except (RuntimeError, ValueError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | InputError):
                raise
            raise InputError(f"{network.name} cannot take images of {size} x {size} pixels: {error}") from error
        finally:
            for handle in handles:
                handle.remove()
        for name, outputs in seen.items():
            if len(outputs) < max(1, len(self.calls.get(name, ()))):
                raise InputError(
                    f"layer {name} of {network.name} is not used in its forward pass{' each time' * bool(outputs)}"
                )
        self.calls = {name: [output.shape[1] for output in outputs] for name, outputs in seen.items()}
        self.element = max(output.element_size() for outputs in seen.values() for output in outputs)
        return self.labelled(seen)

    def _check(self, name: str, call: int, output: Any, batch: int) -> None:
        """Raise InputError if the output is not a tensor with a row of always the same size for each image."""
        where = f"layer {name} of {self.network.name}"
        if not isinstance(output, Tensor):
            raise InputError(f"{where} gives a {type(output).__name__}, not a tensor: choose a layer inside it")
        if output.ndim < 2 or len(output) != batch:
            raise InputError(f"{where} must give a row for each of {batch} images, got shape {list(output.shape)}")
        features, before = output[0].numel(), self.calls.get(name)
        if before and call == len(before):
            raise InputError(f"{where} is called more often for one batch than for another")
        if before and features != before[call]:
            raise InputError(f"{where} changes its size from batch to batch: {before[call]}, then {features}")


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


def _together(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return pieces[0] if len(pieces) == 1 else {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _as_images(array: Any) -> Images:
    pixels = to_tensor(array)
    if pixels.ndim != 4 or pixels.dtype != torch.uint8 or pixels.shape[1] not in (1, 3) or not len(pixels):
        raise InputError(
            "images must be uint8 of shape [N, C, H, W] with N >= 1 and C of 1 or 3, "
            f"got {pixels.dtype} of shape {list(pixels.shape)}"
        )
    none = torch.zeros(len(pixels), dtype=torch.int64)
    return Images("array", none, ("",), torch.arange(len(pixels)), pixels)
