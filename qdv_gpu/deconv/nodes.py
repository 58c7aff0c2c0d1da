"""The only reader of autograd's nodes: what they are, what they lead to, and what they have kept."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qdv_gpu.deconv.unpool import Pool

_MODULE = "qdv_gpu.module"  # where a node says which module made it
_ACTIVE = "qdv_gpu.active"  # where that of a ReLU keeps which units were above 0


def kind(node: Any) -> str:
    """The operation of a node: "Relu" for "ReluBackward0"."""
    return node.name().rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")


def shape(node: Any, number: int = 0) -> list[int]:
    """Shape of one of the node's outputs in the forward pass."""
    return list(node._input_metadata[number].shape)


def outputs(node: Any) -> int:
    """How many outputs the node had."""
    return len(node._input_metadata)


def children(node: Any) -> Sequence[tuple[Any, int]]:
    """The nodes that the node's inputs came from, None for what is no variable, and which of their outputs."""
    return node.next_functions


def saved(node: Any, name: str, default: Any = None) -> Any:
    """What the node has kept for its gradient under that name."""
    return getattr(node, f"_saved_{name}", default)


def module_of(node: Any) -> str:
    """Path of the module that made the node."""
    return node.metadata.get(_MODULE, "")


def mark(node: Any, path: str) -> None:
    """Note the module that made a node, and all behind it that have no note."""
    unmarked = [node]
    while unmarked:
        node = unmarked.pop()
        if node is not None and _MODULE not in node.metadata:
            node.metadata[_MODULE] = path
            unmarked += [child for child, _ in children(node)]


def is_relu(node: Any) -> bool:
    """Whether a node is a ReLU, written as one or as a clamp at 0."""
    if kind(node) in ("ClampMin", "Clamp"):
        least = saved(node, "min")
        return not isinstance(least, Tensor) and least == 0 and saved(node, "max") is None
    return kind(node) == "Relu"


def is_pool(node: Any) -> bool:
    """Whether a node is our max-pooling."""
    return isinstance(getattr(node, "pool", None), Pool)


def keep_active(node: Any, passed: Tensor) -> None:
    """Note which units a ReLU let pass, bool: what follows may change its output in place."""
    node.metadata[_ACTIVE] = passed


def active(node: Any) -> Tensor:
    """Which units a ReLU let pass, bool, of the output's shape."""
    kept = node.metadata.get(_ACTIVE)
    if kept is not None:
        return kept
    return (saved(node, "result") if kind(node) == "Relu" else saved(node, "self")) > 0


def between(root: Any, leaf: Any) -> list[Any]:
    """The nodes that lead from root to leaf, each behind all that lead to it; none if the leaf is not reached."""
    leads = {leaf: True}
    order = [leaf]
    stack = [(root, False)]
    while stack:
        node, children_done = stack.pop()
        inputs = [child for child, _ in children(node) if child is not None]
        if children_done:
            leads[node] = any(leads[child] for child in inputs)
            order += [node] * leads[node]
        elif node not in leads:
            leads[node] = False
            stack += [(node, True), *((child, False) for child in inputs)]
    return order[::-1] if leads[root] else []
