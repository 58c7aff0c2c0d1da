"""Sweeps in folders with damaged files, and of networks that end their process."""

import re
import shutil

import pytest
from tiny_sweep import changed

import qdv_gpu.studies.finetune as training
from qdv_gpu.errors import InputError
from qdv_gpu.studies.outlook import why
from qdv_gpu.studies.status import status
from qdv_gpu.studies.sweep import sweep
from qdv_gpu.terminal import show_sweep


def broken(name):
    """Points of which the last has a factory that fails when it is trained."""
    return changed(grid={"network": ["tiny_networks:cnn", f"tiny_sweep_networks:{name}"], "lr": [1e-2], "runs": 1})


@pytest.fixture
def trained(monkeypatch):
    """Counts trainings."""
    counts = []
    train = training._trained

    def count(run, *rest):
        counts.append(run.network.name)
        return train(run, *rest)

    monkeypatch.setattr(training, "_trained", count)
    return counts


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A sweep of two points, to be copied; the second's network ends its process when it is trained."""
    return sweep(broken("leaves"), tmp_path_factory.mktemp("small") / "one")


def test_a_network_that_ends_its_process_ends_only_its_own_point(small):
    assert [state.kind for state in small.rungs[0].states] == ["done", "failed"]
    assert re.search(r"SystemExit: 7 \(.*tiny_sweep_networks.py:\d+\)$", small.failed[0][1].about["message"])


DAMAGED = ["", "null", "[]", "{}", "3", '{"asked": [{}], "points": [1], "table": {}, "store": "x", "cwd": "x"}']


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_sweep_file_is_refused_in_one_line(small, tmp_path, text):
    out = shutil.copytree(small.out, tmp_path / "one")
    (out / "sweep.json").write_text(text)
    for look in (status, lambda out: why(out, "x"), lambda out: sweep(broken("leaves"), out)):
        with pytest.raises(InputError, match=r"sweep.json is damaged, or of another version: delete it, or") as error:
            look(out)
        assert "\n" not in str(error.value)
    assert (out / "sweep.json").read_text() == text


@pytest.mark.parametrize(
    "text", ["", "null", '{"time": "x"}', '{"message": 1, "seconds": {}, "versions": 1, "stages": 1}']
)
@pytest.mark.parametrize("name", ["result.json", "started.json", "analysis/run.json", "error.json"])
def test_a_point_with_a_damaged_file_is_computed_again(small, tmp_path, trained, name, text):
    out, store = shutil.copytree(small.out, tmp_path / "one"), small.out.parent / ".qdv-store"
    first, second = small.rungs[0].points
    (second if name == "error.json" else first).folder(out).joinpath(name).write_text(text)
    assert status(out).said()["points"][0]["state"] in {"done", "waiting", "lost"}
    found = sweep(broken("leaves"), out, store=store)
    assert [state.kind for state in found.rungs[0].states] == ["done", "failed"]
    assert "cnn" not in trained  # its weights are in the store


def test_no_ranking_is_named_where_there_is_none(tmp_path, capsys, caplog):
    found = sweep(
        changed(grid={"network": ["tiny_sweep_networks:explodes"], "lr": [1e-2], "runs": 1}), tmp_path / "one"
    )
    show_sweep(found)
    assert "ranking.md" not in capsys.readouterr().out
    assert "1 of 1 candidates are not ranked: not all of their runs are done" in caplog.text
