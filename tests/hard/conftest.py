"""A warm process for all hard cases, and finished runs that they read."""

import pytest
from hard import made
from hard.cases import SMALL, Warm


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
