"""Labelled images, kept as uint8 until the moment a batch is fed to a network."""

import gzip
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qdv_gpu.errors import InputError, unknown
from qdv_gpu.machine import free_memory, resolve_device

DATASETS = ("cifar10", "fashion-mnist", "digits")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
_FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
_FASHION_CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


@dataclass(frozen=True)
class Images:
    """One split of a labelled image data set.

    Attributes
    ----------
    name : str
        The data set, as given to `load_images`.
    labels : Tensor
        Class of each image, int64 [N], on the CPU.
    classes : tuple of str
    indices : Tensor
        Position of each image in the whole split, int64 [N].
    pixels : Tensor or None
        uint8 [N, C, H, W], on the host or on the device; None if `files` are decoded batch by batch.
    files : tuple of Path
        The image files, if the data set is a folder.
    side : int or None
        Side in pixels that decoding resizes to; None keeps the size of the files.
    skipped : int
        Unreadable files left out.
    """

    name: str
    labels: Tensor
    classes: tuple[str, ...]
    indices: Tensor
    pixels: Tensor | None
    files: tuple[Path, ...] = ()
    side: int | None = None
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Tensor) -> "Images":
        """The images at these positions, in this order."""
        return replace(
            self,
            labels=self.labels[positions],
            indices=self.indices[positions],
            pixels=None if self.pixels is None else self.pixels[positions.to(self.pixels.device)],
            files=tuple(self.files[i] for i in positions.tolist()) if self.files else (),
        )

    def to(self, device: str | torch.device, *, limit: int | None = None) -> "Images":
        """Move the pixels to `device` once, unless they exceed `limit` bytes, by default half of what is free."""
        target = resolve_device(device)
        if self.pixels is None or self.pixels.device == target:
            return self
        if target.type == "cuda" and self.pixels.nbytes > (free_memory(target) // 2 if limit is None else limit):
            return self
        return replace(self, pixels=self.pixels.to(target))

    def batches(self, positions: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
        """Yield uint8 [b, C, H, W] on `device` for each list of positions."""
        if self.pixels is not None:
            for batch in positions:
                yield self.pixels[batch.to(self.pixels.device)].to(device, non_blocking=True)
            return
        loader = torch.utils.data.DataLoader(
            _Decoder(self.files, self.side),
            batch_sampler=[batch.tolist() for batch in positions],
            num_workers=min(len(os.sched_getaffinity(0)), 8),
            collate_fn=list,
        )
        for decoded in loader:
            bad = [item for item in decoded if isinstance(item, str)]
            if bad:
                raise InputError(f"{bad[0]} (--skip-bad leaves such files out)")
            yield torch.stack(decoded).to(device, non_blocking=True)

    def fingerprint(self) -> str:
        """Hash of the labels and pixels (of the files' paths, sizes and times where not in memory)."""
        digest = sha256(self.labels.numpy().tobytes())
        digest.update("\0".join(self.classes).encode())
        if self.pixels is not None:
            digest.update(self.pixels.cpu().contiguous().numpy().data)
        else:
            for file in self.files:
                stat = file.stat()
                digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        return digest.hexdigest()


class _Decoder(torch.utils.data.Dataset[Tensor | str]):
    """Decodes image files one at a time; what is wrong with a file stands in its place."""

    def __init__(self, files: Sequence[Path], side: int | None) -> None:
        self.files, self.side = files, side

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | str:
        return _decode(self.files[index], self.side)


def load_images(
    data: str | Path,
    split: str = "test",
    *,
    samples: int | str = "all",
    image_size: int | None = None,
    skip_bad: bool = False,
    root: str | Path | None = None,
    seed: int = 222,
) -> Images:
    """Load one split of a data set as uint8 images.

    Parameters
    ----------
    data : str or Path
        "cifar10", "fashion-mnist", "digits" or a folder `DIR/<split>/<class>/*.{png,jpg,jpeg}`.
    split : str
        "train" or "test".
    samples : int or "all"
        How many images, the same number of each class (the first classes get the remainder), drawn as in the
        paper: `numpy.random.seed(222)`, then for each class `numpy.random.choice(..., replace=False)`.
    image_size : int, optional
        Needed for folders of images of mixed sizes, which are resized to this side when they are decoded. Images
        of one size are kept at it.
    skip_bad : bool
        Leave out files that cannot be decoded, and count them, instead of refusing the data set.
    root : str or Path, optional
        Where downloads are kept; default `~/.cache/qdv_gpu`.

    Returns
    -------
    Images
        In memory if at most half of the free memory is needed, else decoded from the files batch by batch.

    Raises
    ------
    InputError
        For an unknown data set, a download that fails, a damaged file, or a class with too few images.
    """
    check_data(data)
    if split not in ("train", "test"):
        raise InputError(f"split must be train or test, got {split!r}")
    if image_size is not None and image_size < 1:
        raise InputError(f"image size must be at least 1 pixel, got {image_size}")
    cache = Path(root) if root is not None else Path.home() / ".cache" / "qdv_gpu"
    if data == "digits":
        images = _digits(split)
    elif data == "cifar10":
        images = _cifar10(split, cache)
    elif data == "fashion-mnist":
        images = _fashion_mnist(split, cache)
    else:
        return _folder(Path(data), split, samples, image_size, skip_bad=skip_bad, seed=seed)
    return images.take(stratified(images.labels, images.classes, samples, seed=seed))


def load_image(path: str | Path) -> Tensor:
    """uint8 [3, H, W] of a PNG or JPEG file.

    Raises
    ------
    InputError
        If there is no such file, or it cannot be decoded.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no image file {path}")
    pixels = _decode(Path(path), None)
    if isinstance(pixels, str):
        raise InputError(pixels)
    return pixels


def check_data(data: str | Path) -> None:
    """Raise InputError unless `data` names a data set or a folder."""
    if data in DATASETS or Path(data).is_dir():
        return
    if os.sep in str(data):
        raise InputError(f"data folder {data} does not exist")
    raise unknown("data set", str(data), [*DATASETS, "a folder"])


def stratified(labels: Tensor, classes: Sequence[str], samples: int | str, *, seed: int = 222) -> Tensor:
    """Positions of `samples` images, equally many of each class; "all" keeps every image in its order."""
    if samples == "all":
        return torch.arange(len(labels))
    try:
        total = int(samples)
    except ValueError:
        raise InputError(f"samples must be a number or all, got {samples!r}") from None
    if total < len(classes):
        raise InputError(f"samples must be at least one per class ({len(classes)}), got {total}")
    random = np.random.RandomState(seed)
    chosen = []
    for c, name in enumerate(classes):
        members = np.flatnonzero(labels.numpy() == c)
        wanted = total // len(classes) + (c < total % len(classes))
        if len(members) < wanted:
            raise InputError(f"class {name!r} has {len(members)} images, fewer than the {wanted} asked for")
        chosen.append(random.choice(members, wanted, replace=False))
    return torch.from_numpy(np.concatenate(chosen))


def prepare(
    batch: Tensor, *, size: int, channels: int, mean: Sequence[float], std: Sequence[float], bgr: bool = False
) -> Tensor:
    """Make network input from uint8 images, on their device.

    Parameters
    ----------
    batch : Tensor
        uint8 [B, C, H, W], C = 1 or 3. Gray images are repeated for a network of three channels.
    size : int
        Side of the square that they are resized to (bilinear, antialiased).

    Returns
    -------
    Tensor
        float32 [B, channels, size, size], (x / 255 - mean) / std.
    """
    x = batch.to(torch.float32) / 255
    if x.shape[1] != channels:
        if x.shape[1] != 1:
            raise InputError(f"the network takes {channels}-channel images, the data has {x.shape[1]} channels")
        x = x.expand(-1, channels, -1, -1)
    if x.shape[2:] != (size, size):
        x = functional.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    shift = torch.tensor(mean, device=x.device).view(1, -1, 1, 1)
    scale = torch.tensor(std, device=x.device).view(1, -1, 1, 1)
    x = (x - shift) / scale
    return x.flip(1) if bgr else x


def _digits(split: str) -> Images:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    half = slice(0, 898) if split == "train" else slice(898, None)
    pixels = torch.from_numpy(np.round(bunch.images[half] * (255 / 16)).astype(np.uint8))[:, None]
    return _in_memory("digits", pixels, bunch.target[half], [str(c) for c in range(10)])


def _cifar10(split: str, cache: Path) -> Images:
    from torchvision.datasets import CIFAR10

    folder = cache / "cifar10"
    try:
        dataset = CIFAR10(str(folder), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"CIFAR-10 could not be downloaded ({error}): put cifar-10-python.tar.gz into {folder}, "
            "or give a folder DIR/train/<class>/*, DIR/test/<class>/*"
        ) from None
    pixels = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return _in_memory("cifar10", pixels, np.asarray(dataset.targets), dataset.classes)


def _fashion_mnist(split: str, cache: Path) -> Images:
    prefix = "train" if split == "train" else "t10k"
    if _DEBIAN_FASHION.is_dir():
        with gzip.open(_DEBIAN_FASHION / f"{prefix}-images-idx3-ubyte.gz") as file:
            flat = np.frombuffer(file.read(), np.uint8, offset=16)
        with gzip.open(_DEBIAN_FASHION / f"{prefix}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        pixels = torch.from_numpy(flat.reshape(-1, 1, 28, 28).copy())
        return _in_memory("fashion-mnist", pixels, labels, _FASHION_CLASSES)
    from torchvision.datasets import FashionMNIST

    folder = cache / "fashion-mnist"
    try:
        dataset = FashionMNIST(str(folder), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"Fashion-MNIST could not be downloaded ({error}): put its four .gz files into "
            f"{folder / 'FashionMNIST' / 'raw'}, or install Debian's package dataset-fashion-mnist"
        ) from None
    return _in_memory("fashion-mnist", dataset.data[:, None], dataset.targets.numpy(), _FASHION_CLASSES)


def _in_memory(name: str, pixels: Tensor, labels: np.ndarray, classes: Sequence[str]) -> Images:
    targets = torch.from_numpy(labels.astype(np.int64))
    return Images(name, targets, tuple(classes), torch.arange(len(targets)), pixels)


def _folder(
    folder: Path, split: str, samples: int | str, image_size: int | None, *, skip_bad: bool, seed: int
) -> Images:
    top = folder / split
    if not top.is_dir():
        raise InputError(f"data folder {folder} has no folder {split!r}: DIR/train/<class>/* and DIR/test/<class>/*")
    classes = sorted(path.name for path in top.iterdir() if path.is_dir())
    if len(classes) < 2:
        raise InputError(f"{top} must hold a folder for each of two or more classes, got {len(classes)}")
    members = [
        [path for path in sorted((top / name).iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES] for name in classes
    ]
    for name, paths in zip(classes, members, strict=True):
        if not paths:
            raise InputError(f"class {name!r} in {top} has no images ({', '.join(IMAGE_SUFFIXES)})")
    files = [path for paths in members for path in paths]
    labels = torch.tensor([c for c, paths in enumerate(members) for _ in paths])

    def refuse(complaints: Sequence[str]) -> InputError:
        count = f"{len(complaints)} bad of {len(files)} files"
        return InputError(f"{complaints[0]}; {count} (--skip-bad leaves them out)")

    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(_whole if skip_bad else _header, files))
        bad = [size for size in sizes if isinstance(size, str)]
        if bad and (len(bad) == len(files) or not skip_bad):
            raise refuse(bad)
        good = torch.tensor([i for i, size in enumerate(sizes) if not isinstance(size, str)])
        chosen = good[stratified(labels[good], classes, samples, seed=seed)]
        kept = tuple(files[i] for i in chosen.tolist())
        shapes = {size for i in chosen.tolist() if not isinstance(size := sizes[i], str)}
        if len(shapes) > 1 and image_size is None:
            raise InputError(f"{top} holds images of {len(shapes)} sizes: pass --image-size to resize them")
        side = image_size if len(shapes) > 1 else None
        width, height = next(iter(shapes)) if side is None else (side, side)
        pixels = None
        if len(kept) * 3 * width * height <= free_memory(torch.device("cpu")) // 2:
            decoded = list(pool.map(_decode, kept, repeat(side)))
            bad = [item for item in decoded if isinstance(item, str)]
            if bad:
                raise refuse(bad)
            pixels = torch.stack([item for item in decoded if not isinstance(item, str)])
    skipped = len(files) - len(good)
    return Images(str(folder), labels[chosen], tuple(classes), chosen, pixels, kept, side, skipped)


def _header(path: Path) -> tuple[int, int] | str:
    """Width and height of an image from its header, or what is wrong with it."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            width, height = image.size
            rotated = image.getexif().get(ImageOps.ExifTags.Base.Orientation, 1) >= 5
            return (height, width) if rotated else (width, height)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return _complaint(path, error)


def _whole(path: Path) -> tuple[int, int] | str:
    """As `_header`, after decoding every pixel."""
    pixels = _decode(path, None)
    return pixels if isinstance(pixels, str) else (pixels.shape[2], pixels.shape[1])


def _decode(path: Path, side: int | None) -> Tensor | str:
    """uint8 [3, H, W] of a PNG or JPEG file, turned upright, resized to side x side if `side` is given.

    Instead of pixels, what is wrong with the file.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits of gray
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return _complaint(path, error)
    if side is not None:
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _complaint(path: Path, error: Exception) -> str:
    reason = "it is empty" if path.stat().st_size == 0 else str(error).replace(f" {str(path)!r}", "")
    return f"image file {path} cannot be read: {reason}"
