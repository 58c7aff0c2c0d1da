"""Parsers and records on generated input: what is written is read again, and anything else is an InputError."""

import contextlib
import json
import math
import tempfile
from dataclasses import fields, replace
from keyword import iskeyword
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qdv_gpu.errors import InputError
from qdv_gpu.files import parse_bytes, readable
from qdv_gpu.networks.layers import LayerName, numbered, read_layers
from qdv_gpu.networks.spec import Spec, flat_edits, split_outside
from qdv_gpu.sealed import read_sealed, seal_of, write_sealed
from qdv_gpu.studies.grid import read_sweep
from qdv_gpu.studies.settings import Settings, of_stage

bounded = settings(
    derandomize=True, database=None, deadline=None, max_examples=200, suppress_health_check=list(HealthCheck)
)
LITERAL = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=4,
)
NAME = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True).filter(lambda name: not iskeyword(name))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@bounded
@given(st.text(max_size=20) | st.from_regex(r"[\d.]{1,5}e?\d{0,4} ?[kmgtKMGT]?i?[bB]?", fullmatch=True))
@example("1e400")
def test_a_size(text):
    with contextlib.suppress(InputError):
        assert parse_bytes(text) >= 1


@bounded
@given(st.floats(1, 1e15))
def test_a_readable_size(size):
    assert math.isclose(parse_bytes(readable(size)), size, rel_tol=0.01, abs_tol=1)


@bounded
@given(st.lists(NAME, min_size=1, max_size=4), st.integers(2, 9))
def test_layers(names, calls):
    assert [str(one) for one in read_layers(",".join(names))] == names
    for one in numbered(names[0], calls):
        assert LayerName.parse(str(one)) == one


@bounded
@given(st.text(max_size=40) | st.text("resnet18()[]=,'\"\\.:@ a1{}", max_size=30))
def test_a_network(text):
    with contextlib.suppress(InputError):
        read = Spec.parse(text)
        assert Spec.parse(read.built).built == read.built


@bounded
@given(st.dictionaries(NAME, LITERAL, max_size=3), st.dictionaries(NAME.map("features.{}".format), LITERAL, max_size=3))
def test_a_network_is_read_as_it_was_written(arguments, edits):
    with contextlib.suppress(InputError):
        written = Spec("resnet18", arguments, edits=flat_edits(edits))
        read = Spec.parse(written.built)
        assert (read.name, read.arguments, read.edits) == (written.name, written.arguments, written.edits)


@bounded
@given(st.text("a,='\"([{)]} ", max_size=20))
def test_parts(text):
    assert ",".join(split_outside(text, ",")) == text


@bounded
@given(st.dictionaries(st.text(max_size=6), PLAIN, max_size=4), st.integers(0, 10**6))
def test_a_record(record, at):
    record.pop("seal", None)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.json")
        write_sealed(file, record)
        assert seal_of(read_sealed(file)) == seal_of(record)
        damaged = bytearray(file.read_bytes())
        damaged[at % len(damaged)] ^= 1 << at % 8
        file.write_bytes(damaged)
        with contextlib.suppress(InputError):
            read = read_sealed(file)
            assert seal_of(read) == seal_of(record) or b'"seal"' not in bytes(damaged)


@bounded
@given(st.binary(max_size=60) | PLAIN.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
def test_no_record(contents):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.json")
        file.write_bytes(contents)
        with contextlib.suppress(InputError):
            assert isinstance(read_sealed(file), dict)


PART = st.sampled_from(["run", "grid", "finetune", "x"]) | st.text(max_size=4)
KEY = st.sampled_from(["data", "network", "k", "perplexity", "lr", "weights", "seeds"]) | st.text(max_size=4)
TABLE = st.dictionaries(PART, st.dictionaries(KEY, PLAIN, max_size=3) | PLAIN, max_size=3)


@bounded
@given(TABLE)
def test_a_sweep(table):
    with contextlib.suppress(InputError):
        read_sweep(table)


@bounded
@given(st.permutations([field.name for field in fields(Settings)]), st.integers(1, 10**6), st.integers(1, 10**6))
def test_keys_of_settings(order, first, second):
    one = Settings(**{name: getattr(Settings(), name) for name in order})
    assert seal_of(of_stage(one, "map")) == seal_of(of_stage(Settings(), "map"))
    changed = [seal_of(of_stage(replace(one, iterations=number), "map")) for number in (first, second)]
    assert (changed[0] == changed[1]) == (first == second)
