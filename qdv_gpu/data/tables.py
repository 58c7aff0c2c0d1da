"""Tables of image files: .csv or .tsv, with labels and splits if they have them."""

import csv
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qdv_gpu.data.folders import Listing, some
from qdv_gpu.errors import InputError, short
from qdv_gpu.files import contents_of

TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
COLUMNS = {"file": ("file", "filename", "path", "image"), "label": ("label", "class", "target"), "split": ("split",)}
INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


class _Row(NamedTuple):
    line: int
    cells: list[str]


def list_table(table: Path, split: str | None = None) -> Listing:
    """List the image files that a table names.

    Parameters
    ----------
    table : Path
        .csv or .tsv in UTF-8, a row for each image. A header names the columns, in any order: `file` (or filename,
        path, image), `label` (or class, target), `split`; others are ignored. Without a header the first column is
        the file and the second, if there is one, the label. Files are relative to the table's folder.
    split : str, optional
        Rows of which split; by default "test" if there is a column of splits, else all rows.

    Returns
    -------
    Listing
        Files in the table's order. Classes are in numeric order if all labels are integers, else sorted as text.

    Raises
    ------
    InputError
        With the line, for a file that is not there, an empty cell, a row of another length, a column named twice,
        bytes that are no UTF-8; for a split that is not there, a single class, or no rows.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for name in "abc":
    ...     (folder / f"{name}.png").touch()
    >>> _ = (folder / "all.csv").write_text("file,label\\na.png,10\\nb.png,9\\nc.png,10\\n")
    >>> listing = list_table(folder / "all.csv")
    >>> listing.classes, listing.labels
    (('9', '10'), [1, 0, 1])
    """
    rows = _rows(table)
    if not rows:
        raise InputError(f"table {table} has no rows")
    columns, rows = _columns(table, rows)
    rows = _of_split(table, rows, columns.get("split"), split)
    files = []
    for row in rows:
        name = row.cells[columns["file"]]
        if not name:
            raise InputError(f"table {table}, line {row.line}: the name of the file is empty")
        path = table.parent / name
        if not os.path.isfile(path):  # a Path raises for a name that is too long
            hint = "" if row.line > 1 else " (a header must name a column 'file')"
            raise InputError(f"table {table}, line {row.line}: there is no image file {path!s:.300}{hint}")
        files.append(path)
    if "label" not in columns:
        return Listing(table, table.parent, files, None, ())
    labels, classes = _labels(table, rows, columns["label"])
    return Listing(table, table.parent, files, labels, classes)


def _rows(table: Path) -> list[_Row]:
    """The rows that are not empty, with the lines that they begin at."""
    try:
        contents = contents_of(table)
    except OSError as error:
        raise InputError(f"table {table} cannot be read: {error.strerror}") from None
    try:
        text = contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = contents[: error.start].count(b"\n") + 1
        raise InputError(
            f"table {table}, line {line}: it must be UTF-8, got the byte {error.object[error.start]:#x}"
        ) from None
    delimiter = TABLE_SUFFIXES[table.suffix.lower()]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows, line = [], 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append(_Row(line, [cell.strip() for cell in cells]))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"table {table}, line {line}: {error}") from None
    for row in rows:
        if len(row.cells) != len(rows[0].cells):
            raise InputError(
                f"table {table}, line {row.line}: {len(row.cells)} cells, the first row has {len(rows[0].cells)}"
            )
    return rows


def _columns(table: Path, rows: list[_Row]) -> tuple[dict[str, int], list[_Row]]:
    """Position of each column, and the rows without the header."""
    first = [name.lower() for name in rows[0].cells]
    if not set(first) & set(COLUMNS["file"]):
        if len(first) > 2:
            raise InputError(
                f"table {table}, line {rows[0].line}: a header must name a column 'file' where there are more than "
                f"two columns, got {some(rows[0].cells)}"
            )
        return dict(zip(("file", "label"), range(len(first)), strict=False)), rows
    columns = {}
    for column, names in COLUMNS.items():
        found = [i for i, name in enumerate(first) if name in names]
        if len(found) > 1:
            raise InputError(
                f"table {table}, line {rows[0].line}: one column of {column}s is allowed, "
                f"got {some([rows[0].cells[i] for i in found])}"
            )
        if found:
            columns[column] = found[0]
    if len(rows) < 2:
        raise InputError(f"table {table} has no rows below its header")
    return columns, rows[1:]


def _of_split(table: Path, rows: list[_Row], column: int | None, split: str | None) -> list[_Row]:
    """The rows of one split."""
    if column is None:
        if split is not None:
            raise InputError(f"table {table} has no column 'split', and split is {short(split)}: leave it out")
        return rows
    chosen = [row for row in rows if row.cells[column] == (split or "test")]
    if not chosen:
        there = some(sorted({row.cells[column] for row in rows} - {""})) or "none"
        raise InputError(
            f"table {table} has no rows of the split {split or 'test'!r}: pass --split with one that it has ({there})"
        )
    return chosen


def _labels(table: Path, rows: Sequence[_Row], column: int) -> tuple[list[int], tuple[str, ...]]:
    """Class of each row, and the names of the classes."""
    given = [row.cells[column] for row in rows]
    for row, label in zip(rows, given, strict=True):
        if not label:
            raise InputError(f"table {table}, line {row.line}: the label is empty")
    if all(INTEGER.fullmatch(label) for label in given):
        given = [str(int(label)) for label in given]
        classes = sorted(set(given), key=int)
    else:
        classes = sorted(set(given))
    if len(classes) < 2:
        raise InputError(
            f"table {table} must have two or more classes, got 1, {classes[0]!r}: "
            "leave out the labels for images without"
        )
    position = {name: c for c, name in enumerate(classes)}
    return [position[label] for label in given], tuple(classes)
