"""One run, one folder: writers at once, folders of other commands, what killed runs left, no locks at all."""

import errno
import fcntl
import json
import logging
import os
import shutil
import time

import pytest
from hard import made
from hard.made import refused
from tiny_sweep import changed

from qdv_gpu.files import STALE, TEMPORARY, _say_unlockable, abandoned, locked, remove_leftovers, replacing
from qdv_gpu.report.folder import RunFolder
from qdv_gpu.results.store import Store
from qdv_gpu.sealed import read_sealed
from qdv_gpu.studies.plot import plot
from qdv_gpu.studies.report import write_report


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    made.quick_pictures(monkeypatch)


# What writes to a folder, which of its folders it locks, and the same with other settings.
WRITERS = {
    "analyze": (lambda out, top: made.analysed(out), "", lambda out, top: made.analysed(out, perplexity=6)),
    "compare": (lambda out, top: made.compared(out, top), "", lambda out, top: made.compared(out, top, margin=0.5)),
    "compare networks": (
        lambda out, top: made.both_compared(out), "", lambda out, top: made.both_compared(out, perplexity=6)
    ),
    "finetune": (lambda out, top: made.trained(out), "", lambda out, top: made.trained(out, lr=0.1)),
    "sweep": (lambda out, top: made.swept(out), "",
              lambda out, top: made.swept(out, changed(run={**made.TABLE["run"], "perplexity": 6}))),
    "deconv": (lambda out, top: made.drawn(out), "deconv", lambda out, top: made.drawn(out, mode="gradient")),
    "plot": (lambda out, top: made.plotted(out, top), "", lambda out, top: made.plotted(out, top, k=4)),
    "export": (lambda out, top: made.exported(out, top), "",
               lambda out, top: made.exported(out, top, "tensorboard")),
    "profile": (lambda out, top: made.profiled(out), "", None),
}  # fmt: skip
QUICK = ["analyze", "compare", "finetune", "deconv", "plot", "export"]


def tree(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(TEMPORARY)]


@pytest.mark.parametrize("settings", ["the same", "other"])
@pytest.mark.parametrize("name", [name for name in WRITERS if name != "profile"])
def test_a_second_writer_is_refused(top, tmp_path, name, settings):
    same, below, other = WRITERS[name]
    out = tmp_path / "out"
    with locked(out / below) as free:
        assert free
        said = refused(same if settings == "the same" else other, out, top)
    assert "is writing to" in said
    assert str(out) in said
    assert not tree(out)
    if name in QUICK:
        same(out, top)  # the lock is gone with who held it
        assert tree(out)


