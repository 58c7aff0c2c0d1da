"""Data sets by name, and folders of image files."""

import gzip
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qdv_gpu.data.decode import decode, header
from qdv_gpu.data.images import Images
from qdv_gpu.data.readers import FileReader, workers
from qdv_gpu.errors import InputError, unknown
from qdv_gpu.machine import free_memory
from qdv_gpu.progress import advance

logger = logging.getLogger(__name__)

DATASETS = ("cifar10", "fashion-mnist", "digits")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
_FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
_FASHION_CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


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

    Examples
    --------
    >>> load_images("digits", samples=20)
    Images('digits', 20 of uint8 [1, 8, 8], 10 classes)
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
    labels = images.require_labels("a sample of each class")
    return images.take(stratified(labels, images.classes, samples, seed=seed))


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


def _digits(split: str) -> Images:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    half = slice(0, 898) if split == "train" else slice(898, None)
    pixels = torch.from_numpy(np.round(bunch.images[half] * (255 / 16)).astype(np.uint8))[:, None]
    return Images.from_arrays(pixels, bunch.target[half], name="digits")


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
    return Images.from_arrays(pixels, dataset.targets, dataset.classes, "cifar10")


def _fashion_mnist(split: str, cache: Path) -> Images:
    prefix = "train" if split == "train" else "t10k"
    if _DEBIAN_FASHION.is_dir():
        with gzip.open(_DEBIAN_FASHION / f"{prefix}-images-idx3-ubyte.gz") as file:
            flat = np.frombuffer(file.read(), np.uint8, offset=16)
        with gzip.open(_DEBIAN_FASHION / f"{prefix}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        pixels = torch.from_numpy(flat.reshape(-1, 1, 28, 28).copy())
        return Images.from_arrays(pixels, labels, _FASHION_CLASSES, "fashion-mnist")
    from torchvision.datasets import FashionMNIST

    folder = cache / "fashion-mnist"
    try:
        dataset = FashionMNIST(str(folder), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"Fashion-MNIST could not be downloaded ({error}): put its four .gz files into "
            f"{folder / 'FashionMNIST' / 'raw'}, or install Debian's package dataset-fashion-mnist"
        ) from None
    return Images.from_arrays(dataset.data[:, None], dataset.targets, _FASHION_CLASSES, "fashion-mnist")


def _folder(
    folder: Path, split: str, samples: int | str, image_size: int | None, *, skip_bad: bool, seed: int
) -> Images:
    top = folder / split
    classes, members = _listing(folder, split)
    files = [path for paths in members for path in paths]
    labels = torch.tensor([c for c, paths in enumerate(members) for _ in paths])

    def refuse(complaints: Sequence[str]) -> InputError:
        count = f"{len(complaints)} bad of {len(files)} files"
        return InputError(f"{complaints[0]}; {count} (--skip-bad leaves them out)")

    with ThreadPoolExecutor(workers()) as pool:
        sizes = list(pool.map(_whole if skip_bad else header, files))
        bad = [size for size in sizes if isinstance(size, str)]
        if bad and (len(bad) == len(files) or not skip_bad):
            raise refuse(bad)
        if bad:
            logger.warning("skipped %d unreadable files of %s, the first: %s", len(bad), top, bad[0])
        good = torch.tensor([i for i, size in enumerate(sizes) if not isinstance(size, str)])
        chosen = good[stratified(labels[good], classes, samples, seed=seed)]
        shapes = {size for i in chosen.tolist() if not isinstance(size := sizes[i], str)}
        if len(shapes) > 1 and image_size is None:
            raise InputError(f"{top} holds images of {len(shapes)} sizes: pass --image-size to resize them")
        side = image_size if len(shapes) > 1 else None
        size = next(iter(shapes)) if side is None else (side, side)
        reader = FileReader(files, folder, side, size)
        images = Images(str(folder), labels[chosen], tuple(classes), chosen, None, reader, len(bad))
        if len(chosen) * 3 * size[0] * size[1] > free_memory(torch.device("cpu")) // 2:
            return images
        pixels = torch.empty(len(chosen), 3, *size, dtype=torch.uint8)
        bad = []
        for i, item in enumerate(pool.map(reader.__getitem__, chosen.tolist())):
            if isinstance(item, str):
                bad.append(item)
            else:
                pixels[i], images.hashes[int(chosen[i])] = item.pixels, item.digest
            advance("reading images", i + 1, len(chosen))
    if bad:
        raise refuse(bad)
    return replace(images, pixels=pixels)


def _listing(folder: Path, split: str) -> tuple[list[str], list[list[Path]]]:
    """Names of the classes and the image files of each."""
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
    return classes, members


def _whole(path: Path) -> tuple[int, int] | str:
    """As `header`, after decoding every pixel."""
    pixels = decode(path)
    return pixels if isinstance(pixels, str) else (pixels.shape[1], pixels.shape[2])
