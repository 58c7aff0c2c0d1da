"""The store: what is read is what was written, or it is computed again."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from qdv_gpu.errors import InputError
from qdv_gpu.files import write_json
from qdv_gpu.results.store import ARRAYS, MANIFEST, Key, Store

KEY = Key("map", 1, {"perplexity": 40.0, "seed": 0}, ("ab" * 32,), label="alexnet conv3")
ARRAY = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    store.write(KEY, arrays={"Z": ARRAY}, about={"kl": 1.25})
    return store


def test_files_have_the_permissions_of_any_other_and_the_mask_is_not_touched(tmp_path, monkeypatch):
    (tmp_path / "plain").touch()

    def touched(mask):
        raise AssertionError("a file that another thread makes now could be written to by anybody")

    monkeypatch.setattr(os, "umask", touched)
    write_json(tmp_path / "ours", 5)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QDV_GPU_STORE", "~/kept")
    assert Store.beside(tmp_path / "runs" / "a").path == tmp_path / "kept"
    assert Store.beside(tmp_path / "runs" / "a", "own").path.name == "own"
    monkeypatch.setenv("QDV_GPU_STORE", "")
    assert Store.beside(tmp_path / "runs" / "a").path == tmp_path / "runs" / ".qdv-store"


def test_what_is_written_is_read(store):
    record = store.read(KEY)
    assert record.about == {"kl": 1.25}
    np.testing.assert_array_equal(record.arrays["Z"], ARRAY)
    assert record.folder.name == f"alexnet_conv3-{KEY.digest[:16]}"
    assert store.read(Key("map", 1, {"perplexity": 40.0, "seed": 1}, KEY.parents)) is None


def test_everything_in_a_key_counts_but_its_label():
    others = [
        Key("maps", 1, KEY.parameters, KEY.parents),
        Key("map", 2, KEY.parameters, KEY.parents),
        Key("map", 1, {**KEY.parameters, "perplexity": 41.0}, KEY.parents),
        Key("map", 1, KEY.parameters, ("cd" * 32,)),
        Key("map", 1, KEY.parameters),
    ]
    assert len({key.digest for key in [KEY, *others]}) == 6
    assert Key("map", 1, dict(reversed(KEY.parameters.items())), KEY.parents, label="other").digest == KEY.digest


def test_files_are_kept_too(store, tmp_path):
    (tmp_path / "weights").write_bytes(b"abc")
    key = Key("weights", 1, {})
    store.write(key, files={"weights.safetensors": tmp_path / "weights"})
    assert (store.read(key).folder / "weights.safetensors").read_bytes() == b"abc"


def test_the_second_to_write_leaves_the_first(store):
    store.write(KEY, arrays={"Z": ARRAY + 1})
    np.testing.assert_array_equal(store.read(KEY).arrays["Z"], ARRAY)
    assert not list(store.path.glob("tmp/*"))


def rewrite(folder, **changes):
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(content | changes))


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "truncated arrays": lambda f: (f / ARRAYS).write_bytes((f / ARRAYS).read_bytes()[:-40]),
    "flipped bit": lambda f: flip(f / ARRAYS),
    "empty arrays": lambda f: (f / ARRAYS).write_bytes(b""),
    "no arrays": lambda f: (f / ARRAYS).unlink(),
    "arrays a folder": lambda f: ((f / ARRAYS).unlink(), (f / ARRAYS).mkdir()),
    "truncated manifest": lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text()[:-30]),
    "flipped manifest": lambda f: flip(f / MANIFEST),
    "empty manifest": lambda f: (f / MANIFEST).write_text(""),
    "null manifest": lambda f: (f / MANIFEST).write_text("null"),
    "list manifest": lambda f: (f / MANIFEST).write_text("[1, 2]"),
    "no manifest": lambda f: (f / MANIFEST).unlink(),
    "binary manifest": lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"),
    "newer format": lambda f: rewrite(f, format=99),
    "edited number": lambda f: rewrite(f, about={"kl": 1.0}),
    "edited hash": lambda f: rewrite(f, files={ARRAYS: "0" * 64}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_seen_said_once_and_gone(store, damage, caplog):
    damage(store.path / KEY.folder)
    with caplog.at_level(logging.WARNING):
        assert store.read(KEY) is None
    assert [record.message.endswith("will be computed again") for record in caplog.records] == [True]
    assert store.read(KEY) is None
    assert len(caplog.records) == 1
    store.write(KEY, arrays={"Z": ARRAY})
    np.testing.assert_array_equal(store.read(KEY).arrays["Z"], ARRAY)


def test_a_stage_copied_from_another_is_seen(store, caplog):
    other = Key("map", 1, {"perplexity": 40.0, "seed": 1}, KEY.parents)
    shutil.copytree(store.path / KEY.folder, store.path / other.folder)
    assert store.read(other) is None
    assert "another key" in caplog.text
    assert store.read(KEY) is not None


def test_stages_without_a_run_are_found_and_removed(store, tmp_path, caplog):
    kept = Key("map", 1, {"seed": 7})
    store.write(kept)
    write_json(tmp_path / "run" / "run.json", {"stages": [kept.digest]})
    store.refer(tmp_path / "run")
    assert {entry.digest for entry in store.entries()} == {KEY.digest, kept.digest}
    assert [entry.digest for entry in store.unreferenced()] == [KEY.digest]
    with store.used(), pytest.raises(InputError, match="is in use"):
        store.remove(store.unreferenced())
    store.remove(store.unreferenced())
    assert [entry.digest for entry in store.entries()] == [kept.digest]
    (store.path / "tmp" / "foreign").write_text("no folder")
    with store.used():
        pass
    (tmp_path / "run").rename(tmp_path / "moved")
    assert [entry.digest for entry in store.unreferenced()] == [kept.digest]
    assert "is gone: if it was moved" in caplog.text


def test_a_folder_that_cannot_be_written_is_one_line(store, monkeypatch):
    (store.path / "scores").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write .*scores"):
        store.write(Key("scores", 1, {}))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="disk full while writing"):
        store.write(Key("other", 1, {}))
    assert not list(store.path.glob("tmp/*"))
    assert not (store.path / "other").exists()


WRITER = """
import sys
import numpy as np
from qdv_gpu.results.store import Key, Store
store, number = Store(sys.argv[1]), 0
print("ready", flush=True)
with store.used():
    while True:
        for number in range(200):
            store.write(Key("map", 1, {"seed": number}), arrays={"Z": np.full(20_000, number)})
"""


def test_killed_writers_leave_whole_stages_and_no_litter(tmp_path):
    store = Store(tmp_path / "store")
    for turn in range(3):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, store.path], stdout=subprocess.PIPE) for _ in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        time.sleep(0.1 + 0.05 * turn)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            writer.stdout.close()
    with store.used():
        assert not list(store.path.glob("tmp/*"))
    entries = store.entries()
    assert entries
    for number in range(200):
        record = store.read(Key("map", 1, {"seed": number}))
        assert record is None or (record.arrays["Z"] == number).all()
    assert len(store.entries()) == len(entries)  # none was damaged
