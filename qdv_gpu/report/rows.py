"""One row an image: the points of a layer as Parquet, with pictures and neighbours, and as CSV."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from qdv_gpu.files import replacing
from qdv_gpu.progress import advance
from qdv_gpu.report.tables import csv_writer
from qdv_gpu.results.points import Points

if TYPE_CHECKING:
    import pyarrow

ROWS = 1000  # of a row group: as many pictures are held at once
TEXT = ("file", "label", "prediction")
PICTURES = {"info": {"features": {"image": {"_type": "Image"}}}}  # so that Hugging Face's datasets decode them

PngFiles = Callable[[range], list[bytes]]


def write_parquet(points: Sequence[tuple[Path, Points]], k: int, png_files: PngFiles | None = None) -> None:
    """Write layers of the same images as Parquet, a file each, in groups of 1,000 rows.

    The columns are `projection_x` and `projection_y`, float32; `image`, a struct of the `bytes` of a PNG file and a
    `path`; `neighbors`, a struct of `ids`, positions of rows, and `distances`; and `Points.columns`.

    Parameters
    ----------
    points : sequence of (Path, Points)
        One or more; all their files are open at once.
    k : int
        Neighbours of each image: the nearest others in the map, nearest first.
    png_files : callable, optional
        Gives the pictures of some rows; without it there is no column of images.

    Raises
    ------
    InputError
        If the disk is full or a file cannot be written; then there is none of them.

    Examples
    --------
    >>> import pyarrow.parquet
    >>> Z = np.array([[0, 0], [3, 4], [0, 1]], np.float32)
    >>> write_parquet([(tmp_path / "a.parquet", Points("net", "conv1", Z, {"file": ["a", "b", "c"]}))], k=1)
    >>> pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()[1]["neighbors"]
    {'ids': [2], 'distances': [4.242640495300293]}
    """
    import pyarrow.parquet

    near = [_neighbors(one, k) for _, one in points]
    schemas = [_schema(one, pictures=png_files is not None) for _, one in points]
    with ExitStack() as stack:
        writers = []
        for (path, one), schema in zip(points, schemas, strict=True):
            repeated = [name for name in ("label", "prediction") if name in one.columns]
            temporary = stack.enter_context(replacing(path))
            file = stack.enter_context(temporary.open("wb"))  # pyarrow's paths are of UTF-8
            writer = pyarrow.parquet.ParquetWriter(file, schema, use_dictionary=repeated)
            writers.append(stack.enter_context(writer))
        N = len(points[0][1].Z)
        for first in range(0, N, ROWS):
            rows = range(first, min(first + ROWS, N))
            images = None if png_files is None else _images(png_files(rows), points[0][1].columns["file"], rows)
            for writer, schema, (_, one), listed in zip(writers, schemas, points, near, strict=True):
                writer.write_table(_table(schema, one, rows, listed, images), row_group_size=ROWS)
            advance("writing images", rows.stop, N)


def write_csv(path: Path, points: Points) -> None:
    """Write a layer as CSV with a header: `projection_x` and `projection_y`, and `Points.columns`.

    >>> write_csv(tmp_path / "a.csv", Points("net", "conv1", np.zeros((1, 2), np.float32), {"file": ['a "b", c']}))
    >>> (tmp_path / "a.csv").read_text().splitlines()
    ['projection_x,projection_y,file', '0,0,"a ""b"", c"']
    """
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv_writer(file)
        writer.writerow(["projection_x", "projection_y", *points.columns])
        for z, *values in zip(points.Z.tolist(), *points.columns.values(), strict=True):
            writer.writerow([*(f"{value:.9g}" for value in z), *map(cell, values)])


def cell(value: str | float) -> str:
    """A value of `Points.columns` as text.

    >>> cell(0.8), cell("a")
    ('0.8', 'a')
    """
    return value if isinstance(value, str) else f"{value:g}"


def _schema(points: Points, *, pictures: bool) -> "pyarrow.Schema":
    import pyarrow as pa

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    near = pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float32()))])
    fields = [("projection_x", pa.float32()), ("projection_y", pa.float32())]
    fields += [("image", image)] * pictures + [("neighbors", near)]
    fields += [(name, pa.string() if name in TEXT else pa.float64()) for name in points.columns]
    return pa.schema(fields, {"huggingface": json.dumps(PICTURES)} if pictures else None)


def _table(
    schema: "pyarrow.Schema", points: Points, rows: range, near: tuple[np.ndarray, np.ndarray], images: Any
) -> "pyarrow.Table":
    """Some rows of a layer."""
    import pyarrow as pa

    part = slice(rows.start, rows.stop)
    ids, distances = near
    offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * ids.shape[1])
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values[part].ravel())) for values in (ids, distances)]
    columns = {
        "projection_x": pa.array(points.Z[part, 0]),
        "projection_y": pa.array(points.Z[part, 1]),
        "image": images,
        "neighbors": pa.StructArray.from_arrays(lists, names=["ids", "distances"]),
        **{name: pa.array(values[part], schema.field(name).type) for name, values in points.columns.items()},
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _images(png_files: Sequence[bytes], files: Sequence[str], rows: range) -> "pyarrow.StructArray":
    """PNG files, and names for them: those of the images, with the suffix of what the bytes are."""
    import pyarrow as pa

    names = [str(PurePosixPath(files[i]).with_suffix(".png")) for i in rows]
    return pa.StructArray.from_arrays([pa.array(png_files, pa.binary()), pa.array(names)], names=["bytes", "path"])


def _neighbors(points: Points, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions int64 [N, k] of the nearest others in the map, and their distances float32."""
    near = points.neighbors(k)
    return near.indices.numpy(), near.squared_distances.sqrt().float().numpy()
