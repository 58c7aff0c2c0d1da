"""Folders as people have them: classes, no classes, splits, and what is left out."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from qdv_gpu.data.datasets import check_data, load_images
from qdv_gpu.errors import InputError


def image(path, mode="RGB", size=(6, 5)):
    """A small file whose pixels are of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    value = sum(str(path.name).encode()) % 256
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(path)
    return path


def images(folder, *names, **options):
    for name in names:
        image(folder / name, **options)
    return folder


def refused(folder, split=None):
    with pytest.raises(InputError) as error:
        load_images(folder, split)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("split", ["val", "validation", "my split", "train"])
def test_any_split(split, tmp_path):
    images(tmp_path / split, "cat/1.png", "dog/1.png")
    images(tmp_path / "test", "ant/1.png", "bee/2.png")
    found = load_images(tmp_path, split)
    assert found.classes == ("cat", "dog")
    assert found.names == [f"{split}/cat/1.png", f"{split}/dog/1.png"]
    assert load_images(tmp_path).classes == ("ant", "bee")


def test_classes_directly(tmp_path):
    found = load_images(images(tmp_path, "dog/1.png", "cat/2.png", "cat/1.png"))
    assert (found.classes, found.labels.tolist()) == (("cat", "dog"), [0, 0, 1])
    assert found.names == ["cat/1.png", "cat/2.png", "dog/1.png"]


def test_nested_classes_are_those_of_torchvision(tmp_path):
    images(tmp_path / "train", "n1/images/n1_0.JPEG", "n1/images/n1_1.JPEG", "n2/images/n2_0.JPEG", "n2/a/b/c.png")
    (tmp_path / "train" / "n1" / "n1_boxes.txt").touch()
    found, theirs = load_images(tmp_path, "train"), ImageFolder(tmp_path / "train")
    assert list(found.classes) == theirs.classes
    assert {(str(path), int(c)) for path, c in zip(found.files, found.labels, strict=True)} == set(theirs.samples)
    images(tmp_path / "tiny", "n1/images/n1_0.JPEG", "n2/images/n2_0.JPEG")
    assert load_images(tmp_path / "tiny").classes == ("n1", "n2")


@pytest.mark.parametrize("split", [None, "val", "test"])
def test_without_labels(split, tmp_path):
    images(tmp_path / (split or ""), *(f"{i}.png" for i in range(9)))
    found = load_images(tmp_path, split)
    assert found.labels is None
    assert found.classes == ()
    assert len(found) == 9
    some = load_images(tmp_path, split, samples=4)
    assert some.indices.tolist() == np.random.RandomState(222).choice(9, 4, replace=False).tolist()
    assert torch.equal(found.pixels[some.indices], some.pixels)
    assert load_images(tmp_path, split, samples=4, seed=1).digest != some.digest
    with pytest.raises(
        InputError, match=r"an analysis requires labels, and .* has none: give a folder for each class, or a table"
    ):
        found.require_labels("an analysis")
    for samples in (0, 10, -1):
        with pytest.raises(InputError, match=f"samples must be within 1 and 9, the number of images, .* got {samples}"):
            load_images(tmp_path, split, samples=samples)
    with pytest.raises(InputError, match="samples must be a number or all, got 'few'"):
        load_images(tmp_path, split, samples="few")


def test_images_beside_classes_are_refused(tmp_path):
    images(tmp_path, "1.png", "cat/1.png")
    assert "holds images and also folders of images (cat): put each into the folder of its class" in refused(tmp_path)
    (tmp_path / "cat" / "1.png").rename(tmp_path / "cat" / "1.txt")
    assert len(load_images(tmp_path)) == 1


@pytest.mark.parametrize("nested", ["", "cat/", "cat/images/"])
@pytest.mark.parametrize("names", [("train", "val"), ("Training", "Valid"), ("train2017", "val2017"), ("train",)])
def test_splits_are_no_classes(nested, names, tmp_path):
    for name in names:
        images(tmp_path / name, f"{nested}1.png", f"{nested}2.png")
    assert f"hold splits, not the images of a class: pass --split {' or --split '.join(names)}" in refused(tmp_path)


def test_splits_by_unusual_names(tmp_path):
    images(tmp_path, "hospital A/cat/1.png", "hospital A/dog/1.png", "hospital B/cat/1.png")
    message = refused(tmp_path)
    assert "folders hold folders of images, not the images of a class: pass --split hospital A or --split" in message
    assert load_images(tmp_path, "hospital A").classes == ("cat", "dog")
    images(tmp_path, "hospital B/2.png")  # then it is a class, whose images lie at two depths
    assert load_images(tmp_path).classes == ("hospital A", "hospital B")


def test_splits_beside_other_folders(tmp_path):
    images(tmp_path, "train/1.png", "val/2.png", "masks/1.png")
    assert refused(tmp_path).endswith("pass --split train or --split val")
    (tmp_path / "val").rename(tmp_path / "bus")  # then the other is the vehicle
    assert load_images(tmp_path).classes == ("bus", "masks", "train")


