"""A warm process for all hard cases, and finished runs that they read; of a test's many cases a few are run in CI."""

from collections import defaultdict
from pathlib import Path
from zlib import crc32

import pytest
from hard import made
from hard.cases import SMALL, Warm

FEW = 4  # cases of a test that are run without -m slow


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark slow what a test has more cases of than a few, which are chosen by the hash of their names."""
    cases = defaultdict(list)
    for item in items:
        if item.path.parent == Path(__file__).parent and not item.get_closest_marker("slow"):
            cases[item.path, item.originalname].append(item)
    for some in cases.values():
        for item in sorted(some, key=lambda item: crc32(item.name.encode(errors="replace")))[FEW:]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def warm():
    with Warm() as started:
        yield started


@pytest.fixture(scope="session")
def runs(warm, tmp_path_factory):
    """A folder with the runs cnn and other, and SWEEP.toml; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("cnn", "other"):
        done = warm.run("analyze", f"tiny_networks:{name}", *SMALL, "--out", name, cwd=folder)
        assert done.code == 0, done.err
    run = "data = 'digits'\nweights = 'none'\nanalyze.samples = 60\nperplexity = 5\niterations = 20\nseeds = 1\n"
    (folder / "SWEEP.toml").write_text(f"[run]\n{run}[grid]\nnetwork = ['tiny_networks:cnn']\n")
    return folder


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """Folders of every command, to be copied and damaged."""
    with pytest.MonkeyPatch.context() as patch:
        made.quick_pictures(patch)
        yield made.make(tmp_path_factory.mktemp("made"))
