"""What happens to files: each damage takes a path."""

import json
import shutil

import numpy as np

from qdv_gpu.networks.weights import read_tensors, write_weights
from qdv_gpu.sealed import SEAL, hash_of, read_sealed, write_sealed


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-1])


def flipped(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def empty(file):
    file.write_bytes(b"")


def zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


def binary(file):
    file.write_bytes(b"\xff\xfe\x00" + file.read_bytes())


def gone(file):
    file.unlink()


def a_folder(file):
    file.unlink()
    file.mkdir()
    (file / "x").touch()


def doubled(file):
    file.write_bytes(file.read_bytes() * 2)


BYTES = [truncated, flipped, empty, zeros, binary, a_folder, doubled]


def null(file):
    file.write_text("null\n")


def a_list(file):
    file.write_text("[1, 2]\n")


def a_number(file):
    file.write_text("3\n")


def no_keys(file):
    file.write_text("{}\n")


def nested(file):
    file.write_text("[" * 100_000)


def edited(file):
    """A number or a text is another one."""
    said = json.loads(file.read_text())

    def change(value):
        for key in (sorted(value.keys() - {SEAL}) if isinstance(value, dict) else range(len(value)))[::-1]:
            if isinstance(value[key], dict | list) and value[key]:
                return change(value[key])
            if isinstance(value[key], int | float | str):
                value[key] += "x" if isinstance(value[key], str) else 1
                return None
        raise ValueError(f"there is nothing in {file}")

    change(said)
    file.write_text(json.dumps(said))


def a_digit(file):
    """A digit of a table is another one."""
    text = file.read_text()
    place = next(i for i in range(len(text) // 2, len(text)) if text[i] in "12345678")
    file.write_text(text[:place] + chr(ord(text[place]) + 1) + text[place + 1 :])


def not_a_number(file):
    """Numbers are NaN."""
    said = json.loads(file.read_text(), parse_float=lambda _: float("nan"), parse_int=lambda _: float("nan"))
    file.write_text(json.dumps(said))


def without_a_key(file):
    said = json.loads(file.read_text())
    del said[sorted(said.keys() - {SEAL})[0]]
    file.write_text(json.dumps(said))


def swapped(file):
    """An object's values are each other's."""
    said = json.loads(file.read_text())
    names = sorted(said.keys() - {SEAL})
    values = [said[name] for name in names]
    file.write_text(json.dumps({**said, **dict(zip(names, values[1:] + values[:1], strict=True))}))


TEXT = [*BYTES, null, a_list, a_number, nested, edited, without_a_key]  # of any record
RECORD = [*TEXT, not_a_number, swapped]


def arrays_like(change):
    """A damage of .npz files: `change` gives other arrays."""

    def damage(file):
        with np.load(file) as contents:
            arrays = dict(contents)
        np.savez(file.open("wb"), **change(arrays))

    return damage


def with_Z(change):
    return arrays_like(lambda arrays: {**arrays, "Z": change(arrays["Z"])})


def _nan(Z):
    Z = Z.copy()
    Z.flat[3] = np.nan
    return Z


ARRAYS = {
    "wrong dtype": with_Z(lambda Z: Z.astype(np.float64)),
    "integers": with_Z(lambda Z: Z.astype(np.int32)),
    "wrong shape": with_Z(lambda Z: Z[:, :-1]),
    "three columns": with_Z(lambda Z: np.concatenate([Z, Z[..., :1]], axis=-1)),
    "no maps": with_Z(lambda Z: Z[:0]),
    "one map": with_Z(lambda Z: Z[0]),
    "nan": with_Z(_nan),
    "missing key": arrays_like(lambda arrays: {"labels": arrays["labels"]}),
    "labels of another type": arrays_like(lambda arrays: {**arrays, "labels": arrays["labels"].astype(np.float32)}),
    "labels out of range": arrays_like(lambda arrays: {**arrays, "labels": arrays["labels"] + 100}),
    "labels of fewer": arrays_like(lambda arrays: {**arrays, "labels": arrays["labels"][:-1]}),
    "pickled": arrays_like(lambda arrays: {**arrays, "Z": arrays["Z"].astype(object)}),
}


def unsealed(folder):
    """As older versions wrote a run folder: without hashes."""
    about = read_sealed(folder / "run.json")
    (folder / "run.json").write_text(json.dumps({**about, "files": sorted(about["files"])}))
    for file in folder.glob("*.json"):
        if file.name != "run.json":
            file.write_text(json.dumps(read_sealed(file)))


def resealed(**changes):
    """A damage of records that leaves them with a hash that is right; None takes a key away."""

    def damage(file):
        said = {**read_sealed(file), **changes}
        write_sealed(file, {name: value for name, value in said.items() if value is not None})

    return damage


def tensors_like(change):
    """A damage of weight files that leaves them with a hash that is right: `change` gives tensors and metadata."""

    def damage(file):
        tensors, metadata = read_tensors(file)
        write_weights(file, *change(tensors, metadata))

    return damage


def copied(source):
    """A file becomes what another one is."""

    def damage(file):
        assert hash_of(file) != hash_of(file.parent / source)
        shutil.copyfile(file.parent / source, file)

    return damage
