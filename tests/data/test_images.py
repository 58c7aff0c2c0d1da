"""The class Images: choosing, contents, labels, and how batches are prepared."""

import doctest
import importlib
import types

import numpy as np
import pytest
import torch
from PIL import Image

from qdv_gpu.data.images import Images, prepare
from qdv_gpu.errors import InputError


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3, 8, 6), dtype=np.uint8)
    return Images.from_arrays(pixels, labels=[0, 1] * 5, classes=["cat", "dog"])


@pytest.mark.parametrize(
    "module", ["convert", "datasets", "decode", "folders", "geometry", "images", "labels", "readers", "tables"]
)
def test_examples(module):
    assert doctest.testmod(importlib.import_module(f"qdv_gpu.data.{module}")).failed == 0


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (slice(2, 9, 3), [2, 5, 8]),
        (slice(None, None, -4), [9, 5, 1]),
        (slice(4, 4), []),
        ([-1, 0, 0], [9, 0, 0]),
        ([], []),
        (np.array([3, 1], np.int32), [3, 1]),
        (torch.tensor([7]), [7]),
        (np.arange(10) > 7, [8, 9]),
        ([False] * 9 + [True], [9]),
    ],
)
def test_choosing(images, key, expected):
    chosen = images[key]
    assert chosen.indices.tolist() == expected
    assert chosen.names == [str(i) for i in expected]
    assert chosen.labels.tolist() == [i % 2 for i in expected]
    assert torch.equal(chosen.pixels, images.pixels[expected])
    assert len(chosen) == len(expected)


def test_single_images(images):
    for i in (3, -7, np.int64(3), torch.tensor(3)):
        assert torch.equal(images[i], images.pixels[3])
    assert torch.equal(torch.stack(list(images)), images.pixels)
    assert torch.equal(images[2:9][::2][-1], images.pixels[8])
    for key in (10, -11, [0, 10], [-11], [True] * 9, [0.5]):
        with pytest.raises(IndexError):
            images[key]
    with pytest.raises(TypeError):
        images[1.0]


def test_contents(images):
    same = Images.from_arrays(images.pixels.clone(), [1] * 10, name="other")
    assert images.digest == same.digest
    assert len(images.digest) == 64
    assert images.labels_digest != same.labels_digest
    assert images[2:5].digest == same[2:5].digest != images[2:6].digest
    assert images[[0, 1]].digest != images[[1, 0]].digest
    reshaped = Images.from_arrays(images.pixels.reshape(10, 3, 6, 8))
    assert images.digest != reshaped.digest
    one = images.pixels.clone()
    one[9, 2, 7, 5] ^= 1
    assert Images.from_arrays(one).digest != images.digest


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_channels(channels, count):
    pixels = np.random.default_rng(0).integers(0, 256, (count, channels, 4, 5), dtype=np.uint8)
    images = Images.from_arrays(pixels)
    (batch,) = images.batches([torch.arange(count)], "cpu")
    x = prepare(batch, size=None, channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels)
    np.testing.assert_allclose(x, pixels / np.float32(255))


def test_arrays_however_they_lie():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 6, 5), dtype=np.uint8)
    expected = Images.from_arrays(pixels).digest
    locked = pixels.copy()
    locked.flags.writeable = False
    backwards = pixels[::-1].copy()[::-1]
    strided = np.zeros((4, 3, 12, 5), np.uint8)
    strided[:, :, ::2] = pixels
    last = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for array in (locked, backwards, strided[:, :, ::2], last, torch.from_numpy(last)):
        assert Images.from_arrays(array).digest == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4", torch.bfloat16, torch.float32])
