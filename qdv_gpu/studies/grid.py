"""SWEEP.toml: settings that all points share, a grid of those that vary, and single points.

[run]
data = "cifar10"
weights = "none"
epochs = 3
finetune.samples = 10000        # a name that finetune and analyze both have, and mean differently, says which
runs = 3

[grid]
network = ["alexnet", "alexnet[zf]"]
lr = [1e-3, 3e-4]

[[points]]
network = "vgg11"
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from qdv_gpu.errors import InputError, as_path, check_count, short, unknown
from qdv_gpu.files import read_toml
from qdv_gpu.networks.spec import Spec
from qdv_gpu.networks.variant import Variant
from qdv_gpu.studies.point import Point
from qdv_gpu.studies.settings import PRESETS, Settings, Training, changed

TABLES = {"finetune": Training, "analyze": Settings}
OWN = ("network", "data", "weights", "device", "skip_bad", "runs", "preset")
AMBIGUOUS = ("samples",)  # which finetune and analyze both have, of other images
VARIANT = ("base", "edits", "carry")
MAX_POINTS = 10_000
PARTS = ("run", "grid", "points")


@dataclass(frozen=True)
class Sheet:
    """A sweep file, or the same as a dict, and where in it a key is.

    Attributes
    ----------
    table : dict
        run, grid and points.
    name : str
        Of the file; "" of a dict.
    text : str
        Of the file.
    """

    table: dict[str, Any]
    name: str = ""
    text: str = ""

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any]) -> "Sheet":
        """From a file or a dict; InputError if it is no TOML, or has other tables."""
        if isinstance(source, Mapping):
            sheet = cls(dict(source))
        else:
            table, text = read_toml("sweep file", as_path("a sweep", source))
            sheet = cls(table, str(source), text)
        for part, value in sheet.table.items():
            if part not in PARTS:
                raise sheet.error(str(unknown("table", part, PARTS)), str(part))
            if not isinstance(value, list if part == "points" else dict):
                raise sheet.error(f"{part} must be a table, [{'[points]' if part == 'points' else part}]", part)
        for number, value in enumerate(sheet.table.get("points", [])):
            if not isinstance(value, dict):
                raise sheet.error("a point must be a table, [[points]]", "points", number=number)
        return sheet

    @property
    def plain(self) -> dict[str, Any]:
        """The table as JSON keeps it."""
        plain: dict[str, Any] = json.loads(json.dumps(self.table, default=str))
        return plain

    def error(self, message: str, part: str, key: str = "", number: int = 0) -> InputError:
        """With file, line and key."""
        where = ".".join(filter(None, (part, key)))
        place = f"{self.name}:{self._line(part, key, number)}: " if self.name else ""
        return InputError(f"{place}{where}: {message}")

    def error_at(self, message: str, key: str, value: Any) -> InputError:
        """With the place where a key has this value; where it is a list, one of its values."""
        for part in PARTS[:2]:
            given = self.table.get(part, {}).get(key)
            if value == given or (isinstance(given, list) and value in given):
                return self.error(message, part, key)
        for number, point in enumerate(self.table.get("points", [])):
            if point.get(key) == value:
                return self.error(message, "points", key, number)
        return self.error(message, "grid", key)

    def _line(self, part: str, key: str, number: int) -> int:
        """Where a key is set, or its table begins, from 1."""
        table, seen, found = "", -1, 1
        for line, text in enumerate(self.text.splitlines(), start=1):
            if header := re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]", text):
                table = header[1].replace('"', "").replace("'", "")
                seen += table == "points"
                if table == part and (part != "points" or seen == number):
                    found = line
            elif assigned := re.match(r"\s*([\w.\"' -]+?)\s*=", text):
                name = assigned[1].replace('"', "").replace("'", "").replace(" ", "")
                path = f"{table}.{name}" if table else name
                if path == f"{part}.{key}" and (part != "points" or seen == number):
                    return line
        return found


class Given(NamedTuple):
    """A value of a setting, and where it is from: the part of the sheet, and the number among its points."""

    value: Any
    part: str
    number: int = 0


def read_sweep(source: str | Path | Mapping[str, Any], *, max_points: int = MAX_POINTS) -> tuple[Sheet, list[Point]]:
    """The points of a sweep file, or of such a dict: the grid's, its first key varying slowest, then single ones.

    Raises
    ------
    InputError
        With file, line and key: for an unknown key, with the nearest that there are; a value of the wrong type; no
        point, too many, or one twice.
    """
    check_count("max points", max_points)
    sheet = Sheet.read(source)
    shared = {key: Given(value, "run") for key, value in _flat(sheet.table.get("run", {})).items()}
    axes = {key: _axis(sheet, key, values) for key, values in _flat(sheet.table.get("grid", {})).items()}
    single = [_flat(point) for point in sheet.table.get("points", [])]
    _check_keys(sheet, shared, axes, single)

    def check_number(count: int) -> None:
        if count > max_points:
            message = f"the sweep has {count:,} points: at most {max_points:,} are allowed (--max-points)"
            raise sheet.error(message, "grid")

    check_number((math.prod(map(len, axes.values())) if axes else 0) + len(single))
    chosen = [
        ({**shared, **{key: Given(value, "grid") for key, value in zip(axes, values, strict=True)}}, tuple(axes))
        for values in (itertools.product(*axes.values()) if axes else [])
    ]
    for number, own in enumerate(single):
        chosen.append(({**shared, **{key: Given(value, "points", number) for key, value in own.items()}}, tuple(own)))
    runs = [given.get("runs", Given(1, "run")).value for given, _ in chosen]
    check_number(sum(len(n) if isinstance(n, list) else n for n in runs if isinstance(n, int | list)))
    points = [point for given, varied in chosen for point in _points(sheet, given, varied)]
    if not points:
        raise sheet.error("the sweep has no points: a [grid] of lists or [[points]] are required", "grid")
    _check_different(sheet, points, "grid" if axes else "points")
    return sheet, points


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Keys of two sweeps, as dicts, that differ, with both values."""
    sides = [
        {f"{part}.{key}": value for part in ("run", "grid") for key, value in _flat(one.get(part, {})).items()}
        | ({"points": one["points"]} if one.get("points") else {})
        for one in (before, after)
    ]
    names = dict.fromkeys([*sides[0], *sides[1]])
    return [
        f"{n} ({sides[0].get(n)!r:.60} → {sides[1].get(n)!r:.60})" for n in names if sides[0].get(n) != sides[1].get(n)
    ]


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a table, with finetune.KEY and analyze.KEY for those of the tables inside of it."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if key in TABLES and isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def _names(table: type) -> list[str]:
    return [field.name for field in dataclasses.fields(table)]


