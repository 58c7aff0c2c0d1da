"""The measurements that the documents show are those of benchmarks/results, and a trace is read right."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # behind the installed package

from benchmarks import __main__ as command
from benchmarks import bars, check, readme, tsne
from benchmarks.__main__ import STAGES, kept
from benchmarks.common import Stage, timing
from benchmarks.data import made
from benchmarks.table3 import copies_to_host
from qdv_gpu.studies import peaks


@pytest.mark.parametrize("page", readme.PAGES)
def test_tables_are_not_stale(page):
    text = (readme.ROOT / page).read_text()
    assert text.count("| t-SNE, Fashion-MNIST, 10,000 points |") == 1
    assert readme.updated(page) == text, "run: python -m benchmarks.readme"


def test_results_hold_every_stage_and_its_repeats():
    """Fewer than three repeats only of what takes long."""
    held = set()
    for file in sorted((readme.ROOT / "benchmarks" / "results").glob("*.json")):
        report = json.loads(file.read_text())
        if "stages" not in report:
            continue
        held |= {name for name, stage in report["stages"].items() if stage.get("complete", True)}
        for row in itertools.chain.from_iterable(stage["timings"] for stage in report["stages"].values()):
            ours = row["all_seconds"].get("ours") or row["all_seconds"]["one pass"]
            assert len(ours) >= 3 or row["seconds"] > 4, row["work"]
            assert (row["spread"], row["seconds"]) == ([min(ours), max(ours)], median(ours)), row["work"]
    assert set(STAGES) - held <= {"trace"}


def test_a_table_names_device_work_spread_peers_and_parts():
    row = timing("t-SNE", {"ours": [0.4, 0.9, 0.5], "sklearn": [4.0]}, parts={"repulsion": 0.3})
    report = {"device": "A GPU", "versions": {"torch": "2.15.0"}, "stages": {"tsne": {"timings": [row]}, "old": {}}}
    table = readme.table(json.loads(json.dumps(report)))
    assert table.startswith("**A GPU** (torch 2.15.0):\n")
    assert "| t-SNE | 0.5 (0.4-0.9) | sklearn 4 (8.0x), of which repulsion 0.3 |" in table


def test_results_of_other_versions_are_not_mixed(tmp_path, capsys):
    file = str(tmp_path / "results.json")
    report = {"device": "A GPU", "versions": {"torch": "2.15.0"}, "quick": False}
    assert kept(file, report) == {}
    Path(file).write_text(json.dumps(report | {"stages": {"tsne": {}}}))
    assert kept(file, report) == {"tsne": {}}
    assert kept(file, report | {"versions": {"torch": "2.16.0"}}) == {}
    assert "is begun anew" in capsys.readouterr().out


def test_copies_to_the_host_are_those_after_the_upload_of_the_images():
    def copy(ts, direction, size):
        return {"cat": "gpu_memcpy", "ts": ts, "name": f"Memcpy {direction} (x -> y)", "args": {"bytes": size}}

    events = [
        copy(1, "DtoH", 9000),  # weights, to hash them
        copy(2, "HtoD", 500),
        copy(3, "HtoD", 300),
        {"cat": "kernel", "ts": 4, "name": "repel", "args": {}},
        copy(5, "DtoH", 80),
        copy(6, "DtoD", 7000),
        copy(4, "DtoH", 8),
    ]
    assert copies_to_host(events, 500) == [80, 8]
    with pytest.raises(ValueError, match="no upload of 501 bytes"):
        copies_to_host(events, 501)


def test_a_row_that_fails_leaves_the_others_and_its_error(tmp_path, monkeypatch):
    def run(options, stage):
        for number in range(3):
            with stage.part(f"row {number}"):
                stage.row(timing(f"work {number}", {"ours": [1 / (number - 1)]}))

    file = tmp_path / "results.json"
    monkeypatch.setitem(STAGES, "unpool", run)
    monkeypatch.setitem(STAGES, "tsne", lambda options, stage: stage.bar(bars.DESCENT, 0.04))
    arguments = ["--device", "cpu", "--quick", "--json", str(file), "--stage"]
    assert command.main([*arguments, "tsne"]) == 0
    assert command.main([*arguments, "unpool"]) == 1
    stages = json.loads(file.read_text())["stages"]
    assert [row["work"] for row in stages["unpool"]["timings"]] == ["work 0", "work 2"]
    assert stages["unpool"]["error"] == "row 1: ZeroDivisionError: division by zero"
    assert not stages["unpool"]["complete"]
    assert stages["tsne"]["bars"] == [{"what": bars.DESCENT, "value": 0.04, "limit": "<= 0.05", "met": True}]
    assert stages["tsne"]["complete"]
    assert "error" not in stages["tsne"]


def test_each_row_is_saved_and_what_there_is_no_time_for_is_said():
    saved = []
    stage = Stage(lambda record: saved.append(json.loads(json.dumps(record))), budget=0)
    assert (saved[0]["complete"], saved[0]["error"]) == (False, "stopped before its end")
    times, results = stage.interleaved({"ours": lambda turn: turn, "peer": lambda turn: turn}, 3)
    assert results == {"ours": [0]}
    stage.row(timing("work", times))
    assert saved[-1]["timings"][0]["seconds"] == times["ours"][0]
    assert saved[-1]["left_out"] == ["peer, from round 1 of 3 on", "ours, from round 2 of 3 on"]
    assert not stage.fits("a row")
    stage.finish()
    assert saved[-1]["complete"]


def test_a_peer_that_fails_is_left_out_and_ours_is_not():
    def broken(turn):
        raise RuntimeError(f"round {turn}")

    stage = Stage()
    times, _ = stage.interleaved({"ours": abs, "peer": broken, "other": abs}, 2)
    assert {name: len(spent) for name, spent in times.items()} == {"ours": 2, "other": 2}
    assert stage.record["error"] == "peer: RuntimeError: round 0"
    with pytest.raises(RuntimeError):
        stage.interleaved({"ours": broken}, 1)


def test_bars_have_their_limits_in_one_table_and_nan_meets_none():
    assert [bars.bar(bars.TABLE3, value)["met"] for value in (15, 15.1, float("nan"))] == [True, False, False]
    assert bars.bar("mine", 2, ">=", 2) == {"what": "mine", "value": 2.0, "limit": ">= 2", "met": True}
    assert {one.stage for one in bars.BARS} <= set(check.STAGES)
    assert {*check.BENCHMARKS, *check.MORE} == set(STAGES)


def test_made_images_have_classes_that_a_map_can_show():
    images = made(600)
    assert images.pixels.shape == (600, 1, 28, 28)
    assert images.labels.bincount().tolist() == [60] * 10
    X = images.pixels.flatten(1).float()
    nearest = (X[:, None] - X).square().sum(dim=2).fill_diagonal_(float("inf")).argmin(dim=1)
    assert 0.7 < (images.labels[nearest] == images.labels).float().mean() < 0.99
    assert not (made(600, seed=1).pixels == images.pixels).all()


def test_what_is_timed_without_affinities_is_the_same_embedding():
    X = torch.randn(150, 5, generator=torch.Generator().manual_seed(0))
    P = tsne.joint_affinities(X, perplexity=tsne.PERPLEXITY)
    assert torch.equal(tsne.descent(P, 260, 3), tsne.ours(X, 260, 3))


STAND_IN = f"""#!{sys.executable}
import os, sys, time
arguments = sys.argv[1:]
name = arguments[1] if arguments[:1] == ["-m"] else arguments[0]
if "--stage" in arguments:
    sys.path.insert(0, os.getcwd())
    from benchmarks import __main__ as command
    def killed(options, stage):
        stage.row({{"work": "before the end"}})
        os.kill(os.getpid(), 9)
    def failing(options, stage):
        stage.bar("{bars.DECONV}", 2)
        raise RuntimeError("no such thing")
    command.STAGES |= {{"unpool": killed, "deconv": failing}}
    raise SystemExit(command.main(arguments[2:]))
