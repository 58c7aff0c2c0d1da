"""Weights of a file put into a module, whatever stands before their names; heads for another number of classes."""

import logging
from collections import Counter
from pathlib import Path

from torch import nn

from qdv_gpu.errors import InputError
from qdv_gpu.networks.build import AUXILIARY
from qdv_gpu.networks.weights import Tensors

logger = logging.getLogger(__name__)
ALEXNETS = ("alexnet", "caffe_alexnet")
COUNTER = "num_batches_tracked"  # of a batch norm, which old files lack and no evaluation uses


def load_state(module: nn.Module, state: Tensors, name: str, source: str | Path, *, shared: bool) -> None:
    """Load a state dict into the network of that name, with the head that it holds.

    Parameters
    ----------
    shared : bool
        Whether somebody else holds the module's weights, which are then replaced and not written into.

    Raises
    ------
    InputError
        If the file lacks a tensor, has one too many, of another shape, or integers for floating-point numbers.
    """
    if name in AUXILIARY:
        for side in [side for side in module._modules if side.lower().startswith("aux")]:
            setattr(module, side, None)
        setattr(module, "aux_logits", False)  # noqa: B010 (mypy takes a plain assignment for a submodule)
    state = _without_prefix(state, list(module.state_dict()), source)
    if name in AUXILIARY:
        state = {name: tensor for name, tensor in state.items() if not name.lower().startswith("aux")}
    head = head_path(module)
    for path in ("classifier", head):  # "classifier" alone is AlexNet's head after fine-tuning
        weight = state.get(f"{path}.weight")
        if weight is not None and weight.ndim and weight.shape[0] != head_classes(module):
            replace_head(module, name, weight.shape[0])
    own = module.state_dict()
    state = {**{key: own[key] for key in own if key.endswith(COUNTER)}, **state}
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misfits = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    whole = sorted(
        key for key in own.keys() & state.keys() if own[key].is_floating_point() and not state[key].is_floating_point()
    )
    problems = (("lacks", missing), ("has no place for", surplus), ("has another shape of", misfits),
                ("has integers in the place of", whole))  # fmt: skip
    for problem, names in problems:
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"weights {source} do not fit {name}: the file {problem} {names[0]}{more}")
    # Somebody else's weights are replaced: to copy into them would change them for their owner too.
    fitting = {key: tensor.to(own[key].dtype) for key, tensor in state.items()}
    module.load_state_dict(fitting, assign=shared)


def _without_prefix(state: Tensors, own: list[str], source: str | Path) -> Tensors:
    """The tensors that the network has names for, without what wrappers put before these, as Lightning's "model."."""
    ends = {key.rpartition(".")[2] for key in own}
    known = set(own)
    prefixes = Counter(
        key[: len(key) - len(tail)]
        for key in state
        if key.rpartition(".")[2] in ends
        for tail in _tails(key)
        if tail in known
    )
    if not prefixes or prefixes[""] == max(prefixes.values()):
        return state
    prefix, count = prefixes.most_common(1)[0]
    others = [one for one, found in prefixes.items() if found == count and one != prefix]
    taken = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    left = len(state) - len(taken)
    logger.info(
        "%s: %r is taken off the names of its tensors%s", source, prefix, f"; {left} others are left out" * bool(left)
    )
    if others:
        logger.warning("%s holds several networks: %r is taken, not %s", source, prefix, ", ".join(map(repr, others)))
    return taken


def _tails(key: str) -> list[str]:
    """A dotted name without its first 0, 1, 2, ... parts."""
    parts = key.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def head_path(module: nn.Module) -> str:
    """Path of the layer that gives the logits: the last linear one, or the last convolution (SqueezeNet)."""
    for kind in (nn.Linear, nn.Conv2d):
        paths = [path for path, child in module.named_modules() if isinstance(child, kind)]
        if paths:
            return paths[-1]
    raise InputError("the network has no linear or convolutional layer to use as its head")


def head_classes(module: nn.Module) -> int:
    """Number of logits that the head gives."""
    head = module.get_submodule(head_path(module))
    return head.out_features if isinstance(head, nn.Linear) else head.out_channels  # type: ignore[return-value]  # one of the two


def head_prefix(module: nn.Module, name: str) -> str:
    """What the names of the tensors of a network's head begin with, as `replace_head` puts one there."""
    path = "classifier" if name in ALEXNETS else head_path(module)
    return f"{path}." if path else ""


def replace_head(module: nn.Module, name: str, num_classes: int) -> None:
    """Put a new head for that many classes in the place of a network's; AlexNet's is the paper's, one linear layer."""
    if name in ALEXNETS:
        first = next(m for m in module.get_submodule("classifier").modules() if isinstance(m, nn.Linear))
        module.classifier = nn.Linear(first.in_features, num_classes)
        return
    path = head_path(module)
    if not path:
        raise InputError(
            f"the network is a {type(module).__name__} alone: a network with a layer as its head is required"
        )
    old = module.get_submodule(path)
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    else:
        assert isinstance(old, nn.Conv2d)
        size, stride, padding = old.kernel_size, old.stride, old.padding
        new = nn.Conv2d(old.in_channels, num_classes, size, stride, padding)  # type: ignore[arg-type]  # pairs
    module.set_submodule(path, new)
