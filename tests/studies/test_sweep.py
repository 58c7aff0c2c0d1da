"""Sweeps: in process and in processes, killed and gone on with, shared, extended, halved."""

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_sweep import TABLE, TOML, changed, command, environment, rows

from qdv_gpu.errors import InputError
from qdv_gpu.sealed import read_sealed, write_sealed
from qdv_gpu.studies import executors
from qdv_gpu.studies.outlook import foreseen, why
from qdv_gpu.studies.point import read_points
from qdv_gpu.studies.status import status
from qdv_gpu.studies.sweep import rungs, sweep


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return sweep(TABLE, tmp_path_factory.mktemp("sweep") / "one")


def test_what_a_sweep_writes(finished):
    found = rows(finished.out)
    assert len(found) == 12
    assert [row["state"] for row in found] == ["done"] * 12
    assert {row["lr"] for row in found} == {"0.001", "0.01"}
    assert [row["run"] for row in found[:3]] == ["1", "2", "3"]
    first = finished.rungs[0].found[0].run
    [layers] = first.networks.values()
    for name in ("nh", "trustworthiness", "continuity"):
        assert float(found[0][f"{name} 2"]) == getattr(layers[1].scores[0].mean, name)
    assert found[0]["layer 2"] == "pool@2"
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(finished.out / "sweep.parquet").to_pylist()
    assert [row["accuracy"] for row in table] == pytest.approx([float(row["accuracy"]) for row in found])
    text = (finished.out / "ranking.md").read_text()
    assert "tiny_networks:other (lr=0.01)" in text
    assert finished.ranking.candidates[finished.ranking.winner].name.endswith("(lr=0.01)")
    names = {path.name for path in finished.figures}
    assert names == {"ranking.png", "gains.png", "cost.png", "relation.png"}
    assert not finished.failed


def test_checkpoints_are_not_kept(finished):
    assert not list(finished.out.rglob("checkpoint.safetensors"))
    assert len(list(finished.out.rglob("weights.safetensors"))) == 12


def test_accuracy_is_that_of_the_training(finished):
    point, state = finished.rungs[0].points[0], finished.rungs[0].states[0]
    said = json.loads((point.training_folder(finished.out) / "finetune.json").read_text())
    assert state.about["accuracy"] == said["test_accuracy"]


def test_again_computes_nothing(finished, trained, monkeypatch):
    before = rows(finished.out)
    monkeypatch.setattr(executors, "run_points", lambda *_, **__: pytest.fail("a point was computed again"))
    sweep(TABLE, finished.out)
    assert rows(finished.out) == before
    assert trained == []


