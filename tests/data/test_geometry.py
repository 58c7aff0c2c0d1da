"""Images at a geometry: bit for bit torchvision's, wherever they are held and whatever they were."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from qdv_gpu import Images, as_images, load_images
from qdv_gpu.data import convert, readers
from qdv_gpu.data.geometry import INTERPOLATIONS, Geometry
from qdv_gpu.errors import InputError
from qdv_gpu.progress import watched

SHAPES = [(30, 47), (47, 30), (33, 33), (16, 16), (5, 9), (1, 1), (3, 40), (17, 24)]  # height, width
SQUARES = [(16, 18), (16, 16), (17, 24), (24, 16), (7, 33), (1, 1)]  # side, shorter edge


def noise(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def theirs(geometry):
    if geometry.resize is None:
        return transforms.Resize((geometry.side, geometry.side))
    interpolation = InterpolationMode(geometry.interpolation)
    return transforms.Compose(
        [
            transforms.Resize(geometry.resize, interpolation),
            transforms.CenterCrop(geometry.side),
        ]
    )


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("side", "resize"), [*SQUARES, (16, None)])
def test_pictures_are_torchvisions(side, resize, interpolation):
    geometry = Geometry(side, resize, interpolation)
    for shape in SHAPES:
        for pixels in (noise(*shape), noise(*shape, 3)):
            picture = Image.fromarray(pixels)
            expected = np.asarray(theirs(geometry)(picture))
            np.testing.assert_array_equal(geometry.of_picture(picture), expected, str(shape))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("side", "resize"), [*SQUARES, (16, None)])
def test_arrays_are_torchvisions(side, resize, interpolation):
    geometry = Geometry(side, resize, interpolation)
    for shape in SHAPES:
        pixels = torch.from_numpy(noise(4, 3, *shape))
        ours = Images.from_arrays(pixels).at(geometry)
        assert ours.pixels.dtype == torch.uint8
        if interpolation == "lanczos" and resize is not None:  # torchvision has it for pictures only
            pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
            expected = np.stack([theirs(geometry)(picture) for picture in pictures]).transpose(0, 3, 1, 2)
        else:
            expected = theirs(geometry)(pixels)
        np.testing.assert_array_equal(ours.pixels, expected, str(shape))


def test_allowed_values():
    with pytest.raises(InputError, match="image size must be at least 1 pixel, got 0"):
        Geometry(0)
    with pytest.raises(InputError, match="must be resized to at least 1 pixel, got -3"):
        Geometry(4, -3)
    with pytest.raises(InputError, match="unknown interpolation 'bicubik': did you mean bicubic"):
        Geometry(4, 5, "bicubik")
    assert Geometry(4, 5) == Geometry(4, 5, "bilinear")


class Items(Dataset):
    """Items of a list, with labels."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index], index % 2


PICTURES = [Image.fromarray(noise(8 + i, 12 - i, 3)) for i in range(6)]
ALIKE = [Image.fromarray(noise(9, 13, 3) + np.uint8(i)) for i in range(6)]


@pytest.fixture(params=["held", "lazy"])
def memory(request, monkeypatch):
    if request.param == "lazy":
        for module in (convert, readers):
            monkeypatch.setattr(module, "free_memory", lambda _device: 0)
    return request.param


def in_files(folder, pictures):
    for i, picture in enumerate(pictures):
        path = folder / f"{i % 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
    return load_images(folder)


def arrays(pictures):
    return [np.asarray(picture) for picture in pictures]


MAKE = {
    "files": in_files,
    "pictures": lambda _folder, pictures: as_images(Items(pictures)),
    "items": lambda _folder, pictures: as_images(Items(arrays(pictures))),
}
GEOMETRIES = [Geometry(6), Geometry(6, 7), Geometry(6, 8), Geometry(6, 8, "bicubic"), Geometry(7, 8)]


@pytest.mark.parametrize("pictures", [PICTURES, ALIKE], ids=["mixed", "alike"])
@pytest.mark.parametrize("kind", MAKE)
def test_images_at_a_geometry(kind, pictures, memory, tmp_path):
    images = MAKE[kind](tmp_path, pictures)
    assert images.mixed == (pictures is PICTURES)
    assert images.geometry is None
    order = [0, 2, 4, 1, 3, 5] if kind == "files" else range(6)
    digests = {images.digest}
    for geometry in GEOMETRIES:
        if kind == "items":
            tensors = [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures]
            expected = torch.stack([theirs(geometry)(tensors[i]) for i in order])
        else:
            expected = torch.from_numpy(np.stack([theirs(geometry)(pictures[i]) for i in order])).permute(0, 3, 1, 2)
        ours = images.at(geometry)
        assert (ours.pixels is None) == (memory == "lazy")
        assert (ours.geometry, ours.side, ours.mixed) == (geometry, geometry.side, False)
        assert ours.at(geometry) is ours
        assert torch.equal(torch.cat(list(ours.batches(torch.arange(6).split(4), "cpu"))), expected)
        assert ours.names == images.names
        assert torch.equal(ours.labels, images.labels)
        some = images[[4, 1, 1]].at(geometry)
        assert torch.equal(torch.stack(list(some)), expected[[4, 1, 1]])
        assert some.digest == ours[[4, 1, 1]].digest
        digests.add(ours.digest)
    assert len(digests) == len(GEOMETRIES) + 1
    assert images.at(Geometry(9, 20)).at(geometry).digest == ours.digest  # of what was read, not of what was resized


