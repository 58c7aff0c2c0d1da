"""How an image becomes a square: squeezed, or its shorter edge resized and its centre cropped."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qdv_gpu.errors import InputError, check_among, check_side

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "nearest")


@dataclass(frozen=True)
class Geometry:
    """A square of `side` x `side` pixels of an image of any size.

    Pictures of Pillow become bit for bit what `torchvision.transforms.Resize(resize)` and `CenterCrop(side)` make of
    them, and tensors of uint8 what these make of tensors. The two differ in their rounding.

    Attributes
    ----------
    side : int
        Of the square, in pixels.
    resize : int, optional
        The shorter edge is resized to this, and the centre is cropped, or padded with 0 where the image is smaller.
        None squeezes the whole image into the square, bilinear, whatever `interpolation` is.
    squash : bool
        Resize both edges to `resize`, whatever the image's proportions.
    interpolation : str
        "bilinear", "bicubic", "lanczos" or "nearest"; all but the last are antialiased.

    Raises
    ------
    InputError
        For a side or an edge below 1 pixel, or another interpolation.

    Examples
    --------
    >>> Geometry(224, 256).of_pixels(torch.zeros(3, 300, 400, dtype=torch.uint8)).shape
    torch.Size([3, 224, 224])
    >>> str(Geometry(224)), str(Geometry(224, 232, "bicubic"))
    ('224', '224 of 232 bicubic')
    """

    side: int
    resize: int | None = None
    interpolation: str = "bilinear"
    squash: bool = False

    def __post_init__(self) -> None:
        if self.side < 1:
            raise InputError(f"image size must be at least 1 pixel, got {self.side}")
        check_side(self.side)
        if self.resize is not None and self.resize < 1:
            raise InputError(f"the shorter edge must be resized to at least 1 pixel, got {self.resize}")
        check_among("interpolation", self.interpolation, INTERPOLATIONS)

    def __str__(self) -> str:
        """The same text for the same pixels, as digests hold it."""
        if self.resize is None:
            return str(self.side)
        return f"{self.side} of {self.resize} {self.interpolation}{' squashed' * self.squash}"

    def of_picture(self, picture: "Picture") -> "Picture":
        """The square of a PIL image of mode L or RGB."""
        from PIL import Image

        if self.resize is None:
            return picture.resize((self.side, self.side), Image.Resampling.BILINEAR)
        width, height = self._resized(*picture.size)
        if (width, height) != picture.size:
            picture = picture.resize((width, height), Image.Resampling[self.interpolation.upper()])
        left, top = self._offset(width), self._offset(height)
        return picture.crop((left, top, left + self.side, top + self.side))  # 0 outside of the picture

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """The square, uint8 [C, side, side], of an image, uint8 [C, H, W], on the CPU."""
        from PIL import Image
        from torchvision.transforms import InterpolationMode, functional

        if self.resize is None:
            return functional.resize(pixels, [self.side, self.side], antialias=True)
        if self.interpolation == "lanczos":  # which torch has not
            planes = [self.of_picture(Image.fromarray(plane.numpy())) for plane in pixels]
            return torch.stack([functional.pil_to_tensor(plane)[0] for plane in planes])
        edges = [self.resize] * (2 if self.squash else 1)
        resized = functional.resize(pixels, edges, InterpolationMode(self.interpolation), antialias=True)
        return functional.center_crop(resized, [self.side])

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height once the shorter edge is resized."""
        assert self.resize is not None
        if self.squash:
            return self.resize, self.resize
        long = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, long) if width <= height else (long, self.resize)

    def _offset(self, length: int) -> int:
        """Where the square begins along an edge: negative if the edge is shorter than the square."""
        return round((length - self.side) / 2) if length >= self.side else -((self.side - length) // 2)
