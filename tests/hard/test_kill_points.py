"""Commands killed at operations on files: see `kill_points.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("kill_points.py")
COMMANDS = ["analyze", "finetune", "deconv", "sweep", "report"]
POINTS = {"sweep": 5}  # of the longest fewer


def outcomes(name, points):
    command = [sys.executable, PROGRAM, name, "--points", str(points)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_commands_go_on_and_leave_no_litter(name):
    points = POINTS.get(name, 8)
    found = outcomes(name, points)
    assert len(found) == points
    assert [one for one in found if one["wrong"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMMANDS, "analyze again", "compare", "export"])
def test_killed_commands_go_on_at_sixty_points(name):
    found = outcomes(name, 60)
    assert len(found) >= 40  # of some there are not so many operations
    assert [one for one in found if one["wrong"]] == []
