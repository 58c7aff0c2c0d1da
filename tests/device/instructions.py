"""Reads lines of PTX: each becomes a function of the threads that do it."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import arithmetic
from .memory import Fault

DTYPES = {
    "pred": np.dtype(bool),
    **{f"u{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"b{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
}
ALL = slice(None)  # of the threads
KINDS = {"bra": "branch", "ret": "exit", "exit": "exit", "bar": "barrier", "shfl": "shuffle"}


@dataclass
class Instruction:
    """A line of PTX.

    `run(threads, which)` does it; `guard` is the predicate that it depends on, negated with `unless`. `kind` is
    "plain", or says what the threads do other than go on: "branch" (to instruction `target`), "exit", "barrier" or
    "shuffle".
    """

    text: str
    guard: str | None
    unless: bool
    kind: str
    run: Any
    target: int


def decode(text, labels, targets):
    """The instruction of a line; NotImplementedError if it is not known.

    Parameters
    ----------
    text : str
    labels : dict of str to int
        Where variables lie in shared or local memory.
    targets : dict of str to int
        The number of the instruction after each label of the code.
    """
    match = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*?);", text)
    if not match:
        raise NotImplementedError(text)
    name, *parts = match[3].split(".")
    operands = [operand.replace(" ", "") for operand in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s|]+", match[4])]
    kind, target, run = KINDS.get(name, "plain"), 0, None
    try:
        if kind == "branch":
            target = targets[operands[-1]]
        elif kind == "barrier":
            if (parts, operands) != (["sync"], ["0"]):
                raise KeyError("only bar.sync 0")
        elif kind != "exit":
            run = MAKERS.get(name, arithmetic_instruction)(name, parts, operands, labels)
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        raise NotImplementedError(f"{text} ({error})") from None
    if match[2] and kind in ("barrier", "shuffle"):
        raise NotImplementedError(text)
    return Instruction(text, match[2], match[1] == "!", kind, run, target)


def operand(text, dtype, labels):
    """A function of (threads, which) that gives an operand: an array, or a numpy scalar."""
    if text in labels:
        constant = dtype.type(labels[text])
    elif text.startswith("%"):
        return lambda threads, which: threads.read(text, dtype, which)
    elif text.startswith("0f"):
        constant = np.uint32(int(text[2:], 16)).view(np.float32)
    elif text.startswith("0d"):
        constant = np.uint64(int(text[2:], 16)).view(np.float64)
    else:
        constant = np.array(int(text, 0) % 2 ** (8 * dtype.itemsize)).astype(f"u{dtype.itemsize}").view(dtype)[()]
    if constant.dtype != dtype:
        constant = constant.view(dtype)
    return lambda threads, which: constant


def arithmetic_instruction(name, parts, operands, labels):
    *modifiers, kind = parts
    dtype = DTYPES[kind]
    compute = arithmetic.function(name, dtype, modifiers)
    others = {"shl": (1,), "shr": (1,), "bfi": (2, 3)}.get(name, ())  # shifts and positions are of 32 bits
    widened = {2: arithmetic.DOUBLE_WIDTH[dtype]} if name == "mad" and "wide" in modifiers else {}
    into, *sources = operands
    reads = [
        operand(source, DTYPES["u32"] if i in others else widened.get(i, dtype), labels)
        for i, source in enumerate(sources)
    ]
    return lambda threads, which: threads.write(into, compute(*(read(threads, which) for read in reads)), which)


def move(name, parts, operands, labels):
    """mov and cvta, also of several registers into one that is as wide as all, and back."""
    dtype = DTYPES[parts[-1]]
    into, source = operands
    if source.startswith("{"):
        pieces = registers(source)
        piece = np.dtype(f"u{dtype.itemsize // len(pieces)}")

        def pack(threads, which):
            threads.write(
                into, np.stack([threads.read(r, piece, which) for r in pieces], axis=-1).view(dtype)[:, 0], which
            )

        return pack
    read = operand(source, dtype, labels)
    if into.startswith("{"):
        pieces = registers(into)
        piece = np.dtype(f"u{dtype.itemsize // len(pieces)}")

        def unpack(threads, which):
            values = np.ascontiguousarray(read(threads, which))[:, None].view(piece)
            for i, register in enumerate(pieces):
                threads.write(register, values[:, i].copy(), which)

        return unpack
    return lambda threads, which: threads.write(into, read(threads, which).copy(), which)


def to_global(name, parts, operands, labels):
    if parts != ["to", "global", "u64"]:
        raise KeyError(parts)
    return move("mov", parts, operands, labels)


def convert(name, parts, operands, labels):
    *modifiers, to, source = parts
    change = arithmetic.conversion(DTYPES[to], DTYPES[source], modifiers)
    read = operand(operands[1], DTYPES[source], labels)
    return lambda threads, which: threads.write(operands[0], change(read(threads, which)), which)


def compare(name, parts, operands, labels):
    how, *modifiers, kind = parts
    if set(modifiers) - {"ftz"}:
        raise KeyError(modifiers)
    into, a, b = operands
    compared = arithmetic.comparison(how, ftz=bool(modifiers))
    a, b = operand(a, DTYPES[kind], labels), operand(b, DTYPES[kind], labels)
    return lambda threads, which: threads.write(into, compared(a(threads, which), b(threads, which)), which)


def select(name, parts, operands, labels):
    (kind,) = parts
    into, a, b, condition = operands
    a, b = operand(a, DTYPES[kind], labels), operand(b, DTYPES[kind], labels)
    condition = operand(condition, DTYPES["pred"], labels)

    return lambda threads, which: threads.write(
        into, np.where(condition(threads, which), a(threads, which), b(threads, which)), which
    )


def access(name, parts, operands, labels):
    """ld and st; a vector's elements are accessed one after the other, once the whole is found aligned."""
    space, *modifiers, kind = [part for part in parts if part != "volatile"]
    names, place = operands if name == "ld" else operands[::-1]
    names = registers(names)
    base, _, offset = place[1:-1].partition("+")
    dtype = DTYPES[kind]
    if space == "param":
        (into,) = names
        return lambda threads, which: threads.write(into, threads.values[base], which)
    if space not in ("global", "shared", "local") or set(modifiers) - {"nc", f"v{len(names)}"}:
        raise KeyError(space, modifiers)
    address = operand(base, DTYPES["u32"] if space == "shared" else DTYPES["u64"], labels)
    shift, size = int(offset or 0), len(names) * dtype.itemsize
    values = [operand(value, dtype, labels) for value in names]

    def go(threads, which):
        at = np.broadcast_to(address(threads, which), threads.who[which].shape).astype(np.uint64)
        at = at + np.uint64(shift % 2**64)
        if (odd := at % np.uint64(size) != 0).any():
            raise Fault(f"misaligned access of {size} bytes at {int(at[odd][0]):#x}")
        for i, register in enumerate(names):
            where = at + np.uint64(i * dtype.itemsize)
            if name == "ld":
                threads.write(register, load(threads, which, where), which)
            else:
                store(threads, which, where, np.broadcast_to(values[i](threads, which), where.shape))

    def load(threads, which, where):
        if space == "global":
            return threads.seen.load(where, dtype, threads.who[which], constant="nc" in modifiers)
        memory, row = (threads.shared, threads.row) if space == "shared" else (threads.local, threads.slot)
        return memory.load(row[which], where.astype(np.int64), dtype, threads.who[which])

    def store(threads, which, where, given):
        if space == "global":
            return threads.seen.store(where, given, threads.who[which])
        memory, row = (threads.shared, threads.row) if space == "shared" else (threads.local, threads.slot)
        return memory.store(row[which], where.astype(np.int64), given, threads.who[which])

    return go