def test_a_single_class_is_refused(tmp_path):
    message = refused(images(tmp_path / "a", "cat/1.png"))
    assert f"two or more classes, got 1, 'cat': add another class, or give {tmp_path / 'a' / 'cat'} for" in message
    assert load_images(tmp_path / "a" / "cat").labels is None
    (tmp_path / "a" / "dog" / "more").mkdir(parents=True)
    assert "class 'dog' in " in refused(tmp_path / "a")


def test_no_images(tmp_path):
    assert "holds no images (.png, .jpg, " in refused(tmp_path)
    assert refused(tmp_path).endswith("it has no files")
    for name in (".DS_Store", "._1.png", "a.txt", "b.txt", "README"):
        (tmp_path / name).touch()
    assert refused(tmp_path).endswith(
        "it has 5 files that are no images by their name: .txt (2), .DS_Store (1), ._* (1), no suffix (1)"
    )
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / ".DS_Store").touch()
    message = refused(tmp_path / "one")
    assert message.endswith("it has 1 file that is no image by its name: .DS_Store (1)")


def test_what_is_left_out_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    images(tmp_path / "test", "cat/1.png", "dog/1.PNG")
    load_images(tmp_path)
    assert not caplog.text
    for name in ("a.txt", "cat/b.TXT", "dog/more/c.npy", ".DS_Store"):
        (tmp_path / "test" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "test" / name).touch()
    images(tmp_path / "test", ".cache/1.png", "cat/.old/1.png")
    assert len(load_images(tmp_path)) == 2
    (message,) = caplog.messages
    what = ".txt (2), .DS_Store (1), .cache/ (1), .npy (1), .old/ (1)"
    assert message == f"left out 6 files of {tmp_path / 'test'} that are no images by their name: {what}"


def test_links_are_followed(tmp_path):
    images(tmp_path / "far", "1.png", "2.png")
    images(tmp_path / "here", "dog/1.png")
    (tmp_path / "here" / "cat").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "far")
    found = load_images(tmp_path / "here")
    assert found.names == ["cat/1.png", "cat/2.png", "dog/1.png"]
    (tmp_path / "far" / "3.png").symlink_to(tmp_path / "none.png")
    assert "3.png cannot be read: No such file" in refused(tmp_path / "here")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_locked_folder_is_named(tmp_path):
    images(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "dog").chmod(0)
    assert f"data folder {tmp_path / 'dog'} cannot be read: Permission denied" in refused(tmp_path)
    (tmp_path / "dog").chmod(0o700)


@pytest.mark.parametrize("split", ["", "..", "a/b", "/"])
def test_a_split_is_a_name(split, tmp_path):
    images(tmp_path, "cat/1.png", "dog/1.png", "a/b/1.png")
    assert refused(tmp_path, split) == f"split must be the name of a folder, got {split!r}"


def test_a_split_that_is_not_there(tmp_path):
    images(tmp_path, "train/cat/1.png", "val/cat/1.png")
    assert refused(tmp_path, "test").endswith("has no folder 'test' for this split: it has train, val")
    assert refused(tmp_path / "val" / "cat", "test").endswith("it has no folders")


def test_channels(tmp_path):
    gray = load_images(images(tmp_path / "gray", "1.png", "2.tif", "3.jpg", mode="L"))
    assert gray.pixels.shape == (3, 1, 5, 6)
    images(tmp_path / "all", "1.png", "2.tif", "3.jpg", mode="L")
    found = load_images(images(tmp_path / "all", "4.png"))
    assert found.pixels.shape == (4, 3, 5, 6)
    assert torch.equal(found.pixels[:3], gray.pixels.expand(-1, 3, -1, -1))
    assert found[:3].digest == gray.digest  # to a network they are the same, of however many channels it is
    some = load_images(tmp_path / "all", samples=1, seed=0)
    assert some.pixels.shape[1] == (3 if some.names == ["4.png"] else 1)


def test_what_is_known_of_data(tmp_path):
    check_data(tmp_path)
    for name in ("a.csv", "b.TSV"):
        (tmp_path / name).touch()
        check_data(tmp_path / name)
    image(tmp_path / "c.png")
    with pytest.raises(InputError, match=r"data must be a folder or a table \(\.csv, \.tsv\), got the file .*c\.png"):
        check_data(tmp_path / "c.png")
    for name, kind in (("none.csv", "table"), ("none", "folder")):
        with pytest.raises(InputError, match=f"data {kind} .* does not exist"):
            check_data(tmp_path / name)
    with pytest.raises(InputError, match=r"data table none\.csv does not exist"):
        check_data("none.csv")
    with pytest.raises(InputError, match=r"did you mean cifar10\?; no folder of that name is here either"):
        check_data("cifar")