@pytest.mark.parametrize("kind", MAKE)
def test_digests_do_not_depend_on_memory(kind, tmp_path, monkeypatch):
    for pictures in (PICTURES, ALIKE):
        images = MAKE[kind](tmp_path, pictures)
        held = [images.digest, *(images.at(geometry).digest for geometry in GEOMETRIES)]
        with monkeypatch.context() as patch:
            for module in (convert, readers):
                patch.setattr(module, "free_memory", lambda _device: 0)
            images = MAKE[kind](tmp_path, pictures)
            assert [images.digest, *(images.at(geometry).digest for geometry in GEOMETRIES)] == held


def test_arrays_that_do_not_fit(monkeypatch):
    images = Images.from_arrays(noise(6, 3, 9, 13), [0, 1] * 3)[1:]
    held = images.at(Geometry(5, 8))
    monkeypatch.setattr(readers, "free_memory", lambda _device: 0)
    lazy = images.at(Geometry(5, 8))
    assert lazy.pixels is None
    assert lazy.digest == held.digest
    assert lazy.names == held.names == images.names == ["1", "2", "3", "4", "5"]
    assert torch.equal(torch.stack(list(lazy)), held.pixels)
    assert lazy[2:].labels.tolist() == [1, 0, 1]


def test_floats_are_left_as_they_are(memory):
    images = Images.from_arrays(torch.randn(4, 3, 9, 7))
    assert images.at(Geometry(4)) is images
    items = as_images(Items([*torch.randn(4, 3, 9, 7)]))
    assert items.at(Geometry(4, 5)) is items


@pytest.mark.parametrize("kind", MAKE)
def test_mixed_images_have_no_pixels(kind, tmp_path):
    images = MAKE[kind](tmp_path, PICTURES)
    some = images[1:4]
    assert images.mixed
    assert some.mixed
    assert repr(images).endswith("6 of 6 sizes, 2 classes)")
    assert len(some) == len(some.labels) == len(some.names) == 3
    assert some.digest == images[[1, 2, 3]].digest != images.digest
    assert images.to("cpu") is images
    for use in (lambda: images[0], lambda: list(images), lambda: list(some.batches([torch.arange(2)], "cpu"))):
        with pytest.raises(InputError, match="are of 6 sizes: pass --image-size"):
            use()
    ready = load_images(tmp_path, image_size=5) if kind == "files" else as_images(images.reader.items, image_size=5)
    assert ready.digest == images.at(Geometry(5)).digest
    assert ready.side == 5


def test_what_has_one_size_keeps_it(tmp_path):
    images = in_files(tmp_path, ALIKE)
    assert load_images(tmp_path, image_size=5).digest == images.digest
    assert images.pixels.shape == (6, 3, 9, 13)
    assert images.side is None


def test_files_that_went_bad(memory, tmp_path):
    images = in_files(tmp_path, PICTURES)
    (tmp_path / "1" / "3.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"3\.png cannot be read: it is empty.*--skip-bad"):
        list(images.at(Geometry(4)).batches([torch.arange(6)], "cpu"))
    (tmp_path / "0" / "0.png").unlink()
    with pytest.raises(InputError, match=r"0\.png cannot be read: No such file"):
        images.at(Geometry(4))


def test_random_augmentation_of_mixed_sizes():
    def make(i):
        return noise(3, 8 + i, 8) + np.uint8(torch.randint(256, ()) if i == 5 else 0)

    class Augmented(Items):
        def __getitem__(self, index):
            return make(index), 0

    images = as_images(Augmented(range(6)), classes=["a", "b"])
    assert images.mixed
    with pytest.raises(InputError, match="item 5 of Augmented changed between passes"):
        images.at(Geometry(4))


def test_readers_pickle(tmp_path):
    reader = in_files(tmp_path, PICTURES).at(Geometry(4, 5, "bicubic")).reader
    again = pickle.loads(pickle.dumps(reader))
    assert again.geometry == reader.geometry
    assert torch.equal(again[2].pixels, reader[2].pixels)
    assert again.digest(2) == reader[2].digest == again[2].digest


def test_progress_is_told(tmp_path):
    images = in_files(tmp_path, PICTURES)
    for one in (images, as_images(Items(PICTURES)), Images.from_arrays(noise(6, 3, 9, 9))):
        told = []
        with watched(lambda *now, told=told: told.append(now)):
            one.at(Geometry(4))
        assert told == [("reading images", i + 1, 6) for i in range(6)]


def test_arrays_on_a_device(cuda):
    images = Images.from_arrays(noise(6, 3, 9, 13))
    ours = images.to(cuda).at(Geometry(5, 8))
    assert ours.pixels.is_cuda
    assert ours.digest == images.at(Geometry(5, 8)).digest


def test_both_edges_squashed():
    """As timm's crop mode "squash": the whole image at the resized square, and its centre."""
    theirs = transforms.Compose([transforms.Resize((10, 10), InterpolationMode.BICUBIC), transforms.CenterCrop(8)])
    geometry = Geometry(8, 10, "bicubic", squash=True)
    for height, width in ((20, 31), (7, 9), (30, 12)):
        picture = Image.fromarray(noise(height, width, 3))
        assert np.array_equal(np.asarray(geometry.of_picture(picture)), np.asarray(theirs(picture)))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert torch.equal(geometry.of_pixels(pixels), theirs(pixels))
    assert str(geometry) == "8 of 10 bicubic squashed"
