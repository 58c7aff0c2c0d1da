"""The grammar of a network's name: `[LABEL=]NAME[(key=value, ...)][=CHECKPOINT]`."""

import ast
from dataclasses import dataclass, field
from typing import Any

from qdv_gpu.errors import InputError
from qdv_gpu.networks.build import is_name


@dataclass(frozen=True)
class Spec:
    """What a network's name says.

    Attributes
    ----------
    name : str
        A torchvision classifier, "caffe_alexnet", "zfnet", "timm:MODEL" or "package.module:factory".
    arguments : dict
        What it is built with.
    checkpoint : str
        A file or folder of weights, "imagenet", "none", or "" if nothing is said.
    label : str
        What it is called in tables and figures; "" if nothing is said.

    Examples
    --------
    >>> spec = Spec.parse("mine=resnet18(width_per_group=128)=best.pt")
    >>> spec.label, spec.built, spec.checkpoint
    ('mine', 'resnet18(width_per_group=128)', 'best.pt')
    >>> Spec.parse("resnet18=lr=0.1.pt").checkpoint, Spec.parse("wide=resnet18").name
    ('lr=0.1.pt', 'resnet18')
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    label: str = ""

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """Read a name; a first part that is no network's name is a label if the next part is one.

        Raises
        ------
        InputError
            If it is empty, or the arguments are not `key=value` with Python literals as values.
        """
        head, rest = _cut(text)
        label = ""
        if rest and not is_name(_base(head)):
            second, checkpoint = _cut(rest)
            if is_name(_base(second)):
                label, head, rest = head.strip(), second, checkpoint
        name, arguments = _called(head.strip())
        if not name:
            raise InputError(f"a network's name is required, got {text!r}")
        return cls(name, arguments, rest, label)

    @property
    def built(self) -> str:
        """Name and arguments: what of it decides the module."""
        inside = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        return f"{self.name}({inside})" if inside else self.name


def split_outside(text: str, mark: str, count: int = -1) -> list[str]:
    """Split a text at a mark where it is in no brackets and no quotes, at most so often.

    >>> split_outside("resnet18(a=1, b='x,y'),best.pt", ",")
    ["resnet18(a=1, b='x,y')", 'best.pt']
    """
    parts: list[str] = []
    depth, quote, start = 0, "", 0
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote and text[i - 1] != "\\" else quote
        elif letter in "'\"" and depth:
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == mark and depth == 0 and len(parts) != count:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _cut(text: str) -> tuple[str, str]:
    """Before and behind the first "=" that is in no brackets and no quotes."""
    head, *rest = split_outside(text, "=", 1)
    return head, "".join(rest)


def _base(text: str) -> str:
    """The name without arguments."""
    return text.strip().partition("(")[0].strip()


def _called(text: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of `name(key=value, ...)`."""
    name, bracket, inside = text.partition("(")
    if not bracket:
        return text, {}
    try:
        call = ast.parse(f"call({inside}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        arguments = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords if one.arg is not None}
        if len(arguments) < len(call.keywords):
            raise ValueError
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise InputError(
            f"arguments of a network are key=value with Python literals, as in resnet18(num_classes=10), got {text}"
        ) from None
    return name.strip(), arguments
