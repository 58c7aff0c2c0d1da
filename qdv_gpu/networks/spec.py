"""The grammar of a network's name: `[LABEL=]NAME[(key=value, ...)][ "[" EDIT, ... "]" ][=CHECKPOINT]`."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qdv_gpu.errors import InputError, check_among, short, unknown
from qdv_gpu.networks.build import is_name

CARRY = ("fresh", "crop", "resample")  # what becomes of a tensor whose shape an edit changes
WHOLE = ("activation", "norm", "pooling", "width", "zf")  # edits of a whole network
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")  # a text that needs no quotes


@dataclass(frozen=True)
class Spec:
    """What a network's name says.

    Attributes
    ----------
    name : str
        A torchvision classifier, "caffe_alexnet", "zfnet", "timm:MODEL" or "package.module:factory".
    arguments : dict
        What it is built with.
    edits : dict
        What is changed in it, in order: "PATH.ARGUMENT", "PATH.depth", or one of WHOLE, to its value.
    carry : {"fresh", "crop", "resample"}
        What becomes of a tensor whose shape an edit changes.
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
    >>> Spec.parse("alexnet[ features.0.stride = 2, activation='gelu', zf ]=runs/a").built
    'alexnet[features.0.stride=2, activation=gelu, zf]'
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    label: str = ""
    edits: dict[str, Any] = field(default_factory=dict)
    carry: str = CARRY[0]

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """Read a name; a first part is a label if a network follows, and it names none or a checkpoint follows too.

        Raises
        ------
        InputError
            If it is empty, the arguments are not `key=value` with Python literals as values, or an edit is not
            `PATH.ARGUMENT=VALUE`, one of WHOLE or carry.
        """
        head, rest = _cut(text)
        label = ""
        if rest:
            second, checkpoint = _cut(rest)
            if is_name(_base(second)) and (checkpoint or not is_name(_base(head))):
                label, head, rest = head.strip(), second, checkpoint
        head, *inside = split_outside(head.strip(), "[", 1)
        edits, carry = _read_edits(inside[0], text) if inside else ({}, CARRY[0])
        name, arguments = _called(head.strip())
        if not name:
            raise InputError(f"a network's name is required, got {short(text)}")
        return cls(name, arguments, rest, label, edits, carry)

    @property
    def base(self) -> str:
        """Name and arguments, without what is changed."""
        inside = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        return f"{self.name}({inside})" if inside else self.name

    @property
    def structure(self) -> str:
        """Name, arguments and edits: what of it decides the module."""
        return replace(self, carry=CARRY[0]).built

    @property
    def built(self) -> str:
        """Name, arguments, edits and carry, in one form."""
        parts = ["zf" if key == "zf" else f"{key}={_written(value)}" for key, value in self.edits.items()]
        if self.edits and self.carry != CARRY[0]:
            parts.append(f"carry={self.carry}")
        return f"{self.base}[{', '.join(parts)}]" if parts else self.base

    @property
    def short(self) -> str:
        """The same without package or library."""
        return self.built[self.name.rfind(":") + 1 :] or self.built

    def __str__(self) -> str:
        marked = [part for part in (self.label, self.built, self.checkpoint) if part]
        return "=".join(marked)


def flat_edits(edits: Any) -> dict[str, Any]:
    """Edits, checked and by one name each, of {path: {argument: value}} and those of a whole network.

    Raises
    ------
    InputError
        If one is unknown, given twice, or has a value that is no Python literal.

    >>> flat_edits({"features.0": {"kernel_size": 7, "stride": 2}, "width": 0.5})
    {'features.0.kernel_size': 7, 'features.0.stride': 2, 'width': 0.5}
    """
    if not isinstance(edits, Mapping):
        raise InputError(f"edits must be a dict of paths to arguments and values, got {short(edits)}")
    flat: dict[str, Any] = {}
    for key, value in edits.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        for argument, setting in inner:
            name = f"{key}.{argument}" if argument else str(key)
            if name in flat:
                raise InputError(f"edit {name} is given twice")
            flat[name] = _checked(name, setting)
    return flat


def check_carry(carry: Any) -> str:
    """One of CARRY; InputError if it is not."""
    check_among("value of carry", carry, CARRY, alike=0)
    return str(carry)


def _checked(name: str, value: Any) -> Any:
    """The value of an edit."""
    path, dot, argument = name.rpartition(".")
    if not dot and name not in WHOLE:
        raise unknown("edit", name, [*WHOLE, "carry", "PATH.ARGUMENT"], alike=0)
    if dot and (not path or not argument.isidentifier()):
        raise InputError(f"an edit of a module is PATH.ARGUMENT=VALUE, got {name}")
    if name == "zf" and value is not True:
        raise InputError(f"the edit zf takes no value, got {short(value)}")
    try:
        if ast.literal_eval(repr(value)) == value:
            return value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    raise InputError(f"the value of {name} must be a Python literal or a word, got {short(value)}")


def _read_edits(inside: str, text: str) -> tuple[dict[str, Any], str]:
    """Edits, and what becomes of tensors, of what stands behind the first bracket."""
    inside = inside.rstrip()
    if not inside.endswith("]") or not inside[:-1].strip():
        raise InputError(f"edits of a network are [PATH.ARGUMENT=VALUE, ...], got {text}")
    edits: dict[str, Any] = {}
    carry = ""
    for part in split_outside(inside[:-1], ",", quotes=True):
        key, mark, written = (one.strip() for one in part.partition("="))
        if key == "carry" and not carry:
            carry = check_carry(_value(key, written))
        elif key in edits or key == "carry":
            raise InputError(f"edit {key} is given twice in {text}")
        elif key == "zf" and not mark:
            edits[key] = True
        elif not mark:
            raise unknown("edit", key, [*WHOLE, "carry", "PATH.ARGUMENT=VALUE"], alike=0)
        else:
            edits[key] = _checked(key, _value(key, written))
    return edits, carry or CARRY[0]


def _value(key: str, written: str) -> Any:
    """A Python literal, or a bare word as a text."""
    try:
        return ast.literal_eval(written)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        if _WORD.fullmatch(written):
            return written
        raise InputError(f"the value of {key} must be a Python literal or a word, got {short(written)}") from None


def _written(value: Any) -> str:
    """A value as it is read again."""
    if isinstance(value, str) and _WORD.fullmatch(value) and value not in ("True", "False", "None"):
        return value
    return repr(value)


def split_outside(text: str, mark: str, count: int = -1, *, quotes: bool = False) -> list[str]:
    """Split a text at a mark where it is in no brackets and no quotes, at most so often.

    Quotes count within brackets, and with `quotes` everywhere: a file's name may hold one.

    >>> split_outside("resnet18(a=1, b='x,y'),best.pt", ",")
    ["resnet18(a=1, b='x,y')", 'best.pt']
    """
    parts: list[str] = []
    depth, quote, start = 0, "", 0
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote and text[i - 1] != "\\" else quote
        elif letter in "'\"" and (depth or quotes):
            quote = letter
        elif letter == mark and depth == 0 and len(parts) != count:
            parts.append(text[start:i])
            start = i + 1
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
    return [*parts, text[start:]]


def _cut(text: str) -> tuple[str, str]:
    """Before and behind the first "=" that is in no brackets and no quotes."""
    head, *rest = split_outside(text, "=", 1)
    return head, "".join(rest)


def _base(text: str) -> str:
    """The name without arguments and edits."""
    return re.split(r"[(\[]", text, maxsplit=1)[0].strip()


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
