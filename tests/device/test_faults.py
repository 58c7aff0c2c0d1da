"""Faults that are put into the code on demand still change something."""

import pytest

from device.faults import FAULTS, ROOT, places


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_fault_changes_is_there(name):
    assert places(FAULTS[name]) == 1, f"{FAULTS[name].file} has changed: write the fault anew"


@pytest.mark.parametrize("name", FAULTS)
def test_the_tests_that_could_see_it_are_there(name):
    for test in FAULTS[name].tests.split():
        file, _, function = test.partition("::")
        if file.endswith(".py"):
            assert not function or f"def {function.partition('[')[0]}(" in (ROOT / file).read_text(), test