def test_floats_become_float32(dtype):
    array = torch.randn(3, 1, 4, 4)
    given = array.to(dtype) if isinstance(dtype, torch.dtype) else array.numpy().astype(dtype)
    images = Images.from_arrays(given)
    assert images.pixels.dtype == torch.float32
    torch.testing.assert_close(images.pixels, array, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((0, 3, 4, 4), np.uint8), r"none of them 0, got \[0, 3, 4, 4\]"),
        (np.zeros((2, 3, 0, 4), np.uint8), r"none of them 0"),
        (np.zeros((3, 4, 4), np.uint8), r"must have shape \[N, C, H, W\].*got \[3, 4, 4\]"),
        (np.zeros((2, 1, 4, 4), bool), "uint8 or floating point, got torch.bool"),
        (np.zeros((2, 1, 4, 4), np.int64), "uint8 or floating point, got torch.int64"),
        (np.zeros((2, 1, 4, 4), complex), "uint8 or floating point, got torch.complex128"),
        (np.full((2, 1, 4, 4), None), "uint8 or floating point is required, got object"),
    ],
)
def test_other_arrays_are_refused(pixels, message):
    with pytest.raises(InputError, match=message):
        Images.from_arrays(pixels)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_floats_must_be_finite(value):
    pixels = np.zeros((70, 3, 256, 256))
    pixels[68, 2, 1, 3] = value
    with pytest.raises(InputError, match="NaN or infinity in image 68"):
        Images.from_arrays(pixels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.0, 1.0], "must be integers, got torch.float64"),
        ([True, False], "must be integers, got torch.bool"),
        (["a", "b"], r"must be integers, one for each of 2 images, got \['a', 'b'\]"),
        ([[0], [1, 2]], "must be integers"),
        ([0], r"one for each of 2 images, got shape \[1\]"),
        ([[0], [1]], r"got shape \[2, 1\]"),
        ([0, -1], "within 0 and 1048575, got -1 for image 1"),
        ([10**9, 0], "got 1000000000 for image 0"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(InputError, match=message):
        Images.from_arrays(np.zeros((2, 1, 4, 4), np.uint8), labels)


def test_labels():
    pixels = np.zeros((3, 1, 4, 4), np.uint8)
    for labels in ([2, 0, 1], (2, 0, 1), np.array([2, 0, 1], np.uint8), torch.tensor([2, 0, 1], dtype=torch.int32)):
        images = Images.from_arrays(pixels, labels)
        assert images.labels.dtype == torch.int64
        assert images.require_labels("it").tolist() == [2, 0, 1]
        assert images.classes == ("0", "1", "2")
    with pytest.raises(InputError, match="within 0 and 1, got 2 for image 0"):
        Images.from_arrays(pixels, labels, classes=["a", "b"])
    with pytest.raises(InputError, match="list of names, got 'abc'"):
        Images.from_arrays(pixels, labels, classes="abc")
    bare = Images.from_arrays(pixels)
    assert bare.labels is None
    assert bare[1:].labels is None
    with pytest.raises(InputError, match=r"the probe requires labels, and arrays has none"):
        bare.require_labels("the probe")


def test_prepare():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 1, 2, 2)
    x = prepare(pixels, size=2, channels=3, mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 1.0))
    assert x.shape == (1, 3, 2, 2)
    torch.testing.assert_close(x[0, :, 0], torch.tensor([[-1.0, 1.0], [-0.5, 1.5], [0.0, 1.0]]))
    swapped = prepare(pixels, size=2, channels=3, mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 1.0), bgr=True)
    assert torch.equal(swapped, x.flip(1))
    assert prepare(pixels, size=7, channels=1, mean=(0.0,), std=(1.0,)).shape == (1, 1, 7, 7)
    with pytest.raises(InputError, match="takes 1-channel images, the data has 2"):
        prepare(pixels.expand(1, 2, 2, 2), size=2, channels=1, mean=(0.0,), std=(1.0,))


def test_colours_become_gray_for_a_network_of_one_channel():
    """As in Pillow, and equal channels as they were."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    x = prepare(batch, size=None, channels=1, mean=(0.0,), std=(1.0,))
    expected = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in pixels])
    np.testing.assert_array_equal((x[:, 0] * 255).round(), expected)
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    assert np.abs(x[:, 0].numpy() * 255 - luma).max() <= 0.51
    gray = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    options = {"size": None, "channels": 1, "mean": (0.0,), "std": (1.0,)}
    assert torch.equal(prepare(gray.expand(1, 3, 16, 16), **options), prepare(gray, **options))
    with pytest.raises(InputError, match="takes 1-channel images, the data has 3"):
        prepare(gray.expand(1, 3, 16, 16) / 255, **options)


def test_resizing_is_antialiased():
    """Against Pillow, which filters over the whole footprint of each pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    ours = prepare(torch.from_numpy(pixels).permute(2, 0, 1)[None], size=13, channels=3, mean=(0, 0, 0), std=(1, 1, 1))
    theirs = np.asarray(Image.fromarray(pixels).resize((13, 13), Image.Resampling.BILINEAR))
    assert np.abs(ours[0].permute(1, 2, 0).numpy() * 255 - theirs).max() < 1.0


def test_floats_are_fed_as_they_are():
    x = torch.randn(2, 3, 6, 5)
    options = {"channels": 3, "mean": (0.5,) * 3, "std": (0.2,) * 3, "bgr": True}
    assert torch.equal(prepare(x, size=None, **options), x)
    assert prepare(x, size=4, **options).shape == (2, 3, 4, 4)
    with pytest.raises(InputError, match="takes 3-channel images, the data has 1 channel"):
        prepare(x[:, :1], size=None, **options)
    with pytest.raises(InputError, match=r"the data has 6 channels: arrays must be \[N, C, H, W\]"):
        prepare(x.permute(0, 2, 3, 1), size=None, **options)


def test_batches_go_to_a_gpu_through_little_page_locked_memory(monkeypatch):
    locked, most, sent = [], [], []

    class Event:
        def synchronize(self):
            locked.pop(0)

    class Pinned:
        def __init__(self, batch):
            self.batch = batch

        def to(self, device, *, non_blocking):
            sent.append((device, non_blocking))
            return self.batch

    def pin(batch):
        locked.append(batch)
        most.append(len(locked))
        return Pinned(batch)

    stream = types.SimpleNamespace(record_event=Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    images = Images.from_arrays(torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1))
    order = torch.arange(20).split(2)
    assert torch.equal(torch.cat(list(images.batches(order, torch.device("cuda:1")))), images.pixels)
    assert sent == [(torch.device("cuda:1"), True)] * 10
    assert max(most) == 2
    list(images.batches(order, "cpu"))
    assert len(sent) == 10


@pytest.mark.parametrize("classes", [{"cat", "dog"}, {0: "cat", 1: "dog"}])
def test_names_of_classes_have_an_order(classes):
    """That of a set is another in each process, and of a dict the keys would be taken."""
    with pytest.raises(InputError, match="classes must be a list of names, in order"):
        Images.from_arrays(torch.zeros(4, 1, 8, 8), [0, 1, 0, 1], classes)
