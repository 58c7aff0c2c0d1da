"""The README's measurements are those of benchmarks/results, and a trace is read right."""

import itertools
import json
import sys
from pathlib import Path
from statistics import median

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # behind the installed package

from benchmarks import readme
from benchmarks.__main__ import STAGES, kept
from benchmarks.common import timing
from benchmarks.table3 import copies_to_host


def test_tables_are_not_stale():
    text = (readme.ROOT / "README.md").read_text()
    assert readme.updated(text) == text, "run: python -m benchmarks.readme"


def test_results_hold_every_stage_and_its_repeats():
    for file in sorted((readme.ROOT / "benchmarks" / "results").glob("*.json")):
        report = json.loads(file.read_text())
        if "stages" not in report:
            continue
        assert set(STAGES) - set(report["stages"]) <= {"trace"}, file
        for row in itertools.chain.from_iterable(stage["timings"] for stage in report["stages"].values()):
            ours = row["all_seconds"].get("ours") or row["all_seconds"]["one pass"]
            assert len(ours) >= 3, row["work"]
            assert (row["spread"], row["seconds"]) == ([min(ours), max(ours)], median(ours)), row["work"]


def test_a_table_names_device_work_spread_peers_and_parts():
    row = timing("t-SNE", {"ours": [0.4, 0.9, 0.5], "sklearn": [4.0]}, parts={"repulsion": 0.3})
    report = {"device": "A GPU", "versions": {"torch": "2.15.0"}, "stages": {"tsne": {"timings": [row]}, "old": {}}}
    table = readme.table(json.loads(json.dumps(report)))
    assert table.startswith("**A GPU** (torch 2.15.0):\n")
    assert "| t-SNE | 0.5 (0.4-0.9) | sklearn 4 (8.0x), of which repulsion 0.3 |" in table


def test_results_of_other_versions_are_not_mixed(tmp_path, capsys):
    file = str(tmp_path / "results.json")
    report = {"device": "A GPU", "versions": {"torch": "2.15.0"}, "quick": False}
    assert kept(file, report) == {}
    Path(file).write_text(json.dumps(report | {"stages": {"tsne": {}}}))
    assert kept(file, report) == {"tsne": {}}
    assert kept(file, report | {"versions": {"torch": "2.16.0"}}) == {}
    assert "is begun anew" in capsys.readouterr().out


def test_copies_to_the_host_are_those_after_the_upload_of_the_images():
    def copy(ts, direction, size):
        return {"cat": "gpu_memcpy", "ts": ts, "name": f"Memcpy {direction} (x -> y)", "args": {"bytes": size}}

    events = [
        copy(1, "DtoH", 9000),  # weights, to hash them
        copy(2, "HtoD", 500),
        copy(3, "HtoD", 300),
        {"cat": "kernel", "ts": 4, "name": "repel", "args": {}},
        copy(5, "DtoH", 80),
        copy(6, "DtoD", 7000),
        copy(4, "DtoH", 8),
    ]
    assert copies_to_host(events, 500) == [80, 8]
    with pytest.raises(AssertionError, match="no upload of 501 bytes"):
        copies_to_host(events, 501)
