"""Layers of transformers: many tokens for each image, of which one row is made."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt, prod

from torch import Tensor, nn

from qdv_gpu.errors import InputError, check_among, check_flag
from qdv_gpu.networks.layers import numbered, trace_calls
from qdv_gpu.networks.network import Network

TOKENS = ("auto", "cls", "mean", "all")


def check_tokens(tokens: str) -> None:
    """Raise InputError unless `tokens` is one of TOKENS."""
    check_among("value of tokens", tokens, TOKENS)


def reduction(network: Network, shape: tuple[int, ...], tokens: str = "auto") -> str | None:
    """How an output of `shape`, without batch, becomes one row: "cls", "mean" or "all"; None if it has no tokens.

    An output [T, C] is of tokens if C is the width that some linear layer or normalisation of the network takes.

    Parameters
    ----------
    tokens : {"auto", "cls", "mean", "all"}
        "auto" is the class token where the network has one, and else the mean.

    Raises
    ------
    InputError
        If the class token is asked for and there is none.
    """
    if len(shape) != 2 or shape[1] not in token_widths(network.module):
        return None
    there = prefix(network, shape[0]) > 0 and network.class_token
    if tokens == "cls" and not there:
        raise InputError(f"{network.name} has no class token, or not in every layer: tokens must be mean or all")
    return tokens if tokens != "auto" else "cls" if there else "mean"


def reduced(network: Network, output: Tensor, kind: str | None) -> Tensor:
    """Tokens [B, T, C] as rows [B, C] of "cls", the first, or "mean", of those that stand for a part of the image.

    Other outputs, and tokens of "all", are left as they are.
    """
    if kind == "cls":
        return output[:, 0]
    return output[:, prefix(network, output.shape[1]) :].mean(dim=1) if kind == "mean" else output


def prefix(network: Network, count: int) -> int:
    """How many of a layer's tokens stand for no part of the image: class token and registers.

    A square number of tokens is of the parts of a square image alone: some networks add the class token late.
    """
    said = getattr(network.module, "num_prefix_tokens", None)  # timm's
    before = said if isinstance(said, int) else int(network.class_token)
    return 0 if isqrt(count) ** 2 == count else before


def token_widths(module: nn.Module) -> set[int]:
    """The widths that linear layers and normalisations of a network take."""
    widths = {m.in_features for m in module.modules() if isinstance(m, nn.Linear)}
    shapes = (getattr(m, "normalized_shape", None) for m in module.modules())
    return widths | {shape[-1] for shape in shapes if isinstance(shape, tuple) and shape}


@dataclass(frozen=True)
class LayerShape:
    """A layer: name, module path, class of the module, shape without batch, and what is taken of its tokens."""

    layer: str
    path: str
    kind: str
    shape: tuple[int, ...]
    tokens: str | None

    @property
    def features(self) -> int:
        """Numbers that an image has there."""
        return self.shape[-1] if self.tokens in ("cls", "mean") else prod(self.shape)


def describe_layers(
    network: Network, image_size: int | None = None, *, tokens: str = "auto", every: bool = False
) -> list[LayerShape]:
    """The default layers of a network, or every module that gives a tensor, in the order of their calls.

    Raises
    ------
    InputError
        If the network cannot take images of that size, or `tokens` is not allowed or not to be had.

    Examples
    --------
    >>> from qdv_gpu.networks.load import load_network
    >>> [(row.layer, row.features) for row in describe_layers(load_network("resnet18=none"))][-1]
    ('layer4', 25088)
    """
    check_tokens(tokens)
    check_flag("every", every)
    calls = trace_calls(network, image_size)
    names = {path: path for path in dict.fromkeys(call.path for call in calls)} if every else network.layers

    def rows() -> Iterator[LayerShape]:
        seen = Counter[str]()
        total = Counter(call.path for call in calls)
        for call in calls:
            seen[call.path] += 1
            for layer in [name for name, path in names.items() if path == call.path and call.output]:
                name = numbered(layer, total[call.path])[seen[call.path] - 1]
                shape = call.output or ()
                kind = type(network.module.get_submodule(call.path)).__name__
                yield LayerShape(str(name), call.path, kind, shape, reduction(network, shape, tokens))

    return list(rows())
