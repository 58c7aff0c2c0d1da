"""as_images: whatever a researcher has, as the same Images."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from qdv_gpu import Images, as_images
from qdv_gpu.data import convert, readers
from qdv_gpu.data.decode import image_tensor
from qdv_gpu.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 3, 8, 6), dtype=np.uint8)
LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
DIGEST = Images.from_arrays(PIXELS).digest


class Items(Dataset):
    """Items that a function makes, each time it is asked."""

    def __init__(self, make, count=10):
        self.make, self.count = make, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= 10:
            raise IndexError("list index out of range")
        return self.make(index)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(pixels, label) for pixels, label in zip(PIXELS, LABELS, strict=True)])


def picture(i):
    return Image.fromarray(PIXELS[i].transpose(1, 2, 0))


def unpack(items):
    """A collate_fn for items that are dicts."""
    return torch.stack([torch.from_numpy(item["image"]) for item in items]), torch.tensor([i["label"] for i in items])


def as_dict(i):
    return {"image": PIXELS[i], "label": LABELS[i]}


@pytest.fixture(params=["held", "lazy"])
def memory(request, monkeypatch):
    if request.param == "lazy":
        for module in (convert, readers):
            monkeypatch.setattr(module, "free_memory", lambda _device: 0)
    return request.param


@pytest.mark.parametrize(
    "data",
    [
        (PIXELS, LABELS),
        (torch.from_numpy(PIXELS), torch.tensor(LABELS)),
        ([picture(i) for i in range(10)], np.array(LABELS)),
        [(picture(i), LABELS[i]) for i in range(10)],
        TensorDataset(torch.from_numpy(PIXELS), torch.tensor(LABELS)),
        Items(lambda i: (PIXELS[i].transpose(1, 2, 0), np.int64(LABELS[i]), "more")),
        Items(lambda i: [PIXELS[i], np.array(LABELS[i])]),
        DataLoader(Items(as_dict), batch_size=4, collate_fn=unpack, drop_last=True),
        DataLoader(Items(as_dict), batch_size=4, collate_fn=unpack, num_workers=2),
        DataLoader(Items(lambda i: (picture(i), LABELS[i])), batch_size=3),
        DataLoader(Items(lambda i: (PIXELS[i], LABELS[i])), batch_size=None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_same_images(data, memory):
    images = as_images(data, name="mine")
    assert images.digest == DIGEST
    assert images.labels.tolist() == LABELS
    assert images.classes == ("0", "1", "2")
    assert images.names == [str(i) for i in range(10)]
    order = torch.tensor([9, 0, 4, 4, 1]).split(2)
    np.testing.assert_array_equal(torch.cat(list(images.batches(order, "cpu"))), PIXELS[[9, 0, 4, 4, 1]])
    assert torch.equal(images[-1], torch.from_numpy(PIXELS[9]))
    assert images[2:4].digest == Images.from_arrays(PIXELS[2:4]).digest
    if not isinstance(data, tuple) or isinstance(data[0], list):
        assert (images.pixels is None) == (memory == "lazy")


@pytest.mark.parametrize(
    "data",
    [PIXELS, (PIXELS,), (PIXELS, None), [*PIXELS], Items(lambda i: (PIXELS[i],)), Items(lambda i: (PIXELS[i], None))],
    ids=lambda value: type(value).__name__,
)
def test_without_labels(data):
    images = as_images(data)
    assert images.digest == DIGEST
    assert images.labels is None
    assert as_images(images) is images


@pytest.mark.parametrize("loader", [False, True])
def test_an_iterable_is_read_once(loader, monkeypatch):
    images = as_images(DataLoader(Stream(), batch_size=4, drop_last=True) if loader else Stream())
    assert images.digest == DIGEST
    assert images.labels.tolist() == LABELS
    monkeypatch.setattr(convert, "free_memory", lambda _device: 4000)
    with pytest.raises(InputError, match="Stream needs more than half of the free memory"):
        as_images(Stream())


def test_a_shuffling_loader_is_read_in_order(caplog):
    data = TensorDataset(torch.from_numpy(PIXELS), torch.tensor(LABELS))
    assert as_images(DataLoader(data, batch_size=4)).digest == DIGEST
    assert not caplog.text
    assert as_images(DataLoader(data, batch_size=4, shuffle=True)).digest == DIGEST
    assert "all images are read in the data set's order, not in that of RandomSampler" in caplog.text


def test_random_augmentation_is_refused(memory):
    def augmented(i):
        return PIXELS[i][:, :, :: -1 if torch.rand(()) < 0.5 else 1], 0

    def once(i, seen=set()):  # noqa: B006 (what it saw)
        again = i == 9 and i in seen
        seen.add(i)
        return PIXELS[0 if again else i]

    with pytest.raises(InputError, match=r"item \d+ of Items changed between passes: .* without random augmentation"):
        list(as_images(Items(augmented)).batches([torch.arange(10)] * 2, "cpu"))
    with pytest.raises(InputError, match="item 9 of Items changed between passes"):
        list(as_images(Items(once)).batches([torch.arange(10)] * 2, "cpu"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda i: PIXELS[i] if i != 3 else 1 / 0, "item 3 of Items cannot be read: ZeroDivisionError"),
        (lambda i: None if i == 2 else PIXELS[i], "item 2 of Items is not usable: it is None, not an image"),
        (as_dict, "item 0 of Items is not usable: it is a dict, not .*: give a DataLoader whose collate_fn"),
        (lambda _: (), "item 0 of Items is not usable: it is empty"),
        (lambda i: PIXELS[i].astype(int), "item 0 of Items is not usable: images must be uint8 or floating point"),
        (lambda i: PIXELS[i] > 3, "must be uint8 or floating point, got torch.bool"),
        (lambda i: PIXELS, r"must have shape \[C, H, W\] or \[H, W\], got \[10, 3, 8, 6\]"),
        (lambda i: object(), "an image or an array of uint8 or floating point is required, got object"),
        (lambda i: np.full((1, 2, 2), np.nan if i == 7 else 0.0), "item 7 of Items is not usable: .* finite"),
        (lambda i: (PIXELS[i], float(i)), "labels must be integers, .* got 0.0 for image 0"),
        (lambda i: (PIXELS[i], np.float32(i)), "labels must be integers, got float32 for image 0"),
        (lambda i: (PIXELS[i], True), "labels must be integers, .* got True for image 0"),
        (lambda i: (PIXELS[i], {"boxes": 1}), "labels must be integers, .* got a dict for image 0"),
        (lambda i: (PIXELS[i], None if i == 5 else i), "labels must be integers, .* got None for image 5"),
        (lambda i: (PIXELS[i], -i), "labels must be within 0 and 1048575, got -1 for image 1"),
        (lambda i: PIXELS[i] if i < 4 else PIXELS[i] / 255, "item 4 of Items is torch.float32 .* one dtype"),
        (lambda i: np.zeros((1, 4 + i, 4)), "item 1 of Items is torch.float32 .* floating-point ones of one shape"),
        (lambda i: PIXELS[i] if i < 6 else picture(i).convert("L"), "item 6 .* one number of channels"),
    ],
)  # fmt: skip
def test_bad_items(make, message, memory):
    with pytest.raises(InputError, match=message):
        as_images(Items(make))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_wrong_length(workers):
    with pytest.raises(InputError, match="item 10 of Items cannot be read: IndexError: list index out of range"):
        as_images(DataLoader(Items(lambda i: PIXELS[i], count=70), num_workers=workers))
    for count, message in ((0, "Items has no images"), (-1, "has no length: ValueError"), ("a", "has no length")):
        with pytest.raises(InputError, match=message):
            as_images(Items(lambda i: PIXELS[i], count=count))
    assert len(as_images(Items(lambda i: PIXELS[i], count=1))) == 1


def test_mixed_sizes_need_an_image_size(memory):
    def mixed(i):
        return Image.new("RGB", (8 + i // 5, 8), (255, 0, 0))

    with pytest.raises(InputError, match="the images of Items are of 2 sizes: pass --image-size"):
        as_images(Items(mixed))[0]
    images = as_images(Items(mixed), image_size=5)
    assert torch.stack(list(images)).shape == (10, 3, 5, 5)
    assert images[9][0].min() == 255
    assert images.digest == as_images(np.stack([np.asarray(i) for i in images])).digest
    assert as_images(PIXELS, image_size=5).digest == as_images([*PIXELS], image_size=5).digest == DIGEST


def test_classes():
    data = TensorDataset(torch.from_numpy(PIXELS), torch.tensor(LABELS))
    data.classes = ["ant", "bee", "cat", "dog"]
    assert as_images(data).classes == ("ant", "bee", "cat", "dog")
    assert as_images((data, [0] * 10)).classes == ("ant", "bee", "cat", "dog")
    assert as_images(data, classes=["a", "b", "c"]).classes == ("a", "b", "c")
    with pytest.raises(InputError, match="within 0 and 1, got 2 for image 2"):
        as_images(data, classes=["a", "b"])


@pytest.mark.parametrize(
    "data",
    ["cifar10", 3, None, {"a": 1}, picture(0), iter([1]), (PIXELS, LABELS, LABELS), (), object()],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused(data):
    with pytest.raises(InputError, match=r"images must be Images, an array \[N, C, H, W\], a pair .*; got ") as error:
        as_images(data)
    assert "\n" not in str(error.value)


def test_collate_fn_must_give_one_image():
    for collate in (lambda items: torch.zeros(3, 8, 6), lambda items: torch.zeros(2, 3, 8, 6), lambda items: 1):
        with pytest.raises(InputError, match=r"item 0 of Items"):
            as_images(DataLoader(Items(as_dict), collate_fn=collate))


@pytest.mark.parametrize(
    ("mode", "shape", "value"),
    [
        ("L", (1, 2, 4), [204]), ("1", (1, 2, 4), [255]), ("I;16", (1, 2, 4), [204]), ("I", (1, 2, 4), [204]),
        ("LA", (1, 2, 4), [204]), ("P", (3, 2, 4), [204] * 3), ("RGB", (3, 2, 4), [204] * 3),
        ("RGBA", (3, 2, 4), [204] * 3), ("CMYK", (3, 2, 4), [204] * 3),
    ],
)  # fmt: skip
def test_modes_of_pillow(mode, shape, value):
    gray = Image.new("L", (4, 2), 204)  # which the palette has
    if mode in ("I", "I;16"):
        deep = np.full((2, 4), 204 * 256 + 77)
        image = Image.fromarray(deep.astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        image = gray.convert("RGB").convert(mode) if mode != "1" else Image.new("1", (4, 2), 1)
    assert image.mode == mode
    pixels = image_tensor(image)
    assert pixels.shape == shape
    assert pixels.dtype == torch.uint8
    assert pixels[:, 1, 3].tolist() == value


def test_pictures_are_turned_upright():
    image = Image.new("RGB", (4, 2))
    image.getexif()[0x0112] = 6
    assert image_tensor(image).shape == (3, 4, 2)
    with pytest.raises(InputError, match="mode F has no scale"):
        image_tensor(Image.new("F", (4, 2)))


def test_axes_of_numpy_arrays():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 6, 5), dtype=np.uint8)
    expected = as_images((pixels, [0, 1, 0, 1]))
    found = as_images((pixels.transpose(0, 2, 3, 1), [0, 1, 0, 1]))
    assert torch.equal(found.pixels, expected.pixels)
    for kept in (pixels[:, :1, :, :3], pixels[..., :3], torch.from_numpy(pixels).permute(0, 2, 3, 1)):
        assert as_images(kept).pixels.shape == kept.shape


def test_axes_of_numpy_images():
    for shape, dtype, expected in [
        ((5, 4), np.uint8, (1, 5, 4)), ((5, 4, 3), np.uint8, (3, 5, 4)), ((3, 4, 3), np.uint8, (3, 4, 3)),
        ((3, 5, 4), np.uint8, (3, 5, 4)), ((5, 4, 3), np.float32, (5, 4, 3)), ((12, 4, 4), np.uint8, (12, 4, 4)),
    ]:  # fmt: skip
        assert image_tensor(np.zeros(shape, dtype)).shape == expected
    assert image_tensor(torch.zeros(5, 4, 3, dtype=torch.uint8)).shape == (5, 4, 3)
