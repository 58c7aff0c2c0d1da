"""Random changes of checkpoints and records, run by hand: `python -m hard.fuzz SECONDS` in tests; prints what is found.

Whatever a file holds, reading it gives what it says or an InputError.
"""

import collections
import logging
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from tiny_networks import cnn

from qdv_gpu.errors import InputError
from qdv_gpu.networks.load import load_network
from qdv_gpu.networks.weights import write_weights
from qdv_gpu.sealed import read_sealed, write_sealed


def originals(folder):
    state = cnn().state_dict()
    torch.save(state, folder / "zip.pt")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    write_weights(folder / "ours.safetensors", state, {"network": "x"})
    write_sealed(folder / "run.json", {"a": [1, 2], "b": {"c": "d"}})
    return [(file.suffix, file.read_bytes()) for file in sorted(folder.iterdir())]


def changed(contents, chance):
    """Some bytes of a file replaced, removed or added, half of them where headers are."""
    found = bytearray(contents)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(found) if chance.random() < 0.5 else min(len(found), 600))
        kind = chance.randrange(3)
        some = chance.randbytes(chance.randrange(1, 9))
        found[at : at + (1, 20, 0)[kind]] = some[:1] if kind == 0 else b"" if kind == 1 else some
        found = found or bytearray(b"x")
    return bytes(found)


def main(seconds):
    warnings.simplefilter("ignore")
    logging.disable()
    folder, chance, number = Path(tempfile.mkdtemp()), random.Random(0), 0
    files, found, end = originals(folder), collections.Counter(), time.time() + seconds
    while time.time() < end:
        suffix, contents = chance.choice(files)
        file = folder / f"changed{suffix}"
        file.write_bytes(changed(contents, chance))
        number += 1
        try:
            if suffix == ".json":
                read_sealed(file)
            else:
                load_network("tiny_networks:cnn", weights=file, device="cpu")
        except InputError:
            pass
        except Exception as error:
            found[suffix, type(error).__name__, str(error)[:100]] += 1
    print(f"{number} files, {len(found)} findings", *found.items(), sep="\n")


if __name__ == "__main__":
    main(float(sys.argv[1]))
