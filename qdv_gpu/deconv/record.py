"""What a network did with an image, up to one of its layers, as autograd's graph.

Autograd records ReLUs as modules, functions, methods, in place or used again; only max-pooling and local response
normalisation are replaced on the way, where torch's functions are called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from qdv_gpu.deconv.nodes import between, children, is_relu, keep_active, mark, module_of, shape
from qdv_gpu.deconv.rules import check_rules
from qdv_gpu.deconv.unpool import DTYPES, max_pool
from qdv_gpu.errors import InputError
from qdv_gpu.networks.guard import guarded
from qdv_gpu.networks.hooks import hooked
from qdv_gpu.networks.layers import LayerName, check_size, numbered
from qdv_gpu.networks.network import Network


@dataclass(frozen=True)
class Record:
    """One forward pass: the output [I, C, h, w] of a layer, and autograd's nodes from the layer to the image.

    `nodes` begins with the layer's node and ends with the image's; `number` is the layer's output among its node's. A
    node lives only as long as a tensor that autograd reaches it from: here `output`.
    """

    images: Tensor
    output: Tensor
    nodes: list[Any]
    number: int

    @property
    def activations(self) -> Tensor:
        """The output, outside of autograd."""
        return self.output.detach()

    @property
    def modules(self) -> list[str]:
        """Paths of the modules that made the nodes, the layer's own first."""
        return list(dict.fromkeys(module_of(node) for node in self.nodes))

    @property
    def batched(self) -> bool:
        """Whether the first dimension of every tensor on the way is that of the images."""
        return all(shape(node)[:1] == [len(self.images)] for node in self.nodes)


@torch.inference_mode(mode=False)
@torch.enable_grad()
def record_forward(network: Network, images: Tensor, layer: str, mode: str) -> Record:
    """Run the network on inputs [I, C, H, W] once and keep what autograd recorded up to the layer.

    Raises
    ------
    InputError
        If the layer is unknown, has no maps or does not depend on the images, or, for
        modes other than "gradient", it uses something that has no rule.
    """
    module = network.module
    asked = LayerName.parse(layer)
    (path,) = network.select([asked.path]).values()
    outputs: list[Any] = []
    running: list[str] = []

    def enter(path: str, *_: Any) -> None:
        running.append(path)

    def leave(*_: Any) -> None:
        running.pop()

    def keep(_path: str, _module: nn.Module, _inputs: Any, _options: Any, output: Any) -> None:
        # a clone: what changes the output, or what it is a view of, does not reach it
        outputs.append(output.clone() if isinstance(output, Tensor) else output)

    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    paths = [path for path, _ in module.named_modules()]
    try:
        with (
            hooked(module, [path], after=keep),
            hooked(module, paths, before=enter, after=leave),
            _Watch(running, mode),
        ):
            leaf = images.clone().requires_grad_()
            with guarded(f"{network.name} cannot be run on a batch of {len(images)} with gradients"):
                torch.func.functional_call(module, weights, (leaf.clone(),))
    except (RuntimeError, ValueError, AssertionError) as error:
        told = isinstance(error, InputError) and error.__cause__ is None  # else the network's code raised it
        if not told and not isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
            check_size(network, images.shape[1:])  # which says so if it is the size that the network cannot take
        raise
    output = _chosen(outputs, asked, network.name, len(images))
    nodes, number = [], 0
    if output.requires_grad:
        root, number = children(get_gradient_edge(output).node)[0]  # of the clone
        nodes = between(root, get_gradient_edge(leaf).node)
    if not nodes:
        raise InputError(
            f"layer {layer} of {network.name} does not depend on the image: choose a layer between the image and "
            "the output"
        )
    record = Record(images.detach(), output, nodes, number)
    if mode != "gradient":
        check_rules(nodes, network.name, mode)
    return record


def _chosen(outputs: list[Any], asked: LayerName, network: str, images: int) -> Tensor:
    """The maps [I, C, h, w] of the call that is asked for; InputError if there are none."""
    if not outputs:
        raise InputError(f"layer {asked} of {network} is not used in its forward pass")
    if len(outputs) > 1 and asked.call is None:
        calls = ", ".join(map(str, numbered(asked.path, len(outputs))))
        raise InputError(f"layer {asked} of {network} is used {len(outputs)} times: choose one of {calls}")
    if asked.call is not None and (len(outputs) == 1 or asked.call > len(outputs)):
        times = "once" if len(outputs) == 1 else f"{len(outputs)} times"
        raise InputError(f"layer {asked.path} of {network} is used {times}, got {asked}")
    output = outputs[(asked.call or 1) - 1]
    if not isinstance(output, Tensor) or output.ndim != 4 or len(output) != images:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(
            f"layer {asked} of {network} has no maps: a Deconvnet needs [B, C, h, w], got {shape}; "
            "choose a convolution, pooling or the ReLU behind one"
        )
    return output


class _Watch(TorchFunctionMode):
    """Replaces max-pooling by ours and lets signals skip response normalisation; marks each node with its module."""

    def __init__(self, running: list[str], mode: str) -> None:
        super().__init__()
        self.running, self.skip = running, mode != "gradient"
        self.keep = mode in ("guided", "gradient")

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.local_response_norm and self.skip:
            result = _SkippedNormalisation.apply(lambda maps: function(maps, *args[1:], **kwargs), args[0])
        elif function in (functional.max_pool2d, torch.max_pool2d):
            result = _pooled(function, *args, **kwargs)
        else:
            result = function(*args, **kwargs)
            node: Any = result.grad_fn if self.keep and isinstance(result, Tensor) else None
            if node is not None and is_relu(node):
                keep_active(node, result.detach() > 0)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                mark(tensor.grad_fn, self.running[-1] if self.running else "")
        return result


class _SkippedNormalisation(torch.autograd.Function):
    """Local response normalisation on the way up, nothing on the way down (Zeiler & Fergus 2014)."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], maps: Tensor) -> Tensor:
        return function(maps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def _pooled(  # noqa: PLR0917 - torch's signature
    function: Any, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,  # noqa: FBT001, FBT002 - torch's signature
) -> Any:  # fmt: skip
    if input.ndim != 4 or input.dtype not in DTYPES:  # torch's own is the adjoint as well, but slower
        return function(input, kernel_size, stride or [], padding, dilation, ceil_mode)
    return max_pool(input, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)[0]
