"""Data sets by name, and images in files, as folders and tables list them."""

import gzip
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qdv_gpu.data.decode import Header, decode, header
from qdv_gpu.data.folders import Listing, list_folder
from qdv_gpu.data.geometry import Geometry
from qdv_gpu.data.images import Images
from qdv_gpu.data.readers import FileReader, each_file, hold, refusal
from qdv_gpu.data.tables import TABLE_SUFFIXES, list_table
from qdv_gpu.errors import (
    SEED,
    InputError,
    as_path,
    check_count,
    check_flag,
    check_samples,
    check_side,
    check_text,
    short,
    unknown,
)

logger = logging.getLogger(__name__)

DATASETS = ("cifar10", "fashion-mnist", "digits")
_DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
_FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
_FASHION_CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def load_images(
    data: str | Path,
    split: str | None = None,
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
        "cifar10", "fashion-mnist", "digits"; a folder, as for `list_folder`, `DIR/<split>/<class>/**/*.png`; or a
        table, .csv or .tsv, as for `list_table`.
    split : str, optional
        "train" or "test" of a data set by name, any name of another. By default "test"; of a folder that has no
        folder "test", the folder itself; of a table without splits, all of it.
    samples : int or "all"
        How many images, the same number of each class (the first classes get the remainder), drawn as in the
        paper: `numpy.random.seed(seed)`, then for each class `numpy.random.choice(..., replace=False)`. Without
        labels, one such draw from all.
    image_size : int, optional
        Images of mixed sizes are squeezed to this side when they are decoded; without it they have no pixels until
        `Images.at` says which. Images of one size are kept at it.
    skip_bad : bool
        Leave out files that cannot be decoded, and count them, instead of refusing the data set.
    root : str or Path, optional
        Where downloads are kept; default `~/.cache/qdv_gpu`.
    seed : int
        Of the drawing; the paper's by default.

    Returns
    -------
    Images
        In memory if at most half of the free memory is needed, else decoded from the files batch by batch. Files are
        decoded as by `load_image`, to [3, H, W], or to [1, H, W] if none of them has colours.

    Raises
    ------
    InputError
        For an unknown data set, a download that fails, a damaged file, a class with too few images, and as
        `list_folder` and `list_table`.

    Examples
    --------
    >>> load_images("digits", samples=20)
    Images('digits', 20 of uint8 [1, 8, 8], 10 classes)
    """
    check_data(data)
    geometry = None if image_size is None else Geometry(check_side(image_size))
    seed = check_count("seed", seed, least=0, most=SEED)
    check_flag("skip_bad", skip_bad)
    if split is not None:
        check_text("split", split)
    if data not in DATASETS:
        listing = list_images(Path(data), split)
        return _of_files(listing, samples, geometry, skip_bad=skip_bad, seed=seed)
    split = split or "test"
    if split not in ("train", "test"):
        raise InputError(f"split of {data} must be train or test, got {short(split)}")
    cache = as_path("root", root) if root is not None else Path.home() / ".cache" / "qdv_gpu"
    if data == "digits":
        images = _digits(split)
    elif data == "cifar10":
        images = _cifar10(split, cache)
    else:
        images = _fashion_mnist(split, cache)
    labels = images.require_labels("a sample of each class")
    return images.take(stratified(labels, images.classes, samples, seed=seed))


def check_data(data: str | Path) -> None:
    """Raise InputError unless `data` names a data set, a folder or a table."""
    path = as_path("data", data)
    if data in DATASETS or path.is_dir():
        return
    table = path.suffix.lower() in TABLE_SUFFIXES
    if path.is_file():
        if table:
            return
        raise InputError(f"data must be a folder or a table ({', '.join(TABLE_SUFFIXES)}), got the file {data}")
    if table or os.sep in str(data):
        raise InputError(f"data {'table' if table else 'folder'} {data} does not exist")
    error = unknown("data set", str(data), [*DATASETS, "a folder", "a .csv"])
    raise InputError(f"{error}; no folder of that name is here either")


def stratified(labels: Tensor, classes: Sequence[str], samples: int | str, *, seed: int = 222) -> Tensor:
    """Positions of `samples` images, equally many of each class; "all" keeps every image in its order."""
    total = check_samples(samples)
    if isinstance(total, str):
        return torch.arange(len(labels))
    check_per_class("samples", total, len(classes))
    random = np.random.RandomState(seed)
    chosen = []
    for c, name in enumerate(classes):
        members = np.flatnonzero(labels.numpy() == c)
        wanted = total // len(classes) + (c < total % len(classes))
        if len(members) < wanted:
            raise InputError(f"class {name!r} has {len(members)} images, fewer than the {wanted} asked for")
        chosen.append(random.choice(members, wanted, replace=False))
    return torch.from_numpy(np.concatenate(chosen))


def check_per_class(name: str, samples: int, classes: int) -> None:
    """Raise InputError unless so many images hold one of each class."""
    if samples < classes:
        raise InputError(f"{name} must be at least one per class ({classes}), got {samples}")


def drawn(count: int, samples: int | str, *, seed: int = 222) -> Tensor:
    """Positions of `samples` of `count` images without labels; "all" keeps every image in its order."""
    total = check_samples(samples)
    if isinstance(total, str):
        return torch.arange(count)
    if not 1 <= total <= count:
        raise InputError(f"samples must be within 1 and {count}, the number of images, or all, got {total}")
    return torch.from_numpy(np.random.RandomState(seed).choice(count, total, replace=False))


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


def list_images(path: Path, split: str | None) -> Listing:
    """List the image files of a folder or a table, as `list_folder` and `list_table`."""
    return list_folder(path, split) if path.is_dir() else list_table(path, split)


def _of_files(listing: Listing, samples: int | str, geometry: Geometry | None, *, skip_bad: bool, seed: int) -> Images:
    """A sample of the files, decoded if they are of one size or are made so."""
    files = listing.files
    headers = list(each_file(_whole if skip_bad else header, files))
    bad = [found for found in headers if isinstance(found, str)]
    if bad and (len(bad) == len(files) or not skip_bad):
        raise refusal(bad, len(files))
    if bad:
        logger.warning("skipped %d unreadable files of %s, the first: %s", len(bad), listing.where, bad[0])
    good = torch.tensor([i for i, found in enumerate(headers) if isinstance(found, Header)])
    if listing.labels is None:
        labels, chosen = None, good[drawn(len(good), samples, seed=seed)]
    else:
        every = torch.tensor(listing.labels)
        chosen = good[stratified(every[good], listing.classes, samples, seed=seed)]
        labels = every[chosen]
    found = [found for i in chosen.tolist() if isinstance(found := headers[i], Header)]
    sizes, gray = {one.size for one in found}, all(one.gray for one in found)
    size = next(iter(sizes)) if len(sizes) == 1 else None
    reader = FileReader(files, listing.folder, None, size, gray=gray)
    name = str(listing.folder if listing.where.is_dir() else listing.where)
    images = Images(name, labels, listing.classes, chosen, None, reader, len(bad), sizes=len(sizes))
    if size is None:
        return images if geometry is None else images.at(geometry)
    pixels = hold(reader, chosen.tolist(), (1 if gray else 3, *size), images.hashes)
    return replace(images, pixels=pixels)


def _whole(path: Path) -> Header | str:
    """As `header`, after decoding every pixel."""
    pixels = decode(path)
    return pixels if isinstance(pixels, str) else header(path)
