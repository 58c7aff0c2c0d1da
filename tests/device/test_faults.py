"""Faults that are put into the code on demand still change something."""

import pytest

from device.faults import FAULTS, places


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_fault_changes_is_there(name):
    assert places(FAULTS[name]) == 1, f"{FAULTS[name].file} has changed: write the fault anew"
