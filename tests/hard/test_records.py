"""Damaged records: an error in one line where a run is read; where it is computed a warning, and the same bytes."""

import json
import logging
import shutil
import sys

import numpy as np
import pytest
import torch
from hard import made
from hard.damages import (
    ARRAYS,
    BYTES,
    RECORD,
    TEXT,
    a_digit,
    a_folder,
    copied,
    cut_short,
    edited,
    empty,
    flipped,
    gone,
    no_keys,
    not_a_number,
    null,
    resealed,
    tensors_like,
    truncated,
    unsealed,
    zeros,
)
from hard.made import refused
from tiny_sweep import rows

from qdv_gpu import load_network
from qdv_gpu.cli import main
from qdv_gpu.networks.weights import read_weights
from qdv_gpu.results.store import ARRAYS as NUMBERS
from qdv_gpu.results.store import MANIFEST, Store
from qdv_gpu.sealed import read_sealed, write_sealed
from qdv_gpu.studies.compare import compare
from qdv_gpu.studies.export import export
from qdv_gpu.studies.plot import plot
from qdv_gpu.studies.report import write_report
from qdv_gpu.studies.status import status


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    made.quick_pictures(monkeypatch)


def named(values):
    return [getattr(value, "__name__", str(value)) for value in values]


READERS = {
    "compare": lambda run, top, out: compare(run, top / "b", out=out),
    "compare with": lambda run, top, out: compare(top / "b", run, out=out),
    "report": lambda run, top, out: write_report(run, out / "report.html"),
    "export": lambda run, top, out: export(run, out, to="csv"),
    "plot": lambda run, top, out: plot(run, out),
}
MAPS = "embeddings/cnn/relu@2.npz"
READ = {
    "run.json": (RECORD, ["compare", "report", "export", "plot"]),
    "predictions.csv": ([*BYTES, cut_short, a_digit, gone], ["compare", "compare with", "report", "export"]),
    "table3.csv": ([*BYTES, cut_short, a_digit, gone], ["report", "export", "plot"]),
    "timings.json": ([truncated, flipped, empty, zeros, a_folder, null, edited, not_a_number], ["report", "export"]),
    MAPS: ([*BYTES, cut_short, gone, copied("relu@1.npz"), *ARRAYS.values()], ["report", "export", "plot"]),
    "thumbnails/000.webp": ([truncated, flipped, empty, zeros, a_folder], ["report", "export"]),
}
REFUSED = [
    pytest.param(name, damage, reader, id=f"{name.rpartition('/')[2]}-{number}-{reader}")
    for name, (damages, readers) in READ.items()
    for number, damage in enumerate(damages)
    for reader in readers
    if not (damage is a_folder and name == "timings.json")
]


@pytest.fixture
def run(top, tmp_path):
    return shutil.copytree(top / "a", tmp_path / "run")


