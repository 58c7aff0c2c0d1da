"""Records in JSON that carry a hash of what they say, so that no damaged one is taken for what was written."""

import json
from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from qdv_gpu.errors import InputError
from qdv_gpu.files import check_regular, read_json, write_json

SEAL = "seal"  # the key of the hash


def seal_of(record: Mapping[str, Any]) -> str:
    """Hash of what a record says, as JSON keeps it: hexadecimal SHA-256.

    >>> seal_of({"a": (1, 2), "b": 0.5}) == seal_of({"b": 0.5, "a": [1, 2]})
    True
    """
    kept = json.loads(json.dumps(record))
    return sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def write_sealed(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record, its hash under "seal", to `path` atomically."""
    plain = {name: value for name, value in record.items() if name != SEAL}
    write_json(path, {**plain, SEAL: seal_of(plain)})


def read_sealed(path: str | Path, **needed: Any) -> dict[str, Any]:
    """Read a record, without its hash. One that has none is of an older version, or written by hand, and is read too.

    Parameters
    ----------
    path : str or Path
    **needed
        Names of what it says at least, and the types of that.

    Raises
    ------
    InputError
        If it is no JSON object, its hash is another, or it says less, or of another type.
    OSError
        If it cannot be read.
    """
    said = read_json(path)
    if not isinstance(said, dict):
        raise InputError(f"{path} is damaged (it holds no JSON object)")
    if SEAL in said and said.pop(SEAL) != seal_of(said):
        raise InputError(f"{path} is damaged (it is not what its hash says)")
    for name, kind in needed.items():
        if name not in said or not isinstance(said[name], kind):
            raise InputError(f"{path} is damaged, or of another version ({name} is not what it should be)")
    return said


def hash_of(file: str | Path) -> str:
    """Hash of a file's bytes: hexadecimal SHA-256."""
    check_regular(file)
    with Path(file).open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()
