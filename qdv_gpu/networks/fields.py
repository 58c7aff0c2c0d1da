"""What a forward pass costs and its units see, without numbers: operations, sizes, strides and receptive fields."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from qdv_gpu.networks.blank import run_blank
from qdv_gpu.networks.hooks import hooked
from qdv_gpu.networks.network import Network

_aten = torch.ops.aten
_MIXING = (_aten.bmm, _aten._scaled_dot_product_flash_attention_for_cpu, _aten._scaled_dot_product_efficient_attention,
           _aten._scaled_dot_product_flash_attention, _aten._scaled_dot_product_attention_math_for_mps)  # fmt: skip


_SHIFTING = ("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "_pad_circular", "narrow", "split",
             "split_with_sizes", "chunk")  # fmt: skip
ACTIVATED = ("relu", "gelu", "silu", "elu", "leaky_relu", "hardtanh", "hardswish", "mish", "selu", "celu")
POOLED = {"max": ("max_pool2d_with_indices",), "avg": ("avg_pool2d",)}
_FOLLOWED = {*ACTIVATED, *POOLED["max"], *POOLED["avg"]}
_Seen = tuple[int, int, tuple[int, ...]]


@dataclass(frozen=True)
class Grid:
    """What a layer gives: maps of a height and width, pixels between its units, and pixels that a unit sees.

    Stride and field are of the rows, and 0 where that is not known: behind attention, or of what are no maps.
    """

    size: tuple[int, ...]
    stride: int
    field: int


@dataclass(frozen=True)
class Pooled:
    """A call of a pooling to a given grid: path of the module that it is in, sizes before and after."""

    path: str
    before: tuple[int, int]
    after: tuple[int, int]


@dataclass(frozen=True)
class Pass:
    """A forward pass.

    Attributes
    ----------
    operations : int
        A multiplication with its addition is one.
    grids : dict of str to Grid
        By module path.
    pooled : tuple of Pooled
    functions : tuple of str
        Activations and poolings that are no modules: the operation of each call.
    """

    operations: int
    grids: dict[str, Grid]
    pooled: tuple[Pooled, ...]
    functions: tuple[str, ...] = ()


def pass_of(network: Network, module: nn.Module, paths: Iterable[str]) -> Pass:
    """What a forward pass of a module on the meta device does, for a network's images.

    Receptive fields follow Araujo et al. (2019): of each convolution and pooling, r += (k - 1) d j, and then j *= s,
    with kernel k, dilation d, stride s, and j pixels between units; where branches meet, the largest. A transposed
    convolution divides j by s. Behind anything else that changes height or width, but for padding and cutting off,
    stride and field are not known. A gate of one number a map (squeeze and excitation) is not counted as seeing the
    whole image.

    Raises
    ------
    InputError
        If the module cannot run so.

    Examples
    --------
    >>> from qdv_gpu.networks.load import load_network
    >>> network = load_network(nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.MaxPool2d(2)))
    >>> pass_of(network.at_size(15), nn.Sequential(*network.module).to("meta"), ["1"])
    Pass(operations=1764, grids={'1': Grid(size=(3, 3), stride=4, field=5)}, pooled=(), functions=())
    """
    grids: dict[str, Grid] = {}
    wanted, every = set(paths), [path for path, _ in module.named_modules()]
    watch = _Watch()

    def enter(path: str, module: nn.Module, inputs: tuple[Any, ...], _options: Any) -> None:
        watch.running.append(path)
        watch.inside.append(any(True for _ in module.children()) or any(True for _ in module.parameters()))
        if not path:
            watch.seen |= {one: (1, 1, _sides(one)) for one in inputs if isinstance(one, Tensor)}

    def leave(path: str, _module: nn.Module, _inputs: Any, _options: Any, output: Any) -> None:
        watch.running.pop()
        watch.inside.pop()
        if path in wanted and isinstance(output, Tensor):
            stride, field, _ = watch.seen.get(output, (0, 0, ()))
            grids[path] = Grid(_sides(output), stride, field) if output.ndim == 4 else Grid((), 0, 0)

    # torch's counter takes composite operators apart, so that it must be the first to see them
    with hooked(module, every, before=enter, after=leave), watch, FlopCounterMode(display=False) as counter:
        run_blank(network, module)
    return Pass(counter.get_total_flops() // 2, grids, tuple(watch.pooled), tuple(watch.functions))


def _sides(maps: Tensor) -> tuple[int, int]:
    """Height and width of square maps [B, C, H, W] or [B, H, W, C]."""
    first, second, third = maps.shape[1:]
    return (first, second) if first == second != third else (second, third)


def _shifts(packet: Any, args: Any) -> bool:
    """Whether an operation only puts rows to maps or cuts them off."""
    name = getattr(packet, "__name__", "")
    return name in _SHIFTING or (name == "slice" and (len(args) < 5 or args[4] == 1))


class _Watch(TorchDispatchMode):
    """Follows stride, receptive field, and height and width, as they last were, of every tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Tensor, _Seen] = {}  # the tensors hold nothing, and stay themselves while kept
        self.pooled: list[Pooled] = []
        self.running: list[str] = []
        self.inside: list[bool] = []  # whether each of these is more than one operation
        self.functions: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = [one for arg in args for one in (arg if isinstance(arg, list | tuple) else [arg])]
        tensors = [one for one in inputs if isinstance(one, Tensor)]
        known = [self.seen[one] for one in self._whole(tensors) if one in self.seen]
        outputs = [one for one in (result if isinstance(result, tuple | list) else [result]) if isinstance(one, Tensor)]
        packet = getattr(function, "overloadpacket", function)
        name = getattr(packet, "__name__", "").rstrip("_")
        if name in _FOLLOWED and self.inside and self.inside[-1]:
            self.functions.append(name)
        if known:
            stride, field = max(one[0] for one in known), max(one[1] for one in known)
            unknown = any(one[:2] == (0, 0) for one in known) or packet in _MIXING
            after = (0, 0) if unknown else self._after(packet, args, outputs, stride, field)
            for one in outputs:
                sides = _sides(one) if one.ndim == 4 else known[0][2]
                left = after is not None or sides == known[0][2] or _shifts(packet, args)
                self.seen[one] = (*((stride, field) if after is None else after), sides) if left else (0, 0, sides)
        return result

    @staticmethod
    def _whole(tensors: list[Tensor]) -> list[Tensor]:
        """Of several maps the largest: what is broadcast over them is a gate."""
        sides = [one.shape[2:] for one in tensors if one.ndim == 4]
        most = max((side.numel() for side in sides), default=0)
        return [one for one in tensors if one.ndim != 4 or one.shape[2:].numel() == most]

    def _after(self, packet: Any, args: Any, outputs: list[Tensor], stride: int, field: int) -> tuple[int, int] | None:
        """Stride and field behind an operation; (0, 0) if they are not known, None if it leaves them as they are."""
        if packet is _aten.convolution:
            kernel, step, dilation = args[1].shape[2], args[3][0], args[5][0]
            if args[6]:  # transposed: finer, and each unit sees every so many rows of the kernel
                every = step // math.gcd(step, dilation)
                seen = (kernel - 1) // every * every * dilation // step
                return (0, 0) if stride % step else (stride // step, field + seen * stride)
        elif packet is _aten.max_pool2d_with_indices:
            kernel, step, dilation = args[1][0], (list(args[2]) or args[1])[0] if len(args) > 2 else args[1][0], 1
            dilation = args[4][0] if len(args) > 4 else 1
        elif packet is _aten.avg_pool2d:
            kernel, step, dilation = args[1][0], (list(args[2]) or args[1])[0] if len(args) > 2 else args[1][0], 1
        elif packet in (_aten._adaptive_avg_pool2d, _aten.adaptive_max_pool2d):
            return self._pool(args[0], tuple(outputs[0].shape[2:]), stride, field)
        elif packet is _aten.mean and args[0].ndim == 4 and sorted(d % 4 for d in args[1]) == [2, 3]:
            return self._pool(args[0], (1, 1), stride, field)
        else:
            return None
        return stride * step, field + (kernel - 1) * dilation * stride

    def _pool(self, maps: Tensor, after: Any, stride: int, field: int) -> tuple[int, int]:
        before = (maps.shape[2], maps.shape[3])
        self.pooled.append(Pooled(self.running[-1] if self.running else "", before, after))
        kernel = -(-before[0] // after[0])
        return stride * max(1, before[0] // after[0]), field + (kernel - 1) * stride
