"""Files that are none, or cannot be read, wherever a command reads one: named, never waited for, never executed."""

import shutil

import pytest
from PIL import Image

KINDS = {
    "pipe": "os.mkfifo(path)",
    "socket": "socket.socket(socket.AF_UNIX).bind(path)",
    "zero": "os.symlink('/dev/zero', path)",
    "null": "os.symlink('/dev/null', path)",
    "dangling": "os.symlink('nowhere', path)",
    "loop": "os.symlink(os.path.basename(path), path)",
    "empty": "open(path, 'w').close()",
    "binary": "open(path, 'wb').write(bytes(range(256)) * 8)",
    "deep": "open(path, 'w').write('a = ' + '[' * 100_000)",
    "denied": "open(path, 'w').close()\nimport builtins, io, pathlib\nreal = io.open\n"
    "def refuse(file, *a, **k):\n    if os.path.abspath(str(file)) == path:\n"
    "        raise PermissionError(13, 'Permission denied', str(file))\n    return real(file, *a, **k)\n"
    "io.open = builtins.open = refuse",
}
SMALL = ("--pca", "5", "--perplexity", "5", "--iterations", "20", "--seeds", "1", "--device", "cpu", "--layers", "pool")
READERS = {
    "image": ("images/a/0.png", ("analyze", "tiny_networks:cnn", "--data", "images", "--out", "out", *SMALL)),
    "listed": ("images/a/0.png", ("analyze", "tiny_networks:cnn", "--data", "t.csv", "--out", "out", *SMALL)),
    "table": ("u.csv", ("analyze", "tiny_networks:cnn", "--data", "u.csv", "--out", "out", *SMALL)),
    "weights": ("w.pt", ("layers", "tiny_networks:cnn", "--weights", "w.pt")),
    "sweep": ("S.toml", ("sweep", "S.toml", "--out", "out", "--dry-run")),
    "picture": ("p.png", ("deconv", "tiny_networks:cnn", "--image", "p.png", "--out", "out", "--device", "cpu")),
    "run": ("cnn/run.json", ("plot", "cnn", "--out", "out")),
    "points": ("cnn/predictions.csv", ("export", "cnn", "--to", "csv", "--out", "out")),
}


def laid(folder):
    for name in "ab":
        (folder / "images" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("L", (8, 8), number * 20 + ord(name)).save(folder / "images" / name / f"{number}.png")
    rows = [f"images/{name}/{number}.png,{name}" for name in "ab" for number in range(10)]
    (folder / "t.csv").write_text("\n".join(["file,label", *rows]))


def put(kind, file):
    made = f"import os, socket\npath = {str(file)!r}\n"
    return made + "if os.path.lexists(path):\n    os.remove(path)\n" + KINDS[kind]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file(warm, runs, tmp_path, reader, kind):
    laid(tmp_path)
    file, command = READERS[reader]
    if file.startswith("cnn/"):
        shutil.copytree(runs / "cnn", tmp_path / "cnn")
    done = warm.run(*command, before=put(kind, tmp_path / file), cwd=tmp_path, timeout=30)
    assert done.refused, done.err
    assert file.rpartition("/")[2] in done.err or reader == "run", done.err


@pytest.mark.parametrize("kind", KINDS)
def test_bad_images_are_skipped(warm, tmp_path, kind):
    laid(tmp_path)
    command = (*READERS["image"][1], "--skip-bad")
    done = warm.run(*command, before=put(kind, tmp_path / "images/a/0.png"), cwd=tmp_path, timeout=60)
    assert done.code == 0, done.err
    assert "skipped 1 unreadable files" in done.err
