"""Data sets by name and folders: samples, damaged files, streaming, what is known by its contents."""

import gzip
import os
import shutil
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from qdv_gpu.data import datasets as data
from qdv_gpu.data import readers
from qdv_gpu.data.datasets import load_images, stratified
from qdv_gpu.data.readers import each_file
from qdv_gpu.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """Two classes, 5 training and 4 test images of 10 x 8 pixels each."""
    random = np.random.default_rng(0)
    for split, count in (("train", 5), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (8, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_sample_is_the_papers():
    labels = np.random.default_rng(1).integers(0, 10, 4000)
    np.random.seed(222)  # noqa: NPY002 (the paper's own call)
    expected = np.concatenate([np.random.choice(np.where(labels == c)[0], 100, replace=False) for c in range(10)])  # noqa: NPY002
    ours = stratified(torch.from_numpy(labels), [str(c) for c in range(10)], 1000)
    np.testing.assert_array_equal(ours, expected)


def test_samples_that_do_not_divide_evenly():
    labels = torch.arange(30) % 3
    chosen = stratified(labels, ["a", "b", "c"], 10)
    assert labels[chosen].bincount().tolist() == [4, 3, 3]
    with pytest.raises(InputError, match="at least one per class"):
        stratified(labels, ["a", "b", "c"], 2)
    with pytest.raises(InputError, match="class 'a' has 10 images, fewer than the 12 asked for"):
        stratified(labels, ["a", "b", "c"], 36)
    with pytest.raises(InputError, match="samples must be a number or all"):
        stratified(labels, ["a", "b", "c"], "many")


def test_digits_are_embedded():
    train, test = load_images("digits", "train"), load_images("digits")
    assert len(train) + len(test) == 1797
    assert train.pixels.dtype == torch.uint8
    assert int(train.pixels.max()) == 255
    assert test.pixels.shape[1:] == (1, 8, 8)


def write_idx(path, array):
    """The format of MNIST: a magic number, the sizes, the bytes."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.tobytes())


def test_fashion_mnist_of_debian(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", pixels)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(20, dtype=np.uint8) % 10)
    monkeypatch.setattr(data, "_DEBIAN_FASHION", tmp_path)
    images = load_images("fashion-mnist")
    np.testing.assert_array_equal(images.pixels[:, 0], pixels)
    assert images.labels.tolist() == [*range(10), *range(10)]
    assert images.classes[9] == "Ankle boot"


def test_downloads(tmp_path, monkeypatch):
    class Downloaded:
        data = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
        targets: ClassVar = [i % 10 for i in range(20)]
        classes: ClassVar = [str(c) for c in range(10)]

        def __init__(self, root, *, train, download):
            assert (root, train, download) == (str(tmp_path / "cifar10"), False, True)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Downloaded)
    images = load_images("cifar10", root=tmp_path)
    np.testing.assert_array_equal(images.pixels.permute(0, 2, 3, 1), Downloaded.data)

    def refuse(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", refuse)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", refuse)
    monkeypatch.setattr(data, "_DEBIAN_FASHION", tmp_path / "none")
    with pytest.raises(InputError, match=r"no route.*: put cifar-10-python.tar.gz into .*cifar10"):
        load_images("cifar10", root=tmp_path)
    with pytest.raises(InputError, match=r"no route.*install Debian's package dataset-fashion-mnist"):
        load_images("fashion-mnist", root=tmp_path)


def test_folder(folder):
    images = load_images(folder)
    assert images.classes == ("cat", "dog")
    assert images.pixels.shape == (8, 3, 8, 10)
    assert images.labels.tolist() == [0] * 4 + [1] * 4
    some = load_images(folder, samples=4)
    assert torch.equal(images.pixels[some.indices], some.pixels)


def test_deep_gray_images_keep_their_range(folder):
    deep = np.linspace(0, 65535, 80).reshape(8, 10).astype(np.uint16)
    Image.fromarray(deep).save(folder / "test" / "cat" / "deep.png")
    image = load_images(folder).pixels[4]
    np.testing.assert_array_equal(image[0], deep >> 8)


def test_streamed_folder_gives_the_same_batches(folder, monkeypatch):
    whole = load_images(folder)
    monkeypatch.setattr(readers, "free_memory", lambda _device: 0)
    streamed = load_images(folder)
    assert streamed.pixels is None
    order = torch.tensor([3, 1, 7, 0, 5]).split(2)
    for a, b in zip(
        whole.batches(order, torch.device("cpu")), streamed.batches(order, torch.device("cpu")), strict=True
    ):
        assert torch.equal(a, b)
    (folder / "test" / "dog" / "1.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"dog/1\.png cannot be read: it is empty \(--skip-bad"):
        list(streamed.batches(order, torch.device("cpu")))


def test_mixed_sizes_need_an_image_size(folder):
    Image.new("RGB", (20, 20), (255, 0, 0)).save(folder / "test" / "cat" / "large.jpg")
    with pytest.raises(InputError, match="are of 2 sizes: pass --image-size"):
        load_images(folder)[0]
    images = load_images(folder, image_size=6)
    assert images.pixels.shape == (9, 3, 6, 6)


def test_upright(folder):
    """EXIF orientation 6: the camera was turned."""
    pixels = np.zeros((10, 8, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "test" / "cat" / "turned.png", exif=exif)
    image = load_images(folder).pixels[4]
    assert image.shape == (3, 8, 10)
    assert image[:, :, -1].min() == 255


def test_bad_files_are_named_or_skipped(folder, caplog):
    good = load_images(folder)
    (folder / "test" / "cat" / "a.png").touch()
    (folder / "test" / "dog" / "b.jpg").write_bytes(b"not an image")
    cut = (folder / "test" / "dog" / "0.png").read_bytes()
    (folder / "test" / "dog" / "c.png").write_bytes(cut[: len(cut) // 2])
    noise = np.random.default_rng(1).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "test" / "dog" / "d.jpg", quality=100)
    cut = (folder / "test" / "dog" / "d.jpg").read_bytes()
    (folder / "test" / "dog" / "d.jpg").write_bytes(cut[:-100])
    with pytest.raises(InputError, match=r"a\.png cannot be read: it is empty; 3 bad of 12 files \(--skip-bad"):
        load_images(folder)
    images = load_images(folder, skip_bad=True)
    assert images.skipped == 4
    assert "skipped 4 unreadable files" in caplog.text
    assert torch.equal(images.pixels, good.pixels)
    (folder / "test" / "cat" / "a.png").unlink()
    (folder / "test" / "dog" / "b.jpg").unlink()
    (folder / "test" / "dog" / "c.png").unlink()
    with pytest.raises(InputError, match=r"d\.jpg cannot be read"):
        load_images(folder)


def test_bad_folders(folder, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_images(tmp_path / "none" / "such")
    with pytest.raises(InputError, match=r"unknown data set 'cifar': did you mean cifar10"):
        load_images("cifar")
    (folder / "test" / "bird").mkdir()
    with pytest.raises(InputError, match=r"class 'bird' .* has no images"):
        load_images(folder)
    (folder / "test" / "bird").rmdir()
    for file in (folder / "test" / "dog").iterdir():
        file.unlink()
    (folder / "test" / "dog").rmdir()
    with pytest.raises(InputError, match=r"two or more classes, got 1, 'cat': add another class, or give .*cat for"):
        load_images(folder)
    with pytest.raises(InputError, match="has no folder 'validation' for this split: it has test, train"):
        load_images(folder, "validation")
    with pytest.raises(InputError, match="split of digits must be train or test, got 'val'"):
        load_images("digits", "val")


def test_a_folder_is_known_by_its_contents(folder, tmp_path, monkeypatch):
    """Not by where it lies, by times, labels or memory, but by bytes, order and the side that it is decoded to."""
    images = load_images(folder)
    assert images.names[:2] == ["test/cat/0.png", "test/cat/1.png"]
    assert images.take(torch.tensor([5])).files == (folder / "test" / "dog" / "1.png",)
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder / "test", copy / "test")
    os.utime(copy / "test" / "cat" / "0.png", (0, 0))
    (copy / "test" / "dog").rename(copy / "test" / "zebra")
    monkeypatch.setattr(readers, "free_memory", lambda _device: 0)
    streamed = load_images(copy)
    assert streamed.pixels is None
    assert streamed.digest == images.digest
    assert streamed.labels_digest != images.labels_digest
    assert streamed.names[4] == "test/zebra/0.png"
    assert streamed[2:5].digest == load_images(folder)[2:5].digest == images[[2, 3, 4]].digest
    assert images[[1, 0]].digest != images[[0, 1]].digest
    Image.new("RGB", (20, 20)).save(folder / "test" / "cat" / "large.png")
    sides = [load_images(folder, image_size=side)[:4].digest for side in (6, 7)]
    assert len({*sides, images[:4].digest}) == 3


def test_a_file_that_changes_between_passes_is_refused(folder, monkeypatch):
    monkeypatch.setattr(readers, "free_memory", lambda _device: 0)
    hashed, read = load_images(folder), load_images(folder)
    assert hashed.digest
    order = torch.arange(8).split(3)
    assert len(list(read.batches(order, "cpu"))) == 3
    assert read.digest == hashed.digest
    Image.new("RGB", (10, 8)).save(folder / "test" / "dog" / "2.png")
    for images in (hashed, read):
        with pytest.raises(InputError, match=r"dog/2\.png changed between passes"):
            list(images.batches(order, "cpu"))
    Image.new("RGB", (9, 8)).save(folder / "test" / "dog" / "2.png")
    with pytest.raises(InputError, match=r"dog/2\.png changed between passes: it is of another size"):
        hashed[6]
    (folder / "test" / "dog" / "2.png").unlink()
    with pytest.raises(InputError, match=r"dog/2\.png cannot be read: No such file"):
        hashed[6]


def test_reading_files_leaves_the_random_numbers_alone(folder, monkeypatch):
    """Or dropout would depend on whether the images fit in memory."""
    monkeypatch.setattr(readers, "free_memory", lambda _device: 0)
    before = torch.get_rng_state()
    list(load_images(folder).batches(torch.arange(8).split(3), "cpu"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 700])
def test_each_file_in_order(count):
    assert list(each_file(str, range(count))) == [str(i) for i in range(count)]
