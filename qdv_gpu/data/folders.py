"""Folders of image files: one folder for each class, or images without labels."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from qdv_gpu.errors import InputError, short

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
)  # fmt: skip
SPLITS = {
    "train", "training", "trainval", "test", "testing", "val", "valid", "validation", "eval", "evaluation", "dev",
    "holdout", "query", "gallery",
}  # fmt: skip
SHOWN = 6  # names in a message


class Listing(NamedTuple):
    """Image files, before any is opened.

    Attributes
    ----------
    where : Path
        The folder or table that lists them.
    folder : Path
        What their names are relative to.
    files : list of Path
    labels : list of int or None
        Class of each file.
    classes : tuple of str
    """

    where: Path
    folder: Path
    files: list[Path]
    labels: list[int] | None
    classes: tuple[str, ...]


class _Tree(NamedTuple):
    """What is below a folder, or the files of the folder itself only, sorted."""

    images: list[Path]
    others: list[str]  # kinds of the files that are no images by their name


def list_folder(folder: Path, split: str | None = None) -> Listing:
    """List the image files of `folder / split`.

    Parameters
    ----------
    folder : Path
        Below it, or below its folder `split`: a folder of images for each class, which may have folders of its own,
        or images without labels.
    split : str, optional
        By default "test" if there is such a folder, else `folder` itself.

    Returns
    -------
    Listing
        Classes sorted by name, and the files of each by path. Hidden files and folders are left out; a line of the
        log counts what else is.

    Raises
    ------
    InputError
        For a split that is not there; for splits where classes are expected; for no image, images beside folders of
        images, a single class, a class without images; for a folder that cannot be read.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> top = pathlib.Path(tempfile.mkdtemp())
    >>> for name in ("val/cat/1.png", "val/dog/a/2.PNG", "val/dog/b/3.jpg"):
    ...     (top / name).parent.mkdir(parents=True, exist_ok=True)
    ...     (top / name).touch()
    >>> listing = list_folder(top, "val")
    >>> listing.classes, listing.labels
    (('cat', 'dog'), [0, 1, 1])
    """
    base = _base(folder, split)
    here = _tree(base, deep=False)
    trees = {path.name: _tree(path) for path in _folders(base)}
    full = {name: tree for name, tree in trees.items() if tree.images}
    if base == folder:
        _check_no_splits(folder, full)
    others = Counter(kind for tree in [here, *trees.values()] for kind in tree.others)
    if here.images and full:
        raise InputError(
            f"{base} holds images and also folders of images ({some(list(full))}): "
            "put each into the folder of its class, or all into one folder without labels"
        )
    if not here.images and not full:
        found = f"it has {_left_out(others)}" if others else "it has no files"
        raise InputError(f"{base} holds no images ({', '.join(IMAGE_SUFFIXES)}): {found}")
    if others:
        logger.info("left out %s", _left_out(others, f" of {base}"))
    if here.images:
        return Listing(base, folder, here.images, None, ())
    for name in trees:
        if name not in full:
            raise InputError(f"class {name!r} in {base} has no images ({', '.join(IMAGE_SUFFIXES)})")
    if len(trees) < 2:
        (name,) = trees
        raise InputError(
            f"{base} must hold a folder for each of two or more classes, got 1, {name!r}: "
            f"add another class, or give {base / name} for images without labels"
        )
    files = [path for tree in trees.values() for path in tree.images]
    return Listing(base, folder, files, [c for c, tree in enumerate(trees.values()) for _ in tree.images], (*trees,))


def _base(folder: Path, split: str | None) -> Path:
    """The folder that holds the classes or the images."""
    if split is None:
        return folder / "test" if (folder / "test").is_dir() else folder
    if not split or Path(split).name != split or split == "..":
        raise InputError(f"split must be the name of a folder, got {short(split)}")
    if not (folder / split).is_dir():
        there = some([path.name for path in _folders(folder)]) or "no folders"
        raise InputError(f"data folder {folder} has no folder {short(split)} for this split: it has {there}")
    return folder / split


def _check_no_splits(folder: Path, trees: dict[str, _Tree]) -> None:
    """Raise InputError if the folders that hold images are splits, not classes."""
    usual = [name for name in trees if name.lower().rstrip("0123456789._-") in SPLITS]  # also val2017
    splits = usual if len(usual) > 1 or len(usual) == len(trees) else []  # "train" alone may be the vehicle
    depth = len(folder.parts) + 1
    direct = any(len(path.parts) == depth + 1 for tree in trees.values() for path in tree.images)
    deeper = max((len({path.parts[depth] for path in tree.images}) for tree in trees.values()), default=0)
    if splits or (not direct and deeper > 1):
        raise InputError(
            f"{folder} has no folder 'test', and its folders hold {'splits' if splits else 'folders of images'}, "
            f"not the images of a class: pass --split {' or --split '.join((splits or list(trees))[:SHOWN])}"
        )


def _tree(top: Path, *, deep: bool = True) -> _Tree:
    """The files below a folder; links to folders are followed, once."""
    images, others, seen = [], [], set()
    for folder, folders, files in os.walk(top, followlinks=True, onerror=_refuse):
        here = os.path.realpath(folder)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        others += [f"{name}/" for name in folders if name.startswith(".")]
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
        for name in files:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                images.append(Path(folder, name))
            else:
                others.append(_kind(name))
    return _Tree(sorted(images), others)


def _folders(top: Path) -> list[Path]:
    """The folders in a folder that are not hidden, by name."""
    try:
        return sorted(path for path in top.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"data folder {error.filename} cannot be read: {error.strerror}") from None


def _kind(name: str) -> str:
    """Of a file that is left out: its suffix, or its name if that begins with a dot."""
    if name.startswith("."):
        return "._*" if name.startswith("._") else name
    return Path(name).suffix.lower() or "no suffix"


def _left_out(others: Counter[str], where: str = "") -> str:
    count = sum(others.values())
    what = "file{} that is no image by its name" if count == 1 else "files{} that are no images by their name"
    ordered = sorted(others.items(), key=lambda one: (-one[1], one[0]))
    return f"{count} {what.format(where)}: {some([f'{kind} ({n})' for kind, n in ordered])}"


def some(names: Sequence[str]) -> str:
    """The first names of many, for a message."""
    return ", ".join([*names[:SHOWN], *(["..."] if len(names) > SHOWN else [])])