@pytest.mark.parametrize(("name", "damage", "reader"), REFUSED)
def test_a_damaged_run_is_refused(top, tmp_path, name, damage, reader):
    run = shutil.copytree(top / "a", tmp_path / "run")
    damage(run / name)
    assert str(run) in refused(READERS[reader], run, top, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", ["report", "export", "plot"])
@pytest.mark.parametrize("damage", [*ARRAYS.values(), truncated, empty, zeros, gone], ids=[*ARRAYS, *"tezg"])
def test_maps_without_a_hash_are_refused_by_what_they_are(top, run, tmp_path, damage, reader):
    unsealed(run)
    READERS[reader](run, top, tmp_path / "as it was")
    damage(run / MAPS)
    assert f"{run} is damaged (" in refused(READERS[reader], run, top, tmp_path / "out")


SAID = [
    ({"settings": 3}, ["plot", "export", "compare"]),
    ({"settings": None}, ["report", "export", "plot"]),
    ({"classes": None}, ["compare", "report", "export", "plot"]),
    ({"classes": ["x"]}, ["compare", "report", "export", "plot"]),
    ({"classes": 3}, ["compare", "report", "export", "plot"]),
    ({"networks": None}, ["report", "export"]),
    ({"networks": {"cnn": "x"}}, ["report"]),
    ({"outputs": []}, ["compare", "export"]),
    ({"outputs": {"cnn": [{}]}}, ["compare"]),
    ({"images": {}}, ["compare"]),
    ({"images": []}, ["compare", "export", "report"]),
    ({"store": 3}, ["compare"]),
    ({"finished": False}, ["compare", "report", "export", "plot"]),
]


@pytest.mark.parametrize(
    ("changes", "reader"), [(changes, reader) for changes, readers in SAID for reader in readers], ids=str
)
def test_a_run_that_says_other_things_is_refused(top, run, tmp_path, changes, reader):
    resealed(**changes)(run / "run.json")
    assert str(run) in refused(READERS[reader], run, top, tmp_path / "out")


@pytest.mark.parametrize("changes", [{"layers": [["relu@1", "relu@2"], [1e300, "x"]]}, {"pairs": []}], ids=str)
def test_a_comparison_that_says_other_things_is_refused(top, tmp_path, changes):
    place = shutil.copytree(top / "c", tmp_path / "c")
    resealed(**changes)(place / "comparison.json")
    assert str(place) in refused(write_report, place, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


# What is computed again.


@pytest.fixture
def place(top, tmp_path):
    """A copy of everything but the sweep, whose runs refer to the store beside them."""
    return shutil.copytree(top, tmp_path / "top", ignore=shutil.ignore_patterns("s"))


@pytest.fixture
def swept(top, place):
    """Beside that the sweep."""
    return shutil.copytree(top / "s", place / "s")


def tree(folder):
    """Files below a folder, and of what there is to read their bytes."""
    return {
        str(file.relative_to(folder)): file.read_bytes() if file.suffix in (".csv", ".npz", ".webp", ".md") else b""
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def known(run):
    """The tables, but for the seconds in them."""
    return {name: data for name, data in tree(run).items() if name != "layers.csv"}


@pytest.mark.parametrize("damage", [*RECORD, gone, no_keys], ids=named([*RECORD, gone, no_keys]))
def test_a_run_whose_record_is_damaged_is_written_again(top, place, caplog, damage):
    if damage is gone:
        return  # is_not_empty_and_holds_no_run.json, of which a folder of ours cannot be told from another
    damage(place / "a" / "run.json")
    if damage is a_folder:
        refused(made.analysed, place / "a")
        return
    made.analysed(place / "a")
    assert known(place / "a") == known(top / "a")
    said = warned(caplog)
    assert len(said) == (0 if damage is no_keys else 1), said
    assert all("run.json" in line and "\n" not in line for line in said)
    made.compared(place / "e", place)


@pytest.mark.parametrize("damage", [truncated, empty, gone], ids=named([truncated, empty, gone]))
@pytest.mark.parametrize(
    "name", ["predictions.csv", "table3.csv", "timings.json", "thumbnails/000.webp", "report.html"]
)
def test_files_of_a_run_are_written_again(top, place, caplog, name, damage):
    damage(place / "a" / name)
    made.analysed(place / "a")
    assert known(place / "a") == known(top / "a")
    assert not warned(caplog)


STAGES = ["outputs", "predictions", "components", "map", "scores", "thumbnails"]
STORED = [
    *((MANIFEST, damage) for damage in [*RECORD, gone]),
    *((NUMBERS, damage) for damage in [truncated, flipped, empty, zeros, a_folder, cut_short, gone]),
]
OFTEN = {(MANIFEST, truncated), (MANIFEST, edited), (NUMBERS, flipped)}


def rarely(value, often, name):
    """A parameter that is a matter of minutes with all others, and not with those that are often."""
    return pytest.param(value, id=name, marks=[] if often else [pytest.mark.slow])


@pytest.mark.parametrize(
    ("stage", "damaged"),
    [
        pytest.param(stage, (name, damage), id=f"{stage}-{name}-{damage.__name__}",
                     marks=[] if stage == "scores" or (name, damage) in OFTEN else [pytest.mark.slow])
        for stage in STAGES
        for name, damage in STORED
    ],
)  # fmt: skip
def test_a_damaged_stage_is_computed_again(top, place, caplog, stage, damaged):
    name, damage = damaged
    run = read_sealed(place / "a" / "run.json")
    mine = [entry for entry in Store(place / ".qdv-store").entries() if entry.digest in run["stages"]]
    entry = next(entry for entry in mine if entry.stage == stage)
    damage(entry.folder / name)
    made.analysed(place / "a")
    assert known(place / "a") == known(top / "a")
    (line,) = warned(caplog)
    assert line.startswith(f"{entry.folder} is damaged (")
    assert line.endswith("will be computed again")
    assert Store(place / ".qdv-store").holds(run["stages"])
    made.compared(place / "e", place)


def other(record, name, change):
    return {**record.arrays, name: change(record.arrays[name])}


FORGED = [
    ("components", lambda r: (other(r, "X", lambda X: X[:-1]), r.about)),
    ("components", lambda r: (other(r, "X", lambda X: X.astype(np.float64)), r.about)),
    ("components", lambda r: (other(r, "X", lambda X: X * np.nan), r.about)),
    ("components", lambda r: (r.arrays, {**r.about, "features": 7})),
    ("components", lambda r: (r.arrays, {"features": r.about["features"]})),
    ("components", lambda r: ({}, r.about)),
    ("map", lambda r: (other(r, "Z", lambda Z: Z[:, :1]), r.about)),
    ("map", lambda r: (other(r, "Z", lambda Z: Z.astype(np.float16)), r.about)),
    ("map", lambda r: (other(r, "Z", lambda Z: Z * np.inf), r.about)),
    ("map", lambda r: (r.arrays, {**r.about, "timing": []})),
    ("map", lambda r: (r.arrays, {**r.about, "kl": None})),
    ("map", lambda r: (r.arrays, {})),
    ("scores", lambda r: (other(r, "hits", lambda a: a[:1]), r.about)),
    ("scores", lambda r: (other(r, "neighbors", lambda a: a.astype(np.int64)), r.about)),
    ("scores", lambda r: ({n: a for n, a in r.arrays.items() if n != "spread"}, r.about)),
    ("scores", lambda r: (r.arrays, {**r.about, "maps": r.about["maps"][:1]})),
    ("scores", lambda r: (r.arrays, {**r.about, "maps": {}})),
    ("scores", lambda r: (r.arrays, {**r.about, "mean": {**r.about["mean"], "more": 1}})),
    ("scores", lambda r: (r.arrays, {**r.about, "mean": {**r.about["mean"], "nh": "0.5"}})),
    ("scores", lambda r: (r.arrays, {**r.about, "mean": {**r.about["mean"], "k": 9}})),
    ("predictions", lambda r: (other(r, "classes", lambda a: a + 100), r.about)),
    ("predictions", lambda r: (other(r, "classes", lambda a: a[:-1]), r.about)),
    ("predictions", lambda r: (other(r, "probabilities", lambda a: a.astype(np.float64)), r.about)),
    ("outputs", lambda r: ({}, {**r.about, "calls": {}})),
    ("outputs", lambda r: ({}, {**r.about, "calls": []})),
    ("outputs", lambda r: ({}, {**r.about, "tokens": {"relu": ["cls"]}})),
    ("outputs", lambda r: ({}, {**r.about, "element": None})),
    ("outputs", lambda r: ({}, {**r.about, "predicts": 3})),
    ("thumbnails", lambda r: ({}, {})),
    ("thumbnails", lambda r: ({"000": r.arrays["000"].astype(np.int16)}, {})),
]


def replaced(store, entry, change):
    """Have a stage of the same key hold other things, with hashes that are right."""
    record, _ = store.find(entry.stage, entry.digest)
    said = json.loads((entry.folder / MANIFEST).read_text())
    from qdv_gpu.results.store import Key

    key = Key(said["stage"], said["version"], said["parameters"], tuple(said["parents"]), "forged")
    shutil.rmtree(entry.folder)
    arrays, about = change(record)
    store.write(key, arrays=arrays, about=about)
    (store.path / key.folder).rename(entry.folder)


@pytest.mark.parametrize(("stage", "change"), FORGED, ids=[f"{s}-{i}" for i, (s, _) in enumerate(FORGED)])
def test_a_stage_that_holds_other_things_is_computed_again(top, place, caplog, stage, change):
    store = Store(place / ".qdv-store")
    run = read_sealed(place / "a" / "run.json")
    entry = next(e for e in store.entries() if e.digest in run["stages"] and e.stage == stage)
    replaced(store, entry, change)
    made.analysed(place / "a")
    assert known(place / "a") == known(top / "a")
    (line,) = warned(caplog)
    assert line.startswith(f"{entry.folder} is damaged (")


# Trainings.


def adam(change):
    return tensors_like(lambda t, m: ({n: change(n, v) if n.startswith("adam/") else v for n, v in t.items()}, m))


def weight(change):
    return tensors_like(lambda t, m: ({n: change(v) if n == "fc.weight" else v for n, v in t.items()}, m))


def said(**changes):
    return tensors_like(lambda tensors, metadata: (tensors, {**metadata, **changes}))


CHECKPOINTS = {
    **{damage.__name__: damage for damage in (truncated, cut_short, flipped, empty, zeros)},
    "null": null,
    "adam of other shapes": adam(lambda n, t: t[:1] if t.ndim else t),
    "adam of another type": adam(lambda n, t: t.double()),
    "adam nan": adam(lambda n, t: t * float("nan") if "exp_avg_sq" in n else t),
    "no adam": tensors_like(lambda t, m: ({n: v for n, v in t.items() if not n.startswith("adam/")}, m)),
    "adam of another layer": tensors_like(lambda t, m: ({**t, "adam/step/conv9.weight": torch.ones(())}, m)),
    "part of adam": tensors_like(lambda t, m: ({n: v for n, v in t.items() if "exp_avg/fc" not in n}, m)),
    "weights nan": weight(lambda t: t * float("nan")),
    "weights of another shape": weight(lambda t: t[:-1]),
    "weights of another type": weight(lambda t: t.half()),
    "weights missing": tensors_like(lambda t, m: ({n: v for n, v in t.items() if n != "fc.bias"}, m)),
    "no history": said(history=None),
    "history a dict": said(history={}),
    "history of texts": said(history=[{"loss": "1", "accuracy": "1", "test_accuracy": "1"}]),
    "history nan": said(history=[{"loss": float("nan"), "accuracy": 0.5, "test_accuracy": 0.5}]),
    "tiles a text": said(tiles="1"),
    "settings a list": said(settings=[1]),
    "settings null": said(settings=None),
}


@pytest.mark.parametrize("damage", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_training_starts_again_from_a_damaged_checkpoint(top, tmp_path, caplog, damage):
    made.trained(tmp_path / "t", epochs=1)
    damage(tmp_path / "t" / "checkpoint.safetensors")
    shutil.rmtree(tmp_path / ".qdv-store")
    made.trained(tmp_path / "t")
    own, expected = (read_weights(place / "t" / "weights.safetensors")[0] for place in (tmp_path, top))
    assert all(torch.equal(tensor, own[name]) for name, tensor in expected.items())
    (line,) = warned(caplog)
    assert "checkpoint.safetensors is damaged (" in line
    assert line.endswith("training starts from its first epoch")


@pytest.mark.parametrize("damage", [said(settings={"network": "x"}), tensors_like(lambda t, m: (t, {}))])
def test_a_checkpoint_of_others_is_refused_and_left(top, place, damage):
    file = place / "t" / "checkpoint.safetensors"
    damage(file)
    before = file.read_bytes()
    assert "choose another --out" in refused(made.trained, place / "t", epochs=3)
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", [*BYTES, cut_short], ids=named([*BYTES, cut_short]))
def test_damaged_weights_are_refused_and_written_again(top, place, damage):
    file = place / "t" / "weights.safetensors"
    damage(file) if damage is not a_folder else truncated(file)
    assert str(file) in refused(load_network, f"{made.A}={place / 't'}")
    made.trained(place / "t")
    expected = read_weights(top / "t" / "weights.safetensors")[0]
    own = read_weights(file)[0]
    assert all(torch.equal(tensor, own[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["finetune.json", "comparison.json"])
@pytest.mark.parametrize("damage", RECORD, ids=named(RECORD))
def test_reports_refuse_records_that_are_damaged(top, place, tmp_path, name, damage):
    folder = place / {"finetune.json": "t", "comparison.json": "c"}[name]
    damage(folder / name)
    assert str(folder) in refused(write_report, folder, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    if damage in (truncated, edited, null):
        made.trained(folder) if name == "finetune.json" else made.compared(folder, place)
        assert read_sealed(folder / name) == read_sealed(top / folder.name / name)
        write_report(folder, tmp_path / "report.html")


@pytest.mark.parametrize("damage", [*BYTES, cut_short], ids=named([*BYTES, cut_short]))
def test_reports_refuse_pictures_that_are_damaged(top, tmp_path, damage):
    """But for bytes behind a picture's end, which change nothing of it."""
    shutil.copytree(top / "d", tmp_path / "d")
    (picture,) = (tmp_path / "d").glob("deconv/*/*.png")
    damage(picture)
    if damage.__name__ in ("doubled", "cut_short"):
        write_report(tmp_path / "d")
    else:
        assert str(picture) in refused(write_report, tmp_path / "d")


@pytest.mark.parametrize(
    ("name", "command"),
    [("run.json", "compare {a} {b} --out {o}"), ("predictions.csv", "report {a}"), ("table3.csv", "plot {a}"),
     ("predictions.csv", "export {a} --to csv"), ("run.json", "export {a} --to parquet --out {o}")],
)  # fmt: skip
def test_the_command_line_says_it_in_one_line(place, monkeypatch, capsys, name, command):
    truncated(place / "a" / name)
    words = command.format(a=place / "a", b=place / "b", o=place / "o").split()
    monkeypatch.setattr(sys, "argv", ["qdv-gpu", *words])
    assert main() == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("qdv-gpu: ")
    assert err.count("\n") == 1


# Sweeps.


@pytest.mark.parametrize("name", ["sweep.csv", "ranking.md", "run.json"])
@pytest.mark.parametrize("damage", [rarely(d, d is flipped, d.__name__) for d in (flipped, truncated, empty, zeros)])
def test_a_damaged_sweep_is_not_shown_and_written_again(top, swept, caplog, name, damage):
    damage(swept / name)
    assert str(swept) in refused(write_report, swept)
    found = made.swept(swept)
    assert not found.failed
    assert rows(swept) == rows(top / "s")
    assert len(warned(caplog)) == (name == "run.json")
    write_report(swept)


POINT = [
    "result.json",
    "started.json",
    "error.json",
    "analysis/run.json",
    "analysis/predictions.csv",
    "analysis/table3.csv",
]


@pytest.mark.parametrize("name", POINT)
@pytest.mark.parametrize("damage", [rarely(d, d is edited, d.__name__) for d in (edited, truncated, empty, null)])
def test_a_damaged_point_is_computed_again(top, swept, caplog, name, damage):
    (point, _) = sorted((swept / "points").iterdir())
    if name == "error.json":
        (point / "result.json").unlink()
        write_sealed(point / name, {"message": "it failed", "seconds": 1.5, "attempt": 1})
    (a_digit if damage is edited and name.endswith("csv") else damage)(point / name)
    status(swept)
    found = made.swept(swept)
    assert not found.failed
    assert rows(swept) == rows(top / "s")
    lines = warned(caplog)
    expected = 0 if name == "started.json" else 1  # of what is done it is not read
    assert len(lines) == expected, lines
    assert all("again" in line and "\n" not in line for line in lines)
    assert not (point / "error.json").exists()


@pytest.mark.parametrize("damage", [*RECORD, no_keys], ids=named([*RECORD, no_keys]))
def test_a_damaged_list_of_points_is_refused(swept, damage):
    damage(swept / "sweep.json")
    if damage is not a_folder:
        assert "sweep.json is damaged, or of another version" in refused(status, swept)
    refused(made.swept, swept)


# References from the store.


@pytest.mark.parametrize("damage", [*TEXT, no_keys], ids=named([*TEXT, no_keys]))
@pytest.mark.parametrize("which", ["run.json", "reference"])
def test_stages_are_not_removed_if_it_cannot_be_told_who_needs_them(top, tmp_path, which, damage):
    made.copy(top / ".qdv-store", tmp_path / "store")
    store, run = Store(tmp_path / "store"), tmp_path / "run"
    shutil.rmtree(store.path / "runs")
    shutil.copytree(top / "a", run)
    store.refer(run)
    assert {entry.stage for entry in store.unreferenced()} >= {"weights"}
    (reference,) = (store.path / "runs").iterdir()
    damage(reference if which == "reference" else run / "run.json")
    refused(store.unreferenced)
    if damage is not a_folder and which == "reference":
        store.refer(run)
        store.unreferenced()


@pytest.mark.parametrize("damage", [*TEXT, no_keys], ids=named([*TEXT, no_keys]))
def test_a_damaged_list_of_exported_files_is_refused(top, tmp_path, damage):
    export(top / "a", tmp_path / "out", to="csv")
    damage(tmp_path / "out" / "export.json")
    before = tree(tmp_path / "out")
    assert "export.json is there and not of an earlier export" in refused(export, top / "a", tmp_path / "out", to="csv")
    assert tree(tmp_path / "out") == before