@pytest.mark.parametrize("name", ["analyze", "compare", "finetune"])
def test_a_lock_dies_with_its_process(top, tmp_path, name):
    out = tmp_path / "out"
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with locked(out):
            os.write(write, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    assert "is writing to" in refused(WRITERS[name][0], out, top)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    os.close(read)
    os.close(write)
    WRITERS[name][0](out, top)


def test_networks_are_compared_under_one_lock(tmp_path, monkeypatch):
    """Nobody gets at the folder between its analysis and its comparison."""
    import qdv_gpu.studies.compare as module

    seen = []
    write = module.write_comparison

    def look(folder, *rest):
        with locked(folder.out) as free:
            seen.append(free)
        return write(folder, *rest)

    monkeypatch.setattr(module, "write_comparison", look)
    made.both_compared(tmp_path / "out")
    assert seen == [False]


# A name of ours, in folders that a run of the command looks through.
PLACES = {
    "analyze": ["", "embeddings/x", "figures", "thumbnails"],
    "compare": ["", "figures"],
    "finetune": [""],
    "sweep": ["", "points/x/analysis", "training/x"],
    "deconv": ["deconv", "deconv/cnn"],
    "plot": [""],
    "export": [""],
    "profile": [""],
}
SLOW = ("sweep", "profile")
LEFT = [
    pytest.param(name, place, marks=[pytest.mark.slow] if name in SLOW else [])
    for name, places in PLACES.items()
    for place in places
]


@pytest.mark.parametrize(("name", "place"), LEFT)
def test_what_killed_runs_left_is_removed(top, tmp_path, name, place):
    """Also if there is nothing else yet: as a run leaves that is killed in its first write."""
    folder = tmp_path / "out" / place
    folder.mkdir(parents=True)
    (folder / f"{TEMPORARY}abcd_123.json").write_text("{")
    (folder / f"{TEMPORARY}zzzzzzzz").write_text("")
    if place and name not in ("deconv", "plot"):  # it is in a folder of a run
        shutil.rmtree(tmp_path / "out")
        WRITERS[name][0](tmp_path / "out", top)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{TEMPORARY}abcd_123.json").write_text("{")
    WRITERS[name][0](tmp_path / "out", top)
    assert not leftovers(tmp_path / "out")


@pytest.mark.parametrize("name", QUICK)
def test_what_is_not_ours_or_alive_stays(top, tmp_path, name):
    call, below, _ = WRITERS[name]
    out = tmp_path / "out"
    call(out, top)
    folder = out / below
    theirs = [f"{TEMPORARY}notes.txt", f"{TEMPORARY}of-my-own-.json", ".qdv-gpu", "tmpabcdefgh", f"{TEMPORARY}ABCDEFGH"]
    for one in theirs:
        (folder / one).write_text("mine")
    (folder / f"{TEMPORARY}folder__").mkdir()
    (folder / f"{TEMPORARY}abcdefgh").symlink_to(folder / theirs[0])
    with replacing(folder / "alive.txt") as alive:
        alive.write_text("not finished")
        call(out, top)
        assert alive.read_text() == "not finished"
    assert (folder / "alive.txt").read_text() == "not finished"
    assert [(folder / one).read_text() for one in theirs] == ["mine"] * len(theirs)
    assert (folder / f"{TEMPORARY}folder__").is_dir()
    assert (folder / f"{TEMPORARY}abcdefgh").is_symlink()


FOREIGN = {
    "a file": lambda out: (out / "notes.txt").write_text("mine"),
    "a folder": lambda out: (out / "notes").mkdir(),
    "hidden": lambda out: (out / ".notes").write_text("mine"),
    "almost ours": lambda out: (out / f"{TEMPORARY}notes.txt").write_text("mine"),
}


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("name", ["analyze", "compare", "finetune", "sweep"])
def test_folders_of_others_are_refused_and_left(top, tmp_path, name, foreign):
    out = tmp_path / "out"
    out.mkdir()
    FOREIGN[foreign](out)
    (out / f"{TEMPORARY}abcd_123.json").write_text("{")
    before = tree(out)
    assert f"{out} is not empty and holds no " in refused(WRITERS[name][0], out, top)
    assert tree(out) == before


KINDS = {"analyze": "a", "compare": "c", "finetune": "t", "sweep": "s"}


@pytest.mark.parametrize("old", [False, True], ids=["", "of an older version"])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("there", KINDS)
def test_folders_of_other_commands_are_refused_and_left(top, tmp_path, there, name, old):
    if there == name or (there, name) == ("analyze", "compare"):  # a comparison may stand beside an analysis
        return
    shutil.copytree(top / KINDS[there], tmp_path / "out")
    record = tmp_path / "out" / "run.json"
    if old and record.is_file():
        about = read_sealed(record)
        del about["kind"]
        record.write_text(json.dumps({**about, "files": sorted(about["files"])}))
    before = tree(tmp_path / "out")
    assert "choose another --out" in refused(WRITERS[name][0], tmp_path / "out", top)
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("name", QUICK)
def test_file_systems_without_locks_are_said_once(top, tmp_path, monkeypatch, caplog, name):
    def never(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", never)
    _say_unlockable.cache_clear()
    folder = tmp_path / "out" / WRITERS[name][1]
    folder.mkdir(parents=True)
    for stem, age in (("freshfre", 0), ("staleold", 2 * STALE)):
        file = folder / f"{TEMPORARY}{stem}.json"
        file.write_text("{")
        os.utime(file, (time.time() - age,) * 2)
    with caplog.at_level(logging.WARNING, "qdv_gpu"):
        WRITERS[name][0](tmp_path / "out", top)
        WRITERS[name][0](tmp_path / "out", top)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == ["the file system here has no locks: see to it that no two runs write to one folder at a time"]
    assert [path.name for path in leftovers(tmp_path / "out")] == [f"{TEMPORARY}freshfre.json"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL])
def test_errors_of_locks_that_say_that_there_are_none(tmp_path, monkeypatch, number):
    def never(*_):
        raise OSError(number, "no")

    monkeypatch.setattr(fcntl, "flock", never)
    with locked(tmp_path) as free, locked(tmp_path) as again:
        assert free
        assert again
    (tmp_path / "x").touch()
    with abandoned(tmp_path / "x") as dead:
        assert not dead


def test_an_unfinished_run_does_not_keep_others_settings(tmp_path, monkeypatch):
    """Killed before its end, and then run with other settings: the folder says those, and shows their maps."""
    import qdv_gpu.studies.analyze as module

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(module.figures, "maps_figure", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            made.analysed(out, layers=("relu", "pool"))
        assert "did not come to its end" in refused(plot, out, tmp_path / "p")
        first = read_sealed(out / "run.json")
        assert first["finished"] is False
        with pytest.raises(RuntimeError, match="killed"):
            made.analysed(out, perplexity=6)
    about = read_sealed(out / "run.json")
    assert about["settings"]["perplexity"] == 6
    assert about["finished"] is False
    made.analysed(out, perplexity=6)
    assert sorted(path.stem for path in out.glob("embeddings/*/*.npz")) == ["relu@1", "relu@2"]
    files = {name for name in tree(out) if name != "run.json"}
    assert files == read_sealed(out / "run.json")["files"].keys()


def test_a_finished_run_is_not_shown_with_maps_of_a_later_one(top, tmp_path, monkeypatch):
    import qdv_gpu.studies.analyze as module

    shutil.copytree(top / "a", tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(module.figures, "maps_figure", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            made.analysed(tmp_path / "a", perplexity=6)
    assert "is damaged (ValueError: table3.csv is not what" in refused(made.plotted, tmp_path / "o", tmp_path)
    assert "is damaged (ValueError: predictions.csv is not what" in refused(made.exported, tmp_path / "o", tmp_path)
    made.analysed(tmp_path / "a")
    made.plotted(tmp_path / "o", tmp_path)


def test_leftovers_of_a_store(top, tmp_path):
    store = Store(made.copy(top / ".qdv-store", tmp_path / "store"))
    (store.path / "runs" / f"{TEMPORARY}abcdefgh").write_text("{")
    (store.path / "tmp" / "killed").mkdir(parents=True)
    with locked(store.path / "tmp" / "alive") as free:
        assert free
        with store.used():
            assert [path.name for path in (store.path / "tmp").iterdir()] == ["alive"]
    assert not leftovers(store.path)


def test_unfinished_files_are_locked_before_they_are_seen(tmp_path, monkeypatch):
    """Taken for a leftover in the moment before its lock, an unfinished file is begun again."""
    import qdv_gpu.files as module

    lock, seen = module._flock, []

    def late(handle, operation):
        if not seen:
            seen.append(leftovers(tmp_path))
            monkeypatch.setattr(module, "_flock", lock)
            remove_leftovers(tmp_path)
        return lock(handle, operation)

    monkeypatch.setattr(module, "_flock", late)
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert len(seen[0]) == 1
    assert (tmp_path / "a.txt").read_text() == "whole"
    assert not leftovers(tmp_path)


def test_files_outside_are_never_removed(tmp_path):
    """Whatever the list of files in run.json says."""
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    folder = RunFolder(tmp_path / "out")
    (tmp_path / "out").mkdir()
    names = {"../outside.txt": None, str(outside): None, "inside.txt": None}
    (tmp_path / "out" / "inside.txt").write_text("ours")
    (tmp_path / "out" / "run.json").write_text(json.dumps({"kind": "analyze", "files": names}))
    with folder.locked({}):
        folder.finish({})
    assert outside.read_text() == "mine"
    assert not (tmp_path / "out" / "inside.txt").exists()


@pytest.mark.parametrize("name", ["run.json", "layers.csv", "figures/maps.png"])
def test_a_page_is_written_over_pages_alone(top, tmp_path, name):
    run = shutil.copytree(top / "a", tmp_path / "a")
    before = tree(run)
    assert "is no page" in refused(write_report, run, run / name)
    assert tree(run) == before
    write_report(run, run / "report.html")


@pytest.mark.parametrize("make", [made.analysed, made.trained, made.drawn, made.swept])
def test_an_empty_path_is_not_the_current_folder(make):
    assert refused(make, "") == "out must be a path, got ''"


@pytest.mark.parametrize("name", ["analyze", "finetune", "sweep"])
def test_a_store_that_is_a_looping_link(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    make = {"analyze": made.analysed, "finetune": made.trained, "sweep": made.swept}[name]
    assert "loop" in refused(make, tmp_path / "out", store=tmp_path / "loop")
    make(tmp_path / "out")
