"""Image files of every kind that people have, value by value."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from qdv_gpu.data.decode import decode, header, load_image
from qdv_gpu.data.folders import IMAGE_SUFFIXES
from qdv_gpu.errors import InputError

GRAY = np.arange(8, dtype=np.uint8).reshape(2, 4) * 30
COLOURS = np.stack([GRAY, 255 - GRAY, GRAY // 2], axis=2)
DEEP = GRAY.astype(np.uint16) * 257  # whose upper and lower eight bits are those of GRAY


def decoded(path, mode="RGB"):
    pixels = decode(path, mode=mode)
    assert not isinstance(pixels, str), pixels
    assert pixels.dtype == torch.uint8
    return pixels.permute(1, 2, 0).numpy() if mode == "RGB" else pixels[0].numpy()


@pytest.mark.parametrize("suffix", [*IMAGE_SUFFIXES, ".PNG", ".JPG"])
def test_every_suffix(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    picture = Image.new("1" if suffix == ".pbm" else "L" if suffix == ".pgm" else "RGB", (6, 4), "white")
    if suffix == ".webp":
        picture.save(path, lossless=True)
    else:
        picture.save(path)
    assert (decoded(path) == 255).all()
    assert header(path).size == (4, 6)
    assert load_image(path).shape == (3, 4, 6)


def save_gray(path):
    Image.fromarray(GRAY).save(path)


def save_gray_with_alpha(path):
    alpha = Image.fromarray(255 - GRAY)
    Image.merge("LA", (Image.fromarray(GRAY), alpha)).save(path)


def save_deep(path):
    Image.fromarray(DEEP).save(path)


def save_deep_big_endian(path):
    """TIFF of mode I;16B, by hand: Pillow writes what it reads only in the byte order of the machine."""
    tags = [(256, 3, 4), (257, 3, 2), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 2)]
    tags.append((279, 4, DEEP.nbytes))
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1)
        + struct.pack(">HH" if kind == 3 else ">I", *((value, 0) if kind == 3 else (value,)))
        for tag, kind, value in tags
    )
    start = 8 + DEEP.nbytes
    pixels = DEEP.astype(">u2").tobytes()
    path.write_bytes(b"MM\0*" + struct.pack(">I", start) + pixels + struct.pack(">H", len(tags)) + entries + bytes(4))
    assert Image.open(path).mode == "I;16B"


def save_deep_integers(path):
    Image.fromarray(DEEP.astype(np.int32)).save(path)
    assert Image.open(path).mode == "I"


def save_deep_pgm(path):
    path.write_bytes(b"P5 4 2 65535\n" + DEEP.astype(">u2").tobytes())


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("8.png", save_gray), ("8.bmp", save_gray), ("8.tif", save_gray), ("8.pgm", save_gray),
        ("la.png", save_gray_with_alpha), ("16.png", save_deep), ("16.tif", save_deep),
        ("16b.tif", save_deep_big_endian), ("i.tif", save_deep_integers), ("16.pgm", save_deep_pgm),
    ],
)  # fmt: skip
def test_gray(name, save, tmp_path):
    path = tmp_path / name
    save(path)
    assert header(path) == ((2, 4), True)
    np.testing.assert_array_equal(decoded(path, "L"), GRAY)
    np.testing.assert_array_equal(decoded(path), np.stack([GRAY] * 3, axis=2))


def test_small_values_of_16_bits_are_dark(tmp_path):
    Image.fromarray(GRAY.astype(np.uint16)).save(tmp_path / "dark.png")
    assert decoded(tmp_path / "dark.png", "L").max() == 0


def test_a_gray_gif_has_a_palette(tmp_path):
    save_gray(tmp_path / "8.gif")
    assert not header(tmp_path / "8.gif").gray
    np.testing.assert_array_equal(decoded(tmp_path / "8.gif"), np.stack([GRAY] * 3, axis=2))


def test_black_and_white(tmp_path):
    Image.fromarray(GRAY > 100).save(tmp_path / "1.png")
    assert header(tmp_path / "1.png").gray
    np.testing.assert_array_equal(decoded(tmp_path / "1.png", "L"), np.where(GRAY > 100, 255, 0))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "p.png", "p.gif", "p.bmp", "cmyk.tif", "c.ppm"])
def test_colours(name, tmp_path):
    """Alpha is dropped, as by torchvision's loader, and palettes are looked up."""
    path, picture = tmp_path / name, Image.fromarray(COLOURS)
    if name.startswith("a"):
        picture.putalpha(Image.fromarray(GRAY))
        picture.save(path, **({"lossless": True, "exact": True} if name.endswith("webp") else {}))
    elif name.startswith("p"):
        picture.quantize(256).save(path)
        assert Image.open(path).mode == "P"
    elif name.startswith("cmyk"):
        ink = np.concatenate([255 - COLOURS, np.zeros((2, 4, 1), np.uint8)], axis=2)
        Image.fromarray(ink, "CMYK").save(path)
        assert Image.open(path).mode == "CMYK"
    else:
        picture.save(path)
    assert header(path) == ((2, 4), False)
    np.testing.assert_array_equal(decoded(path), COLOURS)
    np.testing.assert_array_equal(decoded(path), np.asarray(Image.open(path).convert("RGB")))


def test_transparent_palette(tmp_path):
    path = tmp_path / "t.png"
    Image.fromarray(COLOURS).quantize(256).save(path, transparency=0)
    np.testing.assert_array_equal(decoded(path), COLOURS)


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".webp", ".png"])
def test_the_first_of_several(suffix, tmp_path):
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (40, 200, 90)]
    path = tmp_path / f"many{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == ".webp" else {}))
    assert Image.open(path).n_frames == 3
    assert (decoded(path) == 40).all()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright(suffix, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x{suffix}"
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:8, :8] = 255  # the corner where the rows and columns of the file begin
    Image.fromarray(pixels).save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    upright = decoded(path)
    assert upright.shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))
    assert header(path).size == upright.shape[:2]
    corners = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    y, x = corners[orientation]
    assert upright[y, x].min() > 240
    assert upright.mean() < 30


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_damaged_files_say_so(suffix, tmp_path):
    """Cut, and with noise in their middle: a line about the file, or pixels, but no other error."""
    whole = tmp_path / f"whole{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert("1" if suffix == ".pbm" else "L" if suffix == ".pgm" else "RGB").save(whole)
    contents = whole.read_bytes()
    random = np.random.default_rng(1)
    for cut in (0, 3, 12, len(contents) // 2):
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(contents[:cut])
        found = decode(path)
        if cut < 12:
            assert isinstance(found, str)
        assert not isinstance(found, str) or (str(path) in found and "\n" not in found)
        header(path)
    for _ in range(20):
        noisy = bytearray(contents)
        for position in random.integers(2, len(noisy), 8):
            noisy[position] = random.integers(256)
        path.write_bytes(noisy)
        for found in (decode(path), header(path)):
            assert not isinstance(found, str) or (str(path) in found and "\n" not in found)


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(InputError, match="there is no image file"):
        load_image(tmp_path / "none.png")
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(InputError, match=r"f\.tif cannot be read: a PIL image of mode F has no scale"):
        load_image(tmp_path / "f.tif")
