"""Image files, PIL images and arrays as tensors."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qdv_gpu.arrays import to_tensor
from qdv_gpu.data.geometry import Geometry
from qdv_gpu.errors import InputError, as_path
from qdv_gpu.files import check_regular, contents_of

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

GRAY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")  # modes of Pillow


class Header(NamedTuple):
    """What the header of an image file says: height and width once it is upright, and whether it has no colours."""

    size: tuple[int, int]
    gray: bool


def load_image(path: str | Path) -> Tensor:
    """Decode an image file: uint8 [3, H, W], turned upright as its EXIF says.

    Of an animation or of several pages the first is taken. Transparency is dropped, as torchvision's loader drops it:
    the colours below it show. 16 bits of gray keep their upper eight.

    Raises
    ------
    InputError
        If there is no such file, or it cannot be decoded.

    Examples
    --------
    >>> import tempfile, PIL.Image
    >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
    ...     PIL.Image.new("RGB", (4, 2)).save(file.name)
    ...     load_image(file.name).shape
    torch.Size([3, 2, 4])
    """
    path = as_path("image", path)
    if not path.is_file():
        raise InputError(f"there is no image file {path}")
    pixels = decode(path)
    if isinstance(pixels, str):
        raise InputError(pixels)
    return pixels


def image_tensor(image: Any) -> Tensor:
    """Make uint8 or float32 [C, H, W] on the CPU of one image.

    Parameters
    ----------
    image : PIL image or array
        A PIL image gives [1, H, W] if it is gray (16 bits are cut to 8), else its red, green and blue, and is turned
        upright as its EXIF says. An array (torch, numpy, CuPy) is [C, H, W], or [H, W] for gray; a numpy array of
        uint8 whose last axis is 3 and whose first is not is [H, W, 3], as numpy makes it of a PIL image.

    Raises
    ------
    InputError
        If it is neither, neither uint8 nor floating point, empty, or not finite.

    Examples
    --------
    >>> image_tensor(np.zeros((8, 6, 3), np.uint8)).shape
    torch.Size([3, 8, 6])
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return from_pil(image)
    pixels = as_pixels(image).cpu()
    if pixels.ndim == 2:
        pixels = pixels[None]
    as_pillow = isinstance(image, np.ndarray) and pixels.dtype == torch.uint8 and pixels.ndim == 3
    if as_pillow and pixels.shape[2] == 3 != pixels.shape[0]:
        pixels = pixels.permute(2, 0, 1)
    if pixels.ndim != 3 or not pixels.numel():
        raise InputError(f"an image must have shape [C, H, W] or [H, W], got {list(pixels.shape)}")
    if pixels.is_floating_point() and not pixels.isfinite().all():
        raise InputError("an image must be finite, got NaN or infinity")
    return pixels.contiguous()


def as_pixels(array: Any) -> Tensor:
    """View an array as a tensor of uint8, or of float32 if it is floating point; InputError for other contents."""
    try:
        pixels = to_tensor(array).as_subclass(Tensor)
    except (TypeError, ValueError) as error:
        if isinstance(array, Tensor | np.ma.MaskedArray):
            raise
        kind = getattr(array, "dtype", type(array).__name__)
        raise InputError(f"an image or an array of uint8 or floating point is required, got {kind}") from error
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise InputError(f"images must be uint8 or floating point, got {pixels.dtype}: cast them")
    return pixels if pixels.dtype == torch.uint8 else pixels.to(torch.float32)


def from_pil(image: "Picture", *, mode: str | None = None, geometry: Geometry | None = None) -> Tensor:
    """uint8 [C, H, W] of a PIL image, upright, without its transparency, and at `geometry` if that is given.

    Parameters
    ----------
    mode : str, optional
        "L" for one channel, "RGB" for three; by default as the image is.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise InputError("a PIL image of mode F has no scale: make an array of it")
    if mode is None:
        mode = "L" if image.mode in GRAY else "RGB"
    if image.mode.startswith("I"):  # 16 bits of gray
        image = Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
    image = image.convert(mode)
    if geometry is not None:
        image = geometry.of_picture(image)
    array = np.array(image)
    return torch.from_numpy(array)[None] if array.ndim == 2 else torch.from_numpy(array).permute(2, 0, 1).contiguous()


def decode(
    path: Path, contents: bytes | None = None, *, mode: str = "RGB", geometry: Geometry | None = None
) -> Tensor | str:
    """uint8 [C, H, W] of an image file as for `from_pil`, or what is wrong with the file.

    Parameters
    ----------
    contents : bytes, optional
        Of the file, if it was read already.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(contents_of(path) if contents is None else contents)) as file:
            return from_pil(file, mode=mode, geometry=geometry)
    except Exception as error:  # of a damaged file Pillow raises anything
        return complaint(path, error)


def header(path: Path) -> Header | str:
    """What an image file's header says, or what is wrong with the file."""
    from PIL import Image, ImageOps

    try:
        check_regular(path)
        with Image.open(path) as image:
            gray = image.mode in GRAY
            rotated = image.getexif().get(ImageOps.ExifTags.Base.Orientation, 1) >= 5
            width, height = image.size
            if rotated and image.format == "TIFF":  # whose size newer versions of Pillow swap themselves
                (width, height), rotated = ImageOps.exif_transpose(image).size, False
            return Header((width, height) if rotated else (height, width), gray)
    except Exception as error:
        return complaint(path, error)


def complaint(path: Path, error: Exception) -> str:
    """What is wrong with an image file, in one line."""
    from PIL import Image, UnidentifiedImageError

    if path.is_file() and path.stat().st_size == 0:
        reason = "it is empty"
    elif isinstance(error, UnidentifiedImageError):
        reason = "it is no image"
    else:
        said = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        usual = said and isinstance(error, OSError | SyntaxError | ValueError | Image.DecompressionBombError)
        reason = said if usual else f"{type(error).__name__}: {said}".removesuffix(": ")
    return f"image file {path} cannot be read: {reason}"
