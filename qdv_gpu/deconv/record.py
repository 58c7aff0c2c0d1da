"""What a network did with an image, up to one of its layers, as autograd's graph.

Autograd records ReLUs as modules, functions, methods, in place or used again; only max-pooling and local response
normalisation are replaced on the way, where torch's functions are called.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from qdv_gpu.deconv.unpool import DTYPES, Pool, max_pool
from qdv_gpu.errors import InputError
from qdv_gpu.networks.network import Network

# What is linear in the image needs no rule: its transpose is what autograd computes.
LINEAR = {
    "AccumulateGrad", "AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "Add", "Addmm", "Alias", "AsStrided", "AvgPool2D",
    "Bmm", "Cat", "Clone", "Col2Im", "ConstantPadNd", "Convolution", "Copy", "CopyBackwards", "CudnnBatchNorm",
    "Div", "Expand", "Flip", "Index", "IndexSelect", "MaxPool2DWithIndices", "Mean", "Mm", "Mul", "NativeBatchNorm",
    "Neg", "Permute", "PixelShuffle", "PixelUnshuffle", "ReflectionPad2D", "Repeat", "ReplicationPad2D",
    "ReshapeAlias", "Roll", "Rsub", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "Stack", "Sub", "Sum",
    "T", "ToCopy", "Transpose", "Unbind", "UnsafeView", "Unsqueeze", "UpsampleBicubic2D", "UpsampleBilinear2D",
    "UpsampleNearest2D", "View",
}  # fmt: skip
_MODULE = "qdv_gpu.module"  # where a node of the graph says which module made it
_ACTIVE = "qdv_gpu.active"  # where that of a ReLU keeps which units were above 0


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
        return list(dict.fromkeys(node.metadata.get(_MODULE, "") for node in self.nodes))

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
        If the layer is unknown, has no maps or does not depend on the images, the network is in training mode, or, for
        modes other than "gradient", it uses something that has no rule.
    """
    module = network.module
    training = next((path for path, m in module.named_modules() if m.training), None)
    if training is not None:
        raise InputError(
            f"{network.name} is in training mode{f' ({training})' if training else ''}: call .eval() on its module"
        )
    name = network.without_call(layer)
    number = layer[len(name) + 1 :]
    (path,) = network.select([name]).values()
    outputs: list[Any] = []
    running: list[str] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        outputs.append(output)
        return output.clone() if isinstance(output, Tensor) else None  # what changes it later does not reach ours

    handle = module.get_submodule(path).register_forward_hook(keep)
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    try:
        with (
            _following(module, running),
            _Watch(running, mode),
        ):
            leaf = images.clone().requires_grad_()
            torch.func.functional_call(module, weights, (leaf.clone(),))
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError | InputError):
            raise
        raise InputError(f"{network.name} cannot take images of shape {list(images.shape[1:])}: {error}") from error
    finally:
        handle.remove()
    if not outputs:
        raise InputError(f"layer {layer} of {network.name} is not used in its forward pass")
    if len(outputs) > 1 and not number:
        calls = ", ".join(f"{layer}@{call}" for call in range(1, len(outputs) + 1))
        raise InputError(f"layer {layer} of {network.name} is used {len(outputs)} times: choose one of {calls}")
    if number and (len(outputs) == 1 or number not in map(str, range(1, len(outputs) + 1))):
        times = "once" if len(outputs) == 1 else f"{len(outputs)} times"
        raise InputError(f"layer {name} of {network.name} is used {times}, got {layer}")
    output = outputs[int(number or 1) - 1]
    if not isinstance(output, Tensor) or output.ndim != 4 or len(output) != len(images):
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(
            f"layer {layer} of {network.name} has no maps: a Deconvnet needs [B, C, h, w], got {shape}; "
            "choose a convolution, pooling or the ReLU behind one"
        )
    root, target = get_gradient_edge(output) if output.requires_grad else None, get_gradient_edge(leaf)
    nodes = _between(root.node, target.node) if root else []
    if not nodes or root is None:
        raise InputError(
            f"layer {layer} of {network.name} does not depend on the image: choose a layer between the image and "
            "the output"
        )
    record = Record(images.detach(), output, nodes, root.output_nr)
    if mode != "gradient":
        _check_rules(record, network.name, mode)
    return record


