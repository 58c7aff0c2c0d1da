"""Commands killed at operations on files: see `kill_points.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("kill_points.py")
POINTS = {"analyze": 4, "finetune": 4, "deconv": 3, "sweep": 2, "report": 3}


def outcomes(**points):
    command = [sys.executable, PROGRAM, *(f"{name}={number}" for name, number in points.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_commands_go_on_and_leave_no_litter():
    found = outcomes(**POINTS)
    assert len(found) == sum(POINTS.values())
    assert [one for one in found if one["wrong"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [*POINTS, "analyze again", "compare", "export"])
def test_killed_commands_go_on_at_sixty_points(name):
    found = outcomes(**{name: 60})
    assert found
    assert [one for one in found if one["wrong"]] == []
