"""Image files that change while a run reads them: its numbers are of what was there before or after, or one line."""

import shutil

import numpy as np
import pytest
from hard.cases import SMALL
from PIL import Image
from tiny_analysis import outcome

VICTIM = "data/b/020.png"
COMMAND = ("analyze", "tiny_networks:cnn", *SMALL, "--data", "data", "--samples", "all", "--out", "out")
ACTS = {
    "changed": f"Image.fromarray(numpy.full((8, 8, 3), 7, 'uint8')).save('{VICTIM}')",
    "gone": f"os.remove('{VICTIM}')",
    "grown": f"Image.fromarray(numpy.full((16, 12, 3), 7, 'uint8')).save('{VICTIM}')",
    "cut": f"os.truncate('{VICTIM}', 40)",
    "empty": f"os.truncate('{VICTIM}', 0)",
    "fifo": f"os.remove('{VICTIM}'); os.mkfifo('{VICTIM}')",
    "folder": f"os.remove('{VICTIM}'); os.mkdir('{VICTIM}')",
    "loop": f"os.remove('{VICTIM}'); os.symlink('020.png', '{VICTIM}')",
    "endless": f"os.remove('{VICTIM}'); os.symlink('/dev/zero', '{VICTIM}')",
    "class renamed": "os.rename('data/b', 'data/c')",
    "classes swapped": "os.rename('data/b', 'x'); os.rename('data/a', 'data/b'); os.rename('x', 'data/a')",
    "added": f"shutil.copy('{VICTIM}', 'data/b/999.png')",
    "other class": f"os.rename('{VICTIM}', 'data/a/999.png')",
    "gray": f"image = Image.open('{VICTIM}').convert('L'); image.save('{VICTIM}')",
}
MOMENTS = {
    "listed": "datasets, 'list_folder', 1",
    "read": "readers.FileReader, '__getitem__', 3",
    "hashed": "images.Images, 'hashed', 1",
    "computed": "forward.ForwardPass, '_run', 2",
}
BEFORE = """
import os, shutil
import numpy
from PIL import Image
from qdv_gpu.data import convert, datasets, images, readers
from qdv_gpu.features import forward

def change():
    {act}

def at(owner, name, call):
    real, calls = getattr(owner, name), []
    def called(*given, **more):
        calls.append(name)
        found = real(*given, **more)
        if len(calls) == call:
            change()
        return found
    setattr(owner, name, called)

at({moment})
if not {held}:
    readers.free_memory = lambda _: 0
"""


def made(folder):
    random = np.random.default_rng(0)
    for name in "ab":
        (folder / "data" / name).mkdir(parents=True)
        for number in range(30):
            pixels = random.integers(0, 255, (8, 8, 3), np.uint8)
            pixels[..., 0] = pixels[..., 0] // 2 + (100 if name == "b" else 0)
            Image.fromarray(pixels).save(folder / "data" / name / f"{number:03}.png")


def analysed(warm, folder, **options):
    done = warm.run(*COMMAND, cwd=folder, timeout=60, **options)
    return done, outcome(folder / "out") if done.code == 0 else done.err.splitlines()[-1]


@pytest.fixture(scope="module")
def unchanged(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unchanged")
    made(folder)
    return analysed(warm, folder)[1]


@pytest.mark.parametrize("when", [(moment, held) for moment in MOMENTS for held in (True, False)], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_images_that_change(warm, tmp_path, unchanged, act, when):
    made(tmp_path)
    before = BEFORE.format(act=ACTS[act], moment=MOMENTS[when[0]], held=when[1])
    done, found = analysed(warm, tmp_path, before=before)
    assert "Traceback" not in done.err
    assert done.code in (0, 2), done.err
    again = analysed(warm, tmp_path)[1]
    shutil.rmtree(tmp_path / ".qdv-store", ignore_errors=True)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    after = analysed(warm, tmp_path)[1]
    assert again == after  # nothing of other images is kept for these
    if done.code == 0:
        assert found in (unchanged, after)
    else:
        assert found.startswith("qdv-gpu: "), done.err


def test_pictures_of_images_that_changed_are_not_kept_for_them(warm, tmp_path):
    made(tmp_path)
    before = BEFORE.format(act=ACTS["changed"], moment=MOMENTS["hashed"], held=True)
    done, found = analysed(warm, tmp_path, before=before)
    assert done.code == 2
    assert f"image file {VICTIM} changed between passes" in found
    assert not list(tmp_path.glob(".qdv-store/thumbnails/*"))