def kind(node: Any) -> str:
    """The operation of a node: "Relu" for "ReluBackward0"."""
    return node.name().rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")


def shape(node: Any, number: int = 0) -> list[int]:
    """Shape of one of the node's outputs in the forward pass."""
    return list(node._input_metadata[number].shape)


def is_relu(node: Any) -> bool:
    """Whether a node is a ReLU, written as one or as a clamp at 0."""
    if kind(node) in ("ClampMin", "Clamp"):
        least = node._saved_min
        return not isinstance(least, Tensor) and least == 0 and getattr(node, "_saved_max", None) is None
    return kind(node) == "Relu"


def is_pool(node: Any) -> bool:
    """Whether a node is our max-pooling."""
    return isinstance(getattr(node, "pool", None), Pool)


def active(node: Any) -> Tensor:
    """Which units a ReLU let pass, bool, of the output's shape."""
    kept = node.metadata.get(_ACTIVE)
    return (node._saved_result if kind(node) == "Relu" else node._saved_self) > 0 if kept is None else kept


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
                node.metadata[_ACTIVE] = result.detach() > 0  # what follows may change it in place
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                self._mark(tensor.grad_fn)
        return result

    def _mark(self, node: Any) -> None:
        unmarked = [node]
        while unmarked:
            node = unmarked.pop()
            if node is not None and _MODULE not in node.metadata:
                node.metadata[_MODULE] = self.running[-1] if self.running else ""
                unmarked += [child for child, _ in node.next_functions]


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


@contextmanager
def _following(module: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep the paths of the submodules that are running, the innermost last."""

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: running.append(path)

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for path, child in module.named_modules():
        handles += [child.register_forward_pre_hook(enter(path)), child.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _between(root: Any, leaf: Any) -> list[Any]:
    """The nodes that lead from root to leaf, each behind all that lead to it; none if the leaf is not reached."""
    leads = {leaf: True}
    order = [leaf]
    stack = [(root, False)]
    while stack:
        node, children_done = stack.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        if children_done:
            leads[node] = any(leads[child] for child in children)
            order += [node] * leads[node]
        elif node not in leads:
            leads[node] = False
            stack += [(node, True), *((child, False) for child in children)]
    return order[::-1] if leads[root] else []


def _check_rules(record: Record, network: str, mode: str) -> None:
    """Refuse what is neither linear in the image nor has a rule, rather than take its plain gradient."""
    inner = set(record.nodes)
    unknown: list[tuple[str, Any]] = []
    products: list[tuple[str, Any]] = []
    for node in record.nodes:
        name = kind(node)
        depends = [child in inner for child, _ in node.next_functions]
        if not (name in LINEAR or is_relu(node) or is_pool(node) or name == "_SkippedNormalisation"):
            unknown.append((name, node))
        elif name in ("NativeBatchNorm", "CudnnBatchNorm") and node._saved_training:
            unknown.append((f"{name} with the statistics of the image itself", node))
        elif (name in ("Mul", "Mm", "Bmm") and all(depends)) or (
            name in ("Addmm", "Div", "Convolution", "NativeBatchNorm", "CudnnBatchNorm")
            and any(depends[2 if name == "Addmm" else 1 :])
            and (name != "Addmm" or depends[1])
        ):
            products.append((f"the product or quotient of two signals ({name})", node))
    for what, node in unknown + products:
        raise InputError(
            f"a Deconvnet has no rule for {what}, which module {node.metadata.get(_MODULE) or network} of {network} "
            f"uses: choose a layer before it, a network with ReLUs, or mode gradient instead of {mode}"
        )