if name == "pytest":
    print("1 failed, 7 passed, 3 deselected in 2 s")
    raise SystemExit(1)
if name == "pip":
    time.sleep(60)
sys.argv[1:] = arguments[2:]
sys.path.insert(0, os.getcwd())
exec(arguments[1], {{"__name__": "__main__"}})
"""


@pytest.fixture
def rehearse(tmp_path, capsys):
    python, out = tmp_path / "python", tmp_path / "out"

    def run(*arguments):
        python.write_text(
            STAND_IN.replace("arguments = sys.argv[1:]", "arguments = sys.argv[1:]; sys.argv[1:] = sys.argv[3:]")
        )
        python.chmod(0o755)
        options = ["--out", str(out), "--python", str(python), "--device", "cpu", "--quick"]
        status = check.main([*options, *arguments])
        return status, json.loads((out / "verdict.json").read_text()), capsys.readouterr().out

    run.out = out
    return run


def test_a_rehearsal_reports_each_stage_and_every_bar(rehearse):
    status, verdict, said = rehearse("tests", "unpool", "deconv", "neighbors")
    assert (status, verdict["ok"]) == (1, False)
    assert {name: (one["result"], one.get("why")) for name, one in verdict["stages"].items()} == {
        "tests": ("failed", "1 failed, 7 passed, 3 deselected in 2 s"),
        "unpool": ("failed", "killed by signal 9"),
        "deconv": ("failed", "FAILED deconv: RuntimeError: no such thing"),
        "neighbors": ("ok", None),
    }
    measured = json.loads((rehearse.out / "benchmarks.json").read_text())["stages"]
    assert measured["unpool"]["timings"] == [{"work": "before the end"}]
    assert measured["unpool"]["error"] == "stopped before its end"
    assert [measured[name]["complete"] for name in ("unpool", "deconv", "neighbors")] == [False, False, True]
    rows = {row["bar"]: row for row in verdict["bars"]}
    assert [one.what for one in bars.BARS] == [row["bar"] for row in verdict["bars"]][: len(bars.BARS)]
    assert rows["NH: difference to sklearn"]["stage"] == "neighbors"
    assert rows["NH: difference to sklearn"]["value"] <= 1e-12
    assert [rows[what]["value"] for what in (bars.TESTS, bars.DECONV, bars.TABLE3)] == [1, 2, None]
    assert [rows[what]["verdict"] for what in (bars.TESTS, bars.DECONV)] == ["rehearsed", "rehearsed"]
    assert rows[bars.TABLE3]["why"] == "stage table3 was not run"
    assert rows[bars.unpooled(64, 224)]["why"] == "stage unpool failed: killed by signal 9"
    summary = (rehearse.out / "summary.md").read_text()
    assert summary in said
    assert f"| {bars.TABLE3} |  | <= 15 | not measured: stage table3 was not run |" in summary
    assert sorted(os.listdir(rehearse.out)) == ["benchmarks.json", "check.log", "summary.md", "verdict.json"]


def test_a_stage_is_stopped_and_those_without_time_are_not_run(rehearse, monkeypatch):
    here = {"device": "A GPU", "versions": {}, "quick": True, "rehearsal": True}
    monkeypatch.setattr(check, "about", lambda options: dict(here))
    monkeypatch.setitem(check.SHORTER, "install", 1)
    status, verdict, _ = rehearse("install")
    assert status == 1
    assert verdict["stages"]["install"]["why"] == "stopped after 1 s"
    status, verdict, _ = rehearse("doctor", "--seconds", "0")
    assert status == 1
    results = {name: entry["result"] for name, entry in verdict["stages"].items()}
    assert results == {"install": "timed out", "doctor": "not run"}  # what an earlier run left is kept
    assert verdict["stages"]["doctor"]["why"] == "the 0 s were over"
    here["device"] = "Another"
    status, verdict, _ = rehearse("doctor", "--seconds", "0")
    assert (status, list(verdict["stages"])) == (0, ["doctor"])


def test_why_a_bar_is_not_measured():
    verdict = {"device": "NVIDIA H100", "versions": {"torch": "2.11.0"}, "rehearsal": False}
    ok = {"result": "ok", "seconds": 1}
    verdict["stages"] = {"tsne": ok, "deconv": ok, "memcheck": {"result": "skipped", "seconds": 0, "why": "not here"}}
    records = {
        "tsne": {"bars": [bars.bar(bars.DESCENT, 0.06), bars.bar("KL", 0.0, "<=", 0)]},
        "deconv": {"bars": [], "left_out": ["every map of every layer of vgg19"]},
    }
    rows = {row["bar"]: row for row in check.table(verdict, records)}
    assert rows[bars.DESCENT]["verdict"] == "MISSED"
    assert (rows["KL"]["verdict"], rows["KL"]["stage"]) == ("met", "tsne")
    assert rows[bars.RATIO]["why"] == "cuml is not installed"
    assert rows[bars.EMBEDDING]["why"] == "stage tsne did not measure it"
    assert rows[bars.DECONV]["why"] == "no time for every map of every layer of vgg19"
    assert rows[bars.sanitized("memcheck")]["why"] == "not here"
    said = check.markdown(verdict | {"bars": list(rows.values())}, records)
    assert "The bars are meant for this device" in said
    assert f"| {bars.DESCENT} | 0.06 | <= 0.05 | MISSED |" in said


def test_errors_are_counted_only_of_what_came_to_its_end():
    def count(stage, text, *, complete=True):
        return [one["value"] for one in check.counted(stage, text, complete=complete)]

    assert count("memcheck", "5 passed\n========= ERROR SUMMARY: 0 errors") == [0]
    assert count("memcheck", "========= ERROR SUMMARY: 0 errors", complete=False) == []
    assert count("memcheck", "========= ERROR SUMMARY: 3 errors", complete=False) == [3]
    assert count("racecheck", "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)") == [2]
    assert count("memcheck", "5 passed") == []
    assert count("tests", "2 failed, 90 passed, 1 error in 3 s") == [3]
    assert count("tests", "no tests ran in 1 s") == []


def test_what_a_sanitizer_runs_is_there():
    """Of each file some test, and none by a name that it no longer has."""
    files = [(readme.ROOT / name).read_text() for name in check.KERNEL_TESTS if name.endswith(".py")]
    tests = [" ".join(re.findall(r"def (test_\w+)", text)) for text in files]
    names = re.findall(r"[a-z_]{6,}", check.KERNEL_TESTS[-1])
    assert all(any(name in one for one in tests) for name in names)
    assert all(any(name in one for name in names) for one in tests)


def test_gpu_check_is_a_script_that_knows_its_stages():
    script = readme.ROOT / "benchmarks" / "gpu_check.sh"
    wrong = subprocess.run(["bash", script, "nonsense"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "unknown stage nonsense: allowed are install doctor tests memcheck racecheck bits" in wrong.stderr


LONG = ("bits", "transfer", "forward", "layers", "pca", "tsne", "unpool", "table3")


@pytest.mark.parametrize(
    "stage", ["neighbors", "affinities", *(pytest.param(stage, marks=pytest.mark.slow) for stage in LONG)]
)
def test_a_stage_on_a_simulated_device(gpu, stage, tmp_path, monkeypatch):
    """Whether it runs: its numbers are an interpreter's. Kernels of t-SNE are only counted from the fourth on."""
    for name, small in (("PRODUCT", 64), ("COPY", 2**16)):
        monkeypatch.setattr(peaks, name, {"cpu": small, "cuda": small})
    monkeypatch.setattr(peaks, "SECONDS", 0.01)
    gpu.run = dict.fromkeys(("repel", "attract", "update"), 3)
    options = ["--device", "cuda", "--quick", "--images", "60", "--network", "alexnet", "--stage", stage]
    assert command.main([*options, "--json", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())["stages"][stage]
    assert found["complete"]
    assert "error" not in found
