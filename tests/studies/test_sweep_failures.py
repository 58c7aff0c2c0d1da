"""Sweeps of which a part fails: networks that raise or end their process, damaged files."""

import json
import re
import shutil

import pytest
from tiny_sweep import TOML, changed, command, kinds, rows

from qdv_gpu.errors import InputError
from qdv_gpu.studies.outlook import why
from qdv_gpu.studies.status import status
from qdv_gpu.studies.sweep import sweep
from qdv_gpu.terminal import show_sweep


def broken(name):
    """Points of which the last has a factory that fails when it is trained."""
    return changed(grid={"network": ["tiny_networks:cnn", f"tiny_sweep_networks:{name}"], "lr": [1e-2], "runs": 1})


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


def test_a_failure_leaves_the_rest(tmp_path, capsys):
    table = broken("explodes")
    found = sweep(table, tmp_path / "one")
    assert [state.kind for state in found.rungs[0].states] == ["done", "failed"]
    [(point, state)] = found.failed
    assert re.search(r"cannot be run on a batch of \d+: RuntimeError: it explodes \(.*tiny_sweep_networks.py:\d+\)$",
                     state.about["message"])  # fmt: skip
    assert "it explodes" in found.log(point).read_text()
    assert any("explode" in line for line in state.about["traceback"])
    assert state.about["message"] in rows(tmp_path / "one")[1]["error"]
    again = sweep(table, tmp_path / "one")
    assert again.failed[0][1].about == state.about  # it was not tried again
    retried = sweep(table, tmp_path / "one", retry_failed=True)
    assert retried.failed[0][1].about["seconds"] != state.about["seconds"]


def test_a_gpu_that_failed_is_not_used_again(tmp_path):
    """It would give the other points of this process errors that are not theirs."""
    table = broken("breaks_the_gpu")
    table["grid"]["network"].reverse()
    with pytest.raises(InputError, match=r"the GPU failed .*an illegal memory access.*: run the same command again"):
        sweep(table, tmp_path / "one")
    again = sweep(table, tmp_path / "one")
    assert [state.kind for state in again.rungs[0].states] == ["failed", "done"]


def test_fail_fast(tmp_path):
    table = broken("explodes")
    table["grid"]["network"].reverse()
    found = sweep(table, tmp_path / "one", fail_fast=True)
    assert [state.kind for state in found.rungs[0].states] == ["failed", "waiting"]


def test_memory_is_tried_once_more(tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_COUNT", str(tmp_path / "count"))
    found = sweep(broken("hungry"), tmp_path / "one")
    assert not found.failed
    assert len((tmp_path / "count").read_text()) > 1
    started = json.loads((found.rungs[0].points[1].folder(tmp_path / "one") / "started.json").read_text())
    assert started["attempt"] == 2


def test_a_process_that_kills_itself_costs_only_its_own_point(tmp_path, monkeypatch):
    """Two attempts, then it has failed, with the signal; the command says so and exits with 1."""
    monkeypatch.setenv("TINY_COUNT", str(tmp_path / "count"))
    file = tmp_path / "sweep.toml"
    text = TOML.replace("runs = 3", "runs = 1").replace("lr = [1e-3, 1e-2]", "lr = [1e-2]")
    file.write_text(text.replace('"tiny_networks:other"', '"tiny_sweep_networks:suicidal", "tiny_networks:other"'))
    process = command("sweep", file, "--out", tmp_path / "one", "--workers", "2")
    said = process.communicate()[0]
    assert process.returncode == 1, said
    assert kinds(tmp_path / "one") == ["done", "failed", "done"]
    assert (tmp_path / "count").read_text() == "xx"
    [line] = [
        line for line in said.splitlines() if line.startswith("tiny_sweep_networks:suicidal (lr=0.01), run 1: failed")
    ]
    assert "SIGKILL" in line
    assert "log.txt" in line