def add_atomically(name, parts, operands, labels):
    """atom and red, of integers. The register that gets the value before stays unwritten: it depends on the order."""
    space, how, kind = parts
    dtype = DTYPES[kind]
    if (space, how) != ("global", "add") or dtype.kind == "f":
        raise KeyError(parts)
    base, _, offset = operands[-2][1:-1].partition("+")
    address, value, shift = operand(base, DTYPES["u64"], labels), operand(operands[-1], dtype, labels), int(offset or 0)

    def go(threads, which):
        who = threads.who[which]
        at = np.broadcast_to(address(threads, which), who.shape).astype(np.uint64) + np.uint64(shift % 2**64)
        if (odd := at % np.uint64(dtype.itemsize) != 0).any():
            raise Fault(f"misaligned addition of {dtype.itemsize} bytes at {int(at[odd][0]):#x}")
        threads.seen.add(at, np.broadcast_to(value(threads, which), who.shape), who)

    return go


def shuffle(name, parts, operands, labels):
    """shfl.sync, done by those threads all of whose mask's lanes are there; `run` gives their numbers."""
    _, how, _ = parts
    into, *valid = operands[: len(operands) - 4]
    value, lane, clamp, mask = (operand(text, DTYPES["u32"], labels) for text in operands[-4:])

    def go(threads, here):
        def wide(read):
            return np.broadcast_to(read(threads, here), len(here)).astype(np.int64)

        warp, own = threads.warp[here], threads.lane[here]
        by, limits, members = wide(lane), wide(clamp), wide(mask)
        at = np.full((warp.max() + 1, 32), -1)  # where in `here` a lane is
        at[warp, own] = np.arange(len(here))
        present = (at >= 0) @ (1 << np.arange(32))
        ready = members & ~present[warp] == 0
        if not ready.any():
            return here[ready]
        if (members >> own & 1 == 0)[ready].any():
            raise Fault("a thread is not in its own mask")
        segment = limits >> 8 & 31
        lowest, highest = own & segment, (own & segment) | (limits & 31 & ~segment)
        source = {"up": own - by, "down": own + by, "bfly": own ^ by, "idx": lowest | (by & 31 & ~segment)}[how]
        inside = source >= highest if how == "up" else source <= highest
        source = np.where(inside, source, own)
        if (members >> source & 1 == 0)[ready].any():
            raise Fault("reads a lane that is not in the mask")
        found = value(threads, here)[at[warp, source]]
        which = ALL if len(ready) == len(threads.who) and ready.all() else here[ready]
        threads.write(into, found[ready], which)
        for predicate in valid:
            threads.write(predicate, inside[ready], which)
        return here[ready]

    return go


def registers(text):
    return text.strip("{}").split(",")


MAKERS = {
    "mov": move,
    "cvta": to_global,
    "cvt": convert,
    "setp": compare,
    "selp": select,
    "ld": access,
    "st": access,
    "atom": add_atomically,
    "red": add_atomically,
    "shfl": shuffle,
}