def test_workers_give_the_same_bytes(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    out = tmp_path / "one"
    table = changed(grid={"runs": 1})
    found = sweep(table, out, workers=2)
    assert not found.failed
    shared = [row for row in rows(finished.out) if row["run"] == "1"]
    columns = [name for name in shared[0] if not name.startswith("candidate ")]
    assert [[row[c] for c in columns] for row in rows(out)] == [[row[c] for c in columns] for row in shared]


def test_two_sweeps_at_once_train_a_common_point_once(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text(TOML.replace("runs = 3", "runs = 1").replace('"tiny_networks:cnn", ', ""))
    both = [command("sweep", file, "--out", tmp_path / name, "--store", tmp_path / "store") for name in ("a", "b")]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    logs = [log.read_text() for name in ("a", "b") for log in (tmp_path / name).glob("points/*/log.txt")]
    assert sum("epoch 1/1" in log for log in logs) == 2  # two points, four logs


def test_perplexities_are_one_batch(tmp_path, monkeypatch):
    """Maps of other perplexities, which later points need, are computed with the first, and are what they would be."""
    from qdv_gpu.tsne.estimator import TSNE

    batches, transform = [], TSNE.fit_transform

    def counted(self, X, **options):
        batches.append(options["perplexities"])
        return transform(self, X, **options)

    table = changed(grid={"network": ["tiny_networks:cnn"], "lr": None, "runs": 1, "perplexity": [5, 8, 11]})
    table["run"].pop("perplexity")
    with monkeypatch.context() as patched:
        patched.setattr(TSNE, "fit_transform", counted)
        sweep(table, tmp_path / "together")
    assert batches == [[5, 8, 11]] * 2  # two calls of the layer
    alone = changed(grid={"network": ["tiny_networks:cnn"], "lr": None, "runs": 1}, run={"perplexity": 11})
    found = sweep(alone, tmp_path / "alone", store=tmp_path / "other")
    row = next(row for row in rows(tmp_path / "together") if row["perplexity"] == "11")
    assert row["nh 2"] == rows(tmp_path / "alone")[0]["nh 2"]
    assert not found.failed


@pytest.mark.parametrize("workers", [(), ("--workers", "2")])
def test_killed_anywhere_it_ends_the_same(finished, tmp_path, workers):
    """The sweep itself is killed at random moments, and goes on; no training that was finished is done again."""
    file, out = tmp_path / "sweep.toml", tmp_path / "one"
    file.write_text(TOML)
    moments = random.Random(len(workers))
    for _ in range(3):
        process = command("sweep", file, "--out", out, *workers)
        time.sleep(moments.uniform(6, 14))
        process.kill()
        process.communicate()
    process = command("sweep", file, "--out", out, *workers)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert rows(out) == rows(finished.out)
    for log in out.glob("points/*/log.txt"):
        assert log.read_text().count("epoch 1/1") <= 2  # a training that was cut off, and its second start


def children(process):
    """Processes that a sweep has started and that compute points."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == process.pid:
                found.append(int(stat.parent.name))
    return found


def finished_trainings(out):
    """Points whose training is over, with the lines on it in their logs; all stages, with when they were written."""
    over = [point for point in read_points(out) if (point.training_folder(out) / "finetune.json").is_file()]
    lines = {point.name: (point.folder(out) / "log.txt").read_text().count("epoch 1/1") for point in over}
    stages = out.parent.glob(".qdv-store/*/*/stage.json")
    return lines, {stage: stage.stat().st_mtime_ns for stage in stages}


@pytest.mark.slow
def test_sixty_points_with_workers_and_sweep_killed(tmp_path):
    """Five times a worker is killed, three times the sweep: the same rows, nothing twice, nothing lost."""
    rates = ", ".join(str(round(1e-3 * 1.3**n, 6)) for n in range(10))
    file = tmp_path / "sweep.toml"
    file.write_text(TOML.replace("1e-3, 1e-2", rates))
    alone = command("sweep", file, "--out", tmp_path / "alone" / "one")
    assert alone.wait() == 0
    expected = rows(tmp_path / "alone" / "one")
    assert len(expected) == 60
    out, moments, seen = tmp_path / "killed" / "one", random.Random(60), []
    kills = ["worker", "sweep", "worker", "worker", "sweep", "worker", "sweep", "worker"]
    process = command("sweep", file, "--out", out, "--workers", "2")
    for kind in kills:
        time.sleep(moments.uniform(6, 16))
        assert process.poll() is None
        if kind == "worker":
            chosen = []
            while not chosen:
                chosen = children(process)
            os.kill(moments.choice(chosen), signal.SIGKILL)
        else:
            process.kill()
            process.communicate()
            seen.append(finished_trainings(out))
            process = command("sweep", file, "--out", out, "--workers", "2")
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert rows(out) == expected
    lines, stages = finished_trainings(out)
    for before, written in seen:
        assert before
        assert {name: lines[name] for name in before} == before
        assert {stage: stages[stage] for stage in written} == written


def test_another_sweep_is_refused_and_extended(finished, tmp_path, trained):
    small = changed(grid={"lr": [1e-2], "runs": 1})
    sweep(small, tmp_path / "one", store=finished.out.parent / ".qdv-store")
    more = changed(grid={"lr": [1e-2, 1e-3], "runs": 1})
    with pytest.raises(InputError, match=r"grid.lr \(\[0.01\] → \[0.01, 0.001\]\) changed; pass --extend"):
        sweep(more, tmp_path / "one")
    sweep(more, tmp_path / "one", extend=True, store=finished.out.parent / ".qdv-store")
    assert [(row["network"][14:], row["lr"]) for row in rows(tmp_path / "one")] == [
        ("cnn", "0.01"), ("other", "0.01"), ("cnn", "0.001"), ("other", "0.001"),
    ]  # fmt: skip
    assert trained == []


def test_a_run_that_is_there_is_not_added_as_another(tmp_path, trained):
    own = {"network": ["tiny_networks:cnn"], "lr": [1e-2]}
    sweep(changed(grid={**own, "runs": 2}), tmp_path / "one")
    found = sweep(changed(grid={**own, "runs": 2}, run={"seed": 1}), tmp_path / "one", extend=True)
    assert [point.training.seed for point in found.rungs[0].points] == [0, 1, 2]
    assert found.ranking.runs == len(trained) == 3


def test_halving_drops_what_is_surely_worse(tmp_path, trained):
    table = changed(grid={"lr": [1e-6, 1e-2], "runs": 3}, run={"epochs": 4, "analyze": {"samples": 300}})
    found = sweep(table, tmp_path / "one", halve="epochs")
    assert [rung.points[0].training.epochs for rung in found.rungs] == [1, 2, 4]
    assert len(found.rungs[0].points) == 12
    assert len(found.rungs[2].points) < 12
    kept = {(point.network[14:], point.training.lr) for point in found.rungs[2].points}
    assert {("cnn", 1e-6), ("other", 1e-2)} <= kept  # the first is the baseline
    assert ("other", 1e-6) not in kept
    assert found.ranking.candidates[found.ranking.baseline].name == "tiny_networks:cnn (lr=1e-06)"
    assert found.ranking.dropped
    assert "Dropped earlier as surely not the best (95 % each time)" in (found.out / "ranking.md").read_text()
    assert status(found.out).counts["done"] == sum(len(rung.points) for rung in found.rungs)
    assert status(found.out).counts["waiting"] == 0
    table = rows(tmp_path / "one")
    assert {row["rung"] for row in table} == {"1", "2", "3"}
    alone = changed(run={"epochs": 4, "analyze": {"samples": 300}}, grid={"lr": [1e-2], "runs": 3})
    whole = sweep(alone, tmp_path / "two", store=tmp_path / "fresh")
    scores = {(row["network"], row["run"]): row["nh 2"] for row in rows(whole.out)}
    for row in table:
        if row["rung"] == "3" and row["lr"] == "0.01":  # going on from fewer epochs changes nothing
            assert row["nh 2"] == scores[row["network"], row["run"]]


def test_rungs():
    from qdv_gpu.studies.grid import read_sweep

    _, points = read_sweep(TABLE)
    assert [rung[0].training.samples for rung in rungs(points, "images")] == [50, 100, 200]
    assert len(rungs(points, "epochs")) == 1  # of one epoch there is no half
    with pytest.raises(InputError, match="unknown way to halve 'epoch': did you mean epochs"):
        rungs(points, "epoch")
    _, points = read_sweep(changed(grid={"runs": 2}))
    with pytest.raises(InputError, match="one run of each candidate, or at least three: two give no interval"):
        rungs(points, "images")


def test_variants_are_described_in_the_order_of_the_file(tmp_path, caplog):
    variants = [f"tiny_networks:cnn[width={factor}]" for factor in (2, 3, 1.5)]
    with caplog.at_level("INFO"):
        foreseen(changed(grid={"network": variants, "lr": [1e-2], "runs": 1}), tmp_path / "one", max_points=100)
    said = [line.split(" beside ")[0] for line in caplog.messages if " beside " in line]
    assert said == variants


def test_dry_run_writes_nothing(finished, tmp_path):
    store = finished.out.parent / ".qdv-store"
    before = sorted(store.rglob("*"))
    table = changed(grid={"lr": [1e-3, 0.5], "runs": 1})
    header, *body = foreseen(table, tmp_path / "one", max_points=100, store=store)[0]
    assert header[:2] == ["point", "run"]
    assert [row[2:5] for row in body] == [["in the store", "2 of 2", "4 of 4"], ["1 epochs", "0 of 2", "0 of 4"]] * 2
    assert not list(tmp_path.iterdir())
    assert sorted(store.rglob("*")) == before


def test_why_a_point_misses_the_store(finished, tmp_path):
    store = finished.out.parent / ".qdv-store"
    out = tmp_path / "one"
    sweep(changed(grid={"lr": [1e-3], "network": ["tiny_networks:cnn"], "runs": 1}), out, store=store)
    [point] = read_points(out)
    assert all("not in the store" not in line for line in why(out, point.name))
    other = changed(grid={"lr": [1e-3], "network": ["tiny_networks:cnn"], "runs": 1}, run={"perplexity": 9})
    sweep(other, tmp_path / "two", store=tmp_path / "empty")
    file = tmp_path / "two" / "sweep.json"
    write_sealed(file, read_sealed(file) | {"store": str(store)})
    [line, *_] = [line for line in why(tmp_path / "two", "tiny") if "not in the store" in line]
    assert "perplexity (8.0 there, 9.0 here)" in line
    with pytest.raises(InputError, match="unknown point 'x'"):
        why(out, "x")


def test_status_of_a_folder_that_is_none(tmp_path):
    with pytest.raises(InputError, match="holds no sweep"):
        status(tmp_path)


def test_status_as_json(finished):
    process = command("status", finished.out, "--json")
    said = json.loads(process.communicate()[0])
    assert said["done"] == 12
    assert said["points"][0]["state"] == "done"
    assert said["seconds_left"] == 0


def test_slots(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in executors.slots_of(2, None)[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in executors.slots_of(3, None)] == ["4", "6", "4"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in executors.slots_of(None, ["1"])] == ["6"]
    with pytest.raises(InputError, match="--gpus must be numbers separated by commas, got ''"):
        executors.slots_of(None, [""])
    with pytest.raises(InputError, match="--gpus must be numbers below 2, got 7"):
        executors.slots_of(None, ["7"])


def test_each_worker_has_its_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    table = changed(run={"device": "cpu"}, grid={"lr": [1e-2], "runs": 2})
    found = sweep(table, tmp_path / "one", gpus=["0", "1"])
    assert not found.failed
    started = [json.loads((p.folder(found.out) / "started.json").read_text()) for p in found.rungs[0].points]
    assert {one["devices"] for one in started} == {"0", "1"}
    assert len({one["pid"] for one in started}) == 4


def test_variants_in_python(tmp_path):
    from qdv_gpu import Variant

    variant = Variant("tiny_networks:cnn", {"conv1": {"bias": False}})
    table = changed(grid={"network": ["tiny_networks:cnn", variant], "lr": [1e-2], "runs": 1})
    found = sweep(table, tmp_path / "one")
    assert [row["network"] for row in rows(found.out)] == ["tiny_networks:cnn", "tiny_networks:cnn[conv1.bias=False]"]
    assert not sweep(table, tmp_path / "one").failed


def test_candidates_are_ranked_by_a_k_that_all_have(tmp_path, lines):
    table = changed(grid={"network": ["tiny_networks:cnn"], "lr": [1e-3], "runs": 1, "k": [[5, 3], [3]]})
    assert sweep(table, tmp_path / "one").ranking.k == 3
    table["grid"]["k"] = [[5], [7]]
    assert sweep(table, tmp_path / "other", store=tmp_path / ".qdv-store").ranking is None
    (said,) = (line for line in lines() if line.startswith("the candidates are not ranked: layer pool@1 of "))
    assert said.endswith(" has scores for k = 7, not for 5")
