"""What a variant changes: its tensors, sizes, receptive fields and operations, beside those of its base."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

from qdv_gpu.errors import InputError
from qdv_gpu.networks.blank import on_meta
from qdv_gpu.networks.fields import ACTIVATED, POOLED, Grid, Pass, Pooled, pass_of
from qdv_gpu.networks.fit import head_path
from qdv_gpu.networks.network import Base, Network, check_network
from qdv_gpu.networks.spec import Spec

SHOWN = 24  # tensors that are listed one by one
Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorChange:
    """A tensor of a variant: its name, "kept", "resized", "fresh" or "trained", and shapes in the base and in it."""

    name: str
    state: str
    before: Shape | None
    after: Shape


@dataclass(frozen=True)
class LayerChange:
    """A default layer of a variant, with its grids in the base and in it; None where there is none."""

    layer: str
    before: Grid | None
    after: Grid | None


@dataclass(frozen=True)
class Changes:
    """What a variant is beside its base, for images of one size.

    Attributes
    ----------
    variant, base : str
    image_size : int
    tensors : tuple of TensorChange
    dropped : tuple of str
        Tensors of the base that the variant has no place for.
    share : float
        Of the variant's parameters, those of kept tensors.
    layers : tuple of LayerChange
    gmac : tuple of float or None
        10^9 multiplications with their additions, for one image, before and after; None if that is not known.
    warnings : tuple of str
    notes : tuple of str
        What is not known, and why.
    """

    variant: str
    base: str
    image_size: int
    tensors: tuple[TensorChange, ...]
    dropped: tuple[str, ...]
    share: float
    layers: tuple[LayerChange, ...]
    gmac: tuple[float | None, float | None]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """All of it as text: networks with many tensors have only those listed that are not kept, and of these some."""
        counts = Counter(one.state for one in self.tensors)
        listed = [one for one in self.tensors if len(self.tensors) <= SHOWN or one.state not in ("kept", "trained")]
        left = Counter(one.state for one in self.tensors) - Counter(one.state for one in listed[:SHOWN])
        rows = [(one.name, one.state, f"{_x(one.before)} -> {_x(one.after)}" if one.before != one.after
                 else _x(one.after)) for one in listed[:SHOWN]]  # fmt: skip
        more = [", ".join(f"{number} {state}" for state, number in left.items()) + ", not listed"] if left else []
        if self.dropped:
            more.append(f"{len(self.dropped)} of the base's tensors are dropped: {_some(self.dropped)}")
        kinds = ", ".join(f"{counts[state]} {state}" for state in ("resized", "fresh", "trained") if counts[state])
        total = f"{counts['kept']} of {len(self.tensors)} tensors kept" + (f" ({kinds})" if kinds else "")
        grids = [(one.layer, *map(_changed, _grid(one.before), _grid(one.after))) for one in self.layers]
        cost = " -> ".join("unknown" if one is None else _digits(one) for one in self.gmac)
        return [
            f"{self.variant} beside {self.base}, at {self.image_size} px",
            *(_columns([("tensor", "", "shape"), *rows]) if rows else []), *more,
            f"{total}, {self.share:.1%} of the parameters",
            *(_columns([("layer", "size", "stride", "receptive field"), *grids]) if grids else []),
            f"{cost} GMAC",
            *(f"warning: {one}" for one in self.warnings), *(f"note: {one}" for one in self.notes),
        ]  # fmt: skip


def describe_variant(network: Network, image_size: int | None = None) -> Changes:
    """Say what a variant changes, from a pass on the meta device, where there are shapes and no numbers.

    Raises
    ------
    InputError
        If the network is no variant.

    Examples
    --------
    >>> from qdv_gpu.networks.load import load_network
    >>> changes = describe_variant(load_network("alexnet[features.0.kernel_size=7, features.0.stride=2]=none"))
    >>> sum(tensor.state == "kept" for tensor in changes.tensors), len(changes.tensors)
    (15, 16)
    >>> changes.warnings
    ('avgpool pools 13 x 13 to 6 x 6, where it was 6 x 6: the weights behind it fit, but what they get has changed',)
    """
    check_network(network)
    base = network.base
    if base is None:
        raise InputError(f"{network.name} is no variant: it has no edits")
    sized = network.at_size(image_size)
    tensors = tuple(_tensors(network, base))
    parameters = {name: parameter.numel() for name, parameter in network.module.named_parameters()}
    kept = sum(parameters.get(one.name, 0) for one in tensors if one.state == "kept")
    held = set(base.origins.values())
    names = network.module.state_dict().keys()
    dropped = () if base.trained else tuple(n for n in base.shapes if n not in held and n not in names)
    notes: list[str] = []
    passes: list[Pass | None] = []
    for name, module in ((base.name, base.module), (network.spec, on_meta(network.module))):
        try:
            passes.append(pass_of(replace(sized, name=name), module, network.layers.values()))
        except InputError as error:
            passes.append(None)
            notes.append(f"sizes and operations of {name} are not known without numbers: {error}")
    before, after = passes
    return Changes(
        variant=network.spec, base=base.name, image_size=sized.image_size, tensors=tensors, dropped=dropped,
        share=kept / max(1, sum(parameters.values())), layers=tuple(_layers(network, before, after)),
        gmac=(_gmac(before), _gmac(after)),
        warnings=tuple(_warnings(network, tensors, before, after)), notes=tuple(notes),
    )  # fmt: skip


def _tensors(network: Network, base: Base) -> Iterable[TensorChange]:
    for name, tensor in network.module.state_dict().items():
        source, shape = base.origins.get(name), tuple(tensor.shape)
        before = base.shapes.get(source or name)
        state = "fresh" if source is None else "kept" if before == shape else "resized"
        yield TensorChange(name, "trained" if base.trained else state, before, shape)


def _layers(network: Network, before: Pass | None, after: Pass | None) -> Iterable[LayerChange]:
    for layer, path in network.layers.items():
        own, other = (None if one is None else one.grids.get(path) for one in (before, after))
        if own or other:
            yield LayerChange(layer, own, other)


def _warnings(
    network: Network, tensors: Iterable[TensorChange], before: Pass | None, after: Pass | None
) -> Iterable[str]:
    was = {one.path: one for one in _grids(before)}
    for one in _grids(after):
        old = was.get(one.path)
        if old is not None and old.before != one.before and old.after == one.after:
            sizes = [" x ".join(map(str, side)) for side in (one.before, one.after, old.before)]
            yield (
                f"{one.path or 'the network'} pools {sizes[0]} to {sizes[1]}, where it was {sizes[2]}: "
                "the weights behind it fit, but what they get has changed"
            )
    yield from _functions(network, after)
    head = head_path(network.module)
    if any(one.name in (f"{head}.weight", "weight" if not head else "") and one.state == "fresh" for one in tensors):
        yield f"the head {head} is new: it must be trained"


def _functions(network: Network, after: Pass | None) -> Iterable[str]:
    """What an edit of all activations or poolings could not change, since they are no modules."""
    edits = Spec.parse(network.spec).edits
    replaced = "max" if edits.get("pooling") == "avg" else "avg"
    for edit, names in (("activation", ACTIVATED), ("pooling", POOLED[replaced])):
        if after is None or edit not in edits:
            continue
        for name, calls in Counter(name for name in after.functions if name in names).items():
            how = "once" if calls == 1 else f"{calls} times"
            yield f"{edit}={edits[edit]} leaves {name}, which {network.name} calls as a function, {how}"


def _gmac(found: Pass | None) -> float | None:
    return None if found is None else found.operations / 1e9


def _grids(found: Pass | None) -> list[Pooled]:
    """Poolings to grids of several units, and the last one: others are of gates."""
    pooled = [] if found is None else found.pooled
    return [one for i, one in enumerate(pooled) if prod(one.after) > 1 or i == len(pooled) - 1]


def _grid(grid: Grid | None) -> tuple[str, str, str]:
    if grid is None or not grid.size:
        return "-", "-", "-"
    return _x(grid.size), str(grid.stride or "-"), str(grid.field or "-")


def _x(shape: Shape | None) -> str:
    return "-" if shape is None else "x".join(map(str, shape)) or "1"


def _changed(before: str, after: str) -> str:
    return after if before == after else f"{before} -> {after}"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _digits(gmac: float) -> str:
    return f"{gmac:.2f}" if gmac >= 0.1 else f"{gmac:.2g}"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as lines, indented, their cells one below the other."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