def _check_keys(
    sheet: Sheet, shared: Mapping[str, Any], axes: Mapping[str, Any], single: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse keys that are unknown, and settings that are set twice."""
    tables = [("run", shared, 0), ("grid", axes, 0), *(("points", own, number) for number, own in enumerate(single))]
    for part, table, number in tables:
        for key in table:
            _check_key(sheet, part, key, number)
    for key in axes:
        if same := next((one for one in shared if _homes(one) <= _homes(key)), None):
            named = "" if same == key else f", as {same}"
            raise sheet.error(f"it is set in [run] too{named}: one of them must go", "grid", key)
    for part, table, number in tables:
        _check_once(sheet, part, list(table), number)


def _check_different(sheet: Sheet, points: Sequence[Point], part: str) -> None:
    """Refuse points that are computed alike, and those that another seed makes candidates of their own."""
    seen: dict[str, Point] = {}
    for point in points:
        other = seen.setdefault(_meaning(point), point)
        if other is not point:
            named = "" if other.label == point.label else f", once as {other.label}"
            raise sheet.error(f"{point.label}, run {point.run}, is there twice{named}", part)
    candidates: dict[str, Point] = {}
    for point in points:
        other = candidates.setdefault(point.candidate, point)
        if other.label != point.label:
            pair = f"{other.label} and {point.label} differ in their seeds alone, as runs of one candidate do"
            raise sheet.error(f"{pair}: set runs", part)


def _check_key(sheet: Sheet, part: str, key: str, number: int) -> None:
    """Refuse a key that is none, or that does not say which of two settings it is."""
    study, dot, name = key.rpartition(".")
    if dot and study in TABLES and name in _names(TABLES[study]):
        return
    if not dot and key in AMBIGUOUS:
        raise sheet.error(
            f"say which: finetune.{key} of training images, or analyze.{key} of test images", part, key, number
        )
    if dot and study in TABLES:
        raise sheet.error(str(unknown(f"setting of {study}", name, _names(TABLES[study]))), part, key, number)
    everywhere = [*OWN, *(name for table in TABLES.values() for name in _names(table))]
    if dot or key not in everywhere:
        raise sheet.error(str(unknown("setting", key, everywhere)), part, key, number)


def _homes(key: str) -> set[tuple[str, str]]:
    """The settings that a key sets, by study and name."""
    study, _, name = key.rpartition(".")
    homes = {(one, name) for one, table in TABLES.items() if study in ("", one) and name in _names(table)}
    return homes or {("", name)}


def _check_once(sheet: Sheet, part: str, keys: Sequence[str], number: int) -> None:
    """Refuse a key of which nothing is left, as others of its table say it for finetune and analyze themselves."""
    for key in keys:
        others = [one for one in keys if "." in one and "." not in key and _homes(one) <= _homes(key)]
        if others and set().union(*map(_homes, others)) == _homes(key):
            raise sheet.error(f"it is set as {' and '.join(others)} too: one of them must go", part, key, number)


def _meaning(point: Point) -> str:
    """What is computed for a point, whatever it is called and however it is written."""
    spec = Spec.parse(point.network)
    edits = list(spec.edits.items())  # in their order
    network = [spec.name, spec.arguments, edits, spec.carry, spec.checkpoint]
    said = replace(point, label="", varied={}, network="").said()
    return json.dumps(_one_form([network, said]), sort_keys=True, default=repr)


def _one_form(value: Any) -> Any:
    """A value with 2.0 as 2."""
    if isinstance(value, dict):
        return {key: _one_form(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_one_form(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _axis(sheet: Sheet, key: str, values: Any) -> list[Any]:
    """The values of a key of the grid."""
    if key == "runs" and isinstance(values, int) and not isinstance(values, bool):
        return [values]
    if not isinstance(values, list):
        raise sheet.error(f"the grid needs a list of values, got {short(values)}", "grid", key)
    if not values:
        raise sheet.error("the list is empty: at least one value is required", "grid", key)
    return [values] if key == "runs" else values


def _points(sheet: Sheet, given: Mapping[str, Given], varied: Sequence[str]) -> Iterator[Point]:
    """The runs of one setting of everything."""
    values = {key: one.value for key, one in given.items()}

    def refuse(key: str, message: str) -> InputError:
        place = given.get(key, Given(None, "run"))
        return sheet.error(message, place.part, key, place.number)

    def text(key: str, default: str) -> str:
        value = values.get(key, default)
        value = str(value) if isinstance(value, Path) else value
        if not isinstance(value, str) or not value:
            raise refuse(key, f"a text is required, got {short(value)}" if key in given else "it is required")
        return value

    try:
        network = _network(values.get("network"))
    except InputError as error:
        raise refuse("network", str(error)) from None
    preset = text("preset", "default")
    if preset not in PRESETS:
        raise refuse("preset", str(unknown("preset", preset, PRESETS)))
    tables: dict[str, Any] = {"finetune": Training(threads=1), "analyze": PRESETS[preset]}
    trains = "runs" in given
    for key in sorted(given, key=lambda key: (given[key].part != "run", "." in key)):  # what says more comes last
        study, _, name = key.rpartition(".")
        if name in OWN:
            continue
        homes = [study] if study else [one for one, table in TABLES.items() if name in _names(table)]
        trains |= homes == ["finetune"]
        for home in homes:
            try:
                tables[home] = changed(tables[home], {name: _read(TABLES[home], name, values[key])})
            except InputError as error:
                raise refuse(key, str(error)) from None
    skip_bad = values.get("skip_bad", False)
    if not isinstance(skip_bad, bool):
        raise refuse("skip_bad", f"true or false is required, got {short(skip_bad)}")
    point = Point(
        label=_label(values, varied, network), varied=_varied(values, varied, network),
        network=network, data=text("data", ""),
        weights=text("weights", "imagenet"), device=text("device", "auto"), skip_bad=skip_bad, run=1,
        training=tables["finetune"] if trains else None, settings=tables["analyze"],
    )  # fmt: skip
    for run in _runs(values.get("runs", 1), refuse):
        seed = tables["finetune"].seed + run - 1
        yield replace(point, run=run, training=point.training and replace(point.training, seed=seed))


def _runs(value: Any, refuse: Any) -> Sequence[int]:
    """Numbers of the runs: 1, 2, ... up to a number, or those of a list."""

    def counts(n: Any) -> bool:
        return isinstance(n, int) and not isinstance(n, bool) and n > 0

    if counts(value):
        return range(1, value + 1)
    if isinstance(value, list) and value and all(map(counts, value)) and len(set(value)) == len(value):
        return value
    raise refuse("runs", f"a number of runs, or a list of different ones from 1, is required, got {short(value)}")


def _network(value: Any) -> str:
    """A network's name, of a text, a variant, or a table of its base, edits and carry."""
    if isinstance(value, Mapping):
        if other := next((key for key in value if key not in VARIANT), None):
            raise unknown("key of a variant", str(other), VARIANT)
        value = Variant(**value) if "base" in value else None
    if isinstance(value, Variant):
        if not value.named:
            raise InputError("the base of a variant in a sweep must be a name, which other processes can build")
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise InputError("the name of a network is required, as for analyze")
    Spec.parse(value)
    return value


def _read(table: type, name: str, value: Any) -> Any:
    """A value as the table takes it: texts are read as the command line reads them."""
    read = next(field for field in dataclasses.fields(table) if field.name == name).metadata["read"]
    return read(value) if read and isinstance(value, str) else value


def _varied(values: Mapping[str, Any], varied: Sequence[str], network: str) -> dict[str, Any]:
    """What tells a point from the others, its run aside."""
    return {key: network if key == "network" else values[key] for key in varied if key != "runs"}


def _label(values: Mapping[str, Any], varied: Sequence[str], network: str) -> str:
    """The same in words."""
    others = [f"{key}={values[key]}" for key in varied if key not in ("network", "runs", "data")]
    data = [str(values["data"])] if "data" in varied else []
    rest = ", ".join([*data, *others])
    named = network if "network" in varied or not rest else ""
    return f"{named} ({rest})" if named and rest else named or rest
