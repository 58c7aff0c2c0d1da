"""What a researcher has, as Images: arrays, data sets, loaders, PIL images."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    default_collate,
    default_convert,
)

from qdv_gpu.data.geometry import Geometry
from qdv_gpu.data.images import Images
from qdv_gpu.data.labels import check_labels
from qdv_gpu.data.readers import BATCH, Item, ItemReader, read, read_again
from qdv_gpu.errors import InputError, check_side, check_text, ordered
from qdv_gpu.machine import free_memory, staying
from qdv_gpu.progress import advance

logger = logging.getLogger(__name__)
ALLOWED = (
    "Images, an array [N, C, H, W], a pair (images, labels), a Dataset, a DataLoader or a list of PIL images; "
    "load_images reads data sets by name and folders"
)
Sample = Callable[[Any], tuple[Any, Any]]


def as_images(
    data: Any, *, classes: Sequence[str] | None = None, image_size: int | None = None, name: str | None = None
) -> Images:
    """Make Images of what a researcher has.

    Parameters
    ----------
    data : Images, array, pair, Dataset, DataLoader or list
        Images are returned as they are. Arrays (numpy, torch, CuPy) are [N, C, H, W]: uint8, or floating point,
        already normalised, which is fed to the network as it is; or, in numpy and of uint8, [N, H, W, 3]. A pair is
        (images, labels), the first of them any of the others. The items of a map-style Dataset, or of anything else
        with a length and items, are an image or (image, label, ...), the image as for `image_tensor`: a PIL image, an
        array [C, H, W] or [H, W], or, in numpy and of uint8, [H, W, 3]. Of a DataLoader the data set is read in its
        own order, whatever its sampler and drop_last are, each item through its collate_fn, in as many processes as
        it has workers. An iterable data set is read once, into memory.
    classes : sequence of str, optional
        Names of the classes; default those that a data set lists as `classes`, else "0", "1", ...
    image_size : int, optional
        Images of uint8 of mixed sizes are squeezed to this side; without it they have no pixels until `Images.at` says
        which. Others keep their size.
    name : str, optional
        Default "arrays", "list" or the class of the data set.

    Returns
    -------
    Images
        In memory if at most half of the free memory is needed, else read again batch by batch.

    Raises
    ------
    InputError
        For anything else; for an item that cannot be read, is no image, or is another one when it is read again, as
        with random augmentation; for mixed sizes of floating point, or of an iterable data set; for NaN or infinite
        pixels; for labels that are not integers from 0 on, one for each image.

    Examples
    --------
    >>> from torchvision.datasets import FakeData
    >>> as_images(FakeData(12, (3, 16, 16), num_classes=4), classes=["ant", "bee", "cat", "dog"])
    Images('FakeData', 12 of uint8 [3, 16, 16], 4 classes)
    >>> as_images((np.zeros((5, 1, 8, 8), np.uint8), [0, 1, 0, 1, 0]))
    Images('arrays', 5 of uint8 [1, 8, 8], 2 classes)
    """
    if image_size is not None:
        check_side(image_size)
    if name is not None:
        check_text("name", name)
    if classes is not None:
        classes = ordered("classes", classes, "names")
    if isinstance(data, Images):
        return data
    if isinstance(data, tuple):
        return _pair(data, classes, image_size, name)
    if isinstance(data, Tensor | np.ndarray) or hasattr(data, "__cuda_array_interface__"):
        return Images.from_arrays(data, None, classes, name or "arrays")
    sample: Sample = _sample
    options: dict[str, Any] = {}
    if isinstance(data, DataLoader):
        sample, options = _of_loader(data)
        data = data.dataset
    title = name or type(data).__name__
    if classes is None:
        own = getattr(data, "classes", None)
        if isinstance(own, list | tuple) and own and all(isinstance(one, str) for one in own):
            classes = own
    reader = ItemReader(data, sample, title, options)
    if isinstance(data, IterableDataset):
        return _read_once(reader, classes)
    known = isinstance(data, Dataset | list) or (hasattr(data, "__getitem__") and hasattr(data, "__len__"))
    if not known or isinstance(data, str | bytes | dict):
        raise InputError(f"images must be {ALLOWED}; got {_short(data)}")
    try:
        count = len(data)
    except Exception as error:
        raise InputError(f"{title} has no length: {type(error).__name__}: {error}") from error
    if count < 1:
        raise InputError(f"{title} has no images")
    return _read_all(reader, count, classes, image_size)


def _pair(data: tuple[Any, ...], classes: Sequence[str] | None, image_size: int | None, name: str | None) -> Images:
    """Images of (images,) or (images, labels)."""
    if len(data) not in (1, 2):
        raise InputError(f"images must be {ALLOWED}; got a tuple of {len(data)}")
    images = as_images(data[0], classes=classes, image_size=image_size, name=name)
    if len(data) == 1:
        return images
    labels, names = check_labels(data[1], len(images), classes or images.classes or None)
    return replace(images, labels=labels, classes=names)


def _of_loader(loader: DataLoader[Any]) -> tuple[Sample, dict[str, Any]]:
    """How to make (image, label) of an item as this loader does, and the options that it reads with."""
    batches, collate = loader.batch_sampler, loader.collate_fn
    in_order = isinstance(loader.sampler, SequentialSampler) and (batches is None or type(batches) is BatchSampler)
    if not isinstance(loader.dataset, IterableDataset) and not in_order:
        used = loader.sampler if batches is None or type(batches) is BatchSampler else batches
        logger.warning("all images are read in the data set's order, not in that of %s", type(used).__name__)
    options: dict[str, Any] = {"num_workers": loader.num_workers}
    if loader.num_workers:
        options |= {"worker_init_fn": loader.worker_init_fn, "multiprocessing_context": loader.multiprocessing_context}
    if collate in (default_collate, default_convert):
        return _sample, options
    return partial(_collated, collate, batches is not None), options


def _sample(item: Any) -> tuple[Any, Any]:
    """(image, label or None) of an item: an image or (image, label, ...)."""
    if item is None or isinstance(item, dict | str):
        raise InputError(
            f"it is {_short(item)}, not an image or (image, label): "
            "give a DataLoader whose collate_fn returns (images, labels)"
        )
    if not isinstance(item, tuple | list):
        return item, None
    if not item:
        raise InputError("it is empty, not an image or (image, label)")
    return item[0], item[1] if len(item) > 1 else None


def _collated(collate: Callable[[Any], Any], batched: bool, item: Any) -> tuple[Any, Any]:  # noqa: FBT001 (partial)
    """(image, label or None) of an item, as a collate_fn unpacks it."""
    if not batched:
        return _sample(collate(item))
    images, labels = _sample(collate([item]))
    if len(images) != 1 or (hasattr(images, "ndim") and images.ndim != 4):
        got = list(images.shape) if hasattr(images, "shape") else f"{len(images)} images"
        raise InputError(f"for one item collate_fn must give images [1, C, H, W], got {got}")
    return images[0], None if labels is None else labels[0]


def _read_all(reader: ItemReader, count: int, classes: Sequence[str] | None, image_size: int | None) -> Images:
    """Read every item once, and keep the pixels if they fit."""
    first = reader[0]
    if isinstance(first, str):
        raise InputError(first)
    fits = count * first.pixels.nbytes <= free_memory(torch.device("cpu")) // 2
    pixels = torch.empty(count, *first.pixels.shape, dtype=first.pixels.dtype) if fits else None
    hashes = {0: first.digest}
    sizes = {first.pixels.shape}
    labels = []
    batches = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    for i, item in enumerate(item for items in read(reader, batches, hashes) for item in items):
        _check_alike(reader, i, first, item)
        sizes.add(item.pixels.shape)
        if len(sizes) > 1:
            pixels = None
            if image_size is not None:
                reader.geometry = Geometry(image_size)
                return _read_all(reader, count, classes, None)
        if pixels is not None:
            pixels[i] = item.pixels
        labels.append(item.label)
        advance("reading images", i + 1, count)
    targets, names = _labels(labels, classes)
    if pixels is not None:
        read_again(reader, range(count), hashes)
    return Images(reader.title, targets, names, torch.arange(count), pixels, reader, hashes=hashes, sizes=len(sizes))


def _read_once(reader: ItemReader, classes: Sequence[str] | None) -> Images:
    """Read an iterable data set into memory."""
    room = free_memory(torch.device("cpu")) // 2
    pixels: list[Tensor] = []
    labels = []
    first: Item | None = None
    for i, value in enumerate(_values(reader)):
        try:
            item = reader.item(value)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{reader.describe(i)} is not usable: {reason}") from error
        first = first or item
        _check_alike(reader, i, first, item)
        if item.pixels.shape != first.pixels.shape:
            raise InputError(f"{reader.title} has images of mixed sizes: resize them, or make it a map-style Dataset")
        room -= 2 * item.pixels.nbytes  # they are joined in the end
        if room < 0:
            raise InputError(f"{reader.title} needs more than half of the free memory: make it a map-style Dataset")
        pixels.append(item.pixels)
        labels.append(item.label)
        advance("reading images", i + 1, i + 1)
    if not pixels:
        raise InputError(f"{reader.title} has no images")
    targets, names = _labels(labels, classes)
    return Images(reader.title, targets, names, torch.arange(len(pixels)), torch.stack(pixels))


def _values(reader: ItemReader) -> Iterator[Any]:
    """The items of an iterable data set."""
    try:
        items = iter(reader.items)
        while True:
            with staying():
                item = next(items, reader)
            if item is reader:
                return
            yield item
    except Exception as error:
        raise InputError(f"{reader.title} cannot be read: {type(error).__name__}: {error}") from error


def _check_alike(reader: ItemReader, i: int, first: Item, item: Item) -> None:
    """Raise InputError unless an item is as the first, or resizing can make it so."""
    a, b = first.pixels, item.pixels
    if a.shape == b.shape and a.dtype == b.dtype:
        return
    what = f"{reader.describe(i)} is {b.dtype} {list(b.shape)}, item 0 {a.dtype} {list(a.shape)}"
    if a.dtype != b.dtype or a.is_floating_point():
        raise InputError(f"{what}: images must be of one dtype, and floating-point ones of one shape")
    if a.shape[0] != b.shape[0]:
        raise InputError(f"{what}: convert them to one number of channels")


def _labels(labels: list[Any], classes: Sequence[str] | None) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels of items, None if no item has one."""
    if all(label is None for label in labels):
        return check_labels(None, len(labels), classes)
    for i, label in enumerate(labels):
        kind = getattr(label, "dtype", None)
        whole = isinstance(label, int) if kind is None else np.ndim(label) == 0
        if not whole or isinstance(label, bool):
            raise InputError(f"labels must be integers, one for each image, got {_short(label)} for image {i}")
    if any(getattr(label, "dtype", None) is not None for label in labels):
        found = [np.asarray(label.cpu() if isinstance(label, Tensor) else label) for label in labels]
        wrong = next((i for i, label in enumerate(found) if label.dtype.kind not in "iu"), None)
        if wrong is not None:
            raise InputError(f"labels must be integers, got {found[wrong].dtype} for image {wrong}")
        labels = [int(label) for label in found]
    return check_labels(labels, len(labels), classes)


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    if value is None or (isinstance(value, str | int | float) and len(text) <= 60):
        return text
    return f"{'an' if type(value).__name__[0].lower() in 'aeiou' else 'a'} {type(value).__name__}"
