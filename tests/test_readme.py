"""The README's measurements are those of benchmarks/results."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # behind the installed package

from benchmarks import readme


def test_tables_are_not_stale():
    text = (readme.ROOT / "README.md").read_text()
    assert readme.updated(text) == text, "run: python -m benchmarks.readme"


def test_a_table_names_device_work_and_peers():
    row = {"work": "t-SNE", "seconds": 0.5, "peers": {"sklearn": 4.0}}
    report = {"device": "A GPU", "versions": {"torch": "2.15.0"}, "stages": {"tsne": {"timings": [row]}, "old": {}}}
    table = readme.table(json.loads(json.dumps(report)))
    assert table.startswith("**A GPU** (torch 2.15.0):\n")
    assert "| t-SNE | 0.5 | sklearn 4 (8.0x) |" in table
