"""Coverage-guided changes of checkpoints, records and texts, by hand: `python -m hard.fuzz TARGET SECONDS` in tests.

It needs `pip install atheris`. Whatever is read gives what it says or an InputError. What it raises else is printed
once for each place, and the input kept in a folder that is named at the end. "all" gives each target a share.

Records are changed in what they say, and sealed again, so that what lies behind their hashes is reached.
"""

import atexit
import contextlib
import io
import json
import logging
import random
import shutil
import subprocess
import sys
import tempfile
import tomllib
import traceback
import warnings
import zipfile
from pathlib import Path

import atheris

from qdv_gpu.kernels import bandwidths, cpu, distances, pooling  # noqa: F401  # numba compiles them as they are

with atheris.instrument_imports(include=["qdv_gpu"], enable_loader_override=False):
    import numpy as np
    import pytest
    import torch
    from hard import made
    from tiny_networks import cnn

    from qdv_gpu.data.tables import list_table
    from qdv_gpu.errors import InputError
    from qdv_gpu.features.forward import activations
    from qdv_gpu.networks.load import load_network
    from qdv_gpu.networks.spec import Spec
    from qdv_gpu.networks.weights import HASH, _digest, read_tensors, write_weights
    from qdv_gpu.results.run import RUN, read_run
    from qdv_gpu.results.store import ARRAYS, MANIFEST, Key, Store
    from qdv_gpu.results.view import view_run
    from qdv_gpu.sealed import hash_of, read_sealed, write_sealed
    from qdv_gpu.studies.compare import compare
    from qdv_gpu.studies.export import export
    from qdv_gpu.studies.grid import read_sweep
    from qdv_gpu.studies.plot import plot
    from qdv_gpu.studies.report import write_report
    from qdv_gpu.studies.status import status

SCALARS = [None, True, False, 0, -1, 1, 2**63, 10**400, 1e300, 0.5, float("nan"), float("inf"), "", "x", "a\nb", "\0",
           "/", "..", "é", "\ud800", [], {}, [1], [[]], {"": 0}]  # fmt: skip


def mutated_json(value, chance):
    """A value with one of its parts replaced, taken away, doubled or moved."""
    places = []

    def visit(one):
        for key in list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ():
            places.append((one, key))
            visit(one[key])

    visit(whole := {"": value})
    inside, key = chance.choice(places)
    kind = chance.randrange(4)
    if kind == 0:
        other, name = chance.choice(places)
        inside[key] = json.loads(json.dumps(other[name]))
    elif kind == 1 and isinstance(inside[key], int | float) and abs(inside[key]) < 2**99:
        inside[key] = chance.choice((-1, 0, 2, 0.5, 1 + 1e-9)) * inside[key] + chance.choice((0, 1, -1))
    elif kind == 2 and inside is not whole:
        del inside[key]
    else:
        inside[key] = chance.choice(SCALARS)
    return whole[""]


def mutate_record(data, most, seed):
    """A record's number, and what it says, changed as JSON."""
    try:
        said = json.loads(data[1:])
        found = data[:1] + json.dumps(mutated_json(said, random.Random(seed))).encode(errors="surrogatepass")
        return found if len(found) <= most else data
    except (ValueError, RecursionError):
        return atheris.Mutate(data, most)


class Weights:
    """Whole files, and what is behind a checksum: the pickle of a .pt file, the header of a sealed .safetensors."""

    KINDS = ("zip.pt", "old.pth", "ours.safetensors", "caffe.npy", "pickle.pt", "header.safetensors")

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        state = cnn().state_dict()
        file = folder / f"seed{Path(kind).suffix}"
        if kind == "caffe.npy":
            shapes = {"conv1": (1, 1, 3, 4), "fc6": (9216, 2)}
            layers = {name: [np.zeros(shapes.get(name, (1, 1, 1, 1)), np.float32), np.zeros(2, np.float32)]
                      for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")}  # fmt: skip
            layers |= {name: [np.zeros((2, 2), np.float32), np.zeros(2, np.float32)] for name in ("fc7", "fc8")}
            np.save(file, layers, allow_pickle=True)
        elif file.suffix == ".safetensors":
            write_weights(file, state, {"network": "x"})
        else:
            torch.save({"state_dict": state, "epoch": 3}, file, _use_new_zipfile_serialization=kind != "old.pth")
        self.seed = file.read_bytes()

    def seeds(self):
        if self.kind == "pickle.pt":
            with zipfile.ZipFile(io.BytesIO(self.seed)) as archive:
                return [archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))]
        if self.kind == "header.safetensors":
            return [b"\0" + json.dumps({"network": "x", "settings": {"lr": 0.1}, "history": [{"loss": 1.0}]}).encode()]
        return [self.seed]

    @property
    def mutate(self):
        return mutate_record if self.kind == "header.safetensors" else None

    def run(self, data):
        file = self.folder / f"changed{Path(self.kind).suffix}"
        if self.kind == "pickle.pt":
            with zipfile.ZipFile(io.BytesIO(self.seed)) as old, zipfile.ZipFile(file, "w") as new:
                for name in old.namelist():
                    new.writestr(name, data if name.endswith("data.pkl") else old.read(name))
        elif self.kind == "header.safetensors":
            from safetensors.torch import save_file

            state, said = cnn().state_dict(), json.loads(data[1:])
            if isinstance(said, dict):
                said[HASH] = _digest(state, {name: value for name, value in said.items() if name != HASH})
            save_file(state, file, metadata={"qdv_gpu": json.dumps(said)})
            read_tensors(file)
        else:
            file.write_bytes(data)
        load_network("alexnet" if self.kind == "caffe.npy" else "tiny_networks:cnn", weights=file, device="cpu")


class Records:
    """Each JSON file of run folders of every command, and of their store, read by whatever reads it."""

    mutate = staticmethod(mutate_record)

    def __init__(self, _kind, folder):
        made.quick_pictures(pytest.MonkeyPatch())
        self.top, self.kept = folder / "top", folder / "kept"
        self.top.mkdir()
        self.asked = {}
        real = Store.read

        def read(store, key, check=None):
            self.asked[key.digest] = (key, check)
            return real(store, key, check)

        Store.read = read
        made.make(self.top)
        made.analysed(self.top / "a")
        shutil.copytree(self.top, self.kept)
        self.files = sorted(file.relative_to(self.top) for file in self.top.rglob("*.json"))[:255]
        self.count = 0

    def seeds(self):
        return [bytes([number]) + json.dumps(read_sealed(self.kept / file)).encode()
                for number, file in enumerate(self.files)]  # fmt: skip

    def run(self, data):
        name, said = self.files[data[0] % len(self.files)], json.loads(data[1:])
        try:
            self.change(name, said)
            self.count += 1
            self.read(name, often=self.count % 8 == 0)
        finally:
            for one in {name.parts[0], ".qdv-store"}:
                shutil.rmtree(self.top / one)
                shutil.copytree(self.kept / one, self.top / one)

    def change(self, name, said):
        """Write a record with a hash that is right, also in the run.json that lists it."""
        file = self.top / name
        write_sealed(file, said) if isinstance(said, dict) else file.write_text(json.dumps(said))
        run = self.top / name.parts[0] / RUN
        if run.is_file() and run != file:
            about = read_sealed(run)
            if str(file.relative_to(run.parent)) in about.get("files", {}):
                about["files"][str(file.relative_to(run.parent))] = hash_of(file)
                write_sealed(run, about)

    def read(self, name, *, often):
        """Read what was changed; once in a while by all that takes longer."""
        top, kind, out = self.top, name.parts[0], self.top.parent / "out"
        shutil.rmtree(out, ignore_errors=True)
        if kind == ".qdv-store":
            store = Store(top / kind)
            store.entries()
            if name.name == MANIFEST:
                file = top / name
                try:
                    told = read_sealed(self.kept / name)
                    key = Key(told["stage"], told["version"], told["parameters"], tuple(told["parents"]))
                    own, check = self.asked.get(key.digest, (None, None))
                    store.find(key.stage, key.digest, check)
                    store.nearest(own or key)
                    if own is not None and file.is_file():
                        store.read(own, check)
                finally:
                    store.holds([key.digest])
            read(store.unreferenced)
            calls = [lambda: made.analysed(top / "a"), lambda: read_run(top / "a"), lambda: made.trained(top / "t")]
        elif kind in ("a", "b"):
            read(view_run, top / kind)
            read(read_run, top / kind)
            calls = [
                lambda: made.analysed(top / "a"),
                lambda: compare(top / "a", top / "b", out=out),
                lambda: write_report(top / kind, out / "report.html"),
                lambda: export(top / kind, out, to="csv"),
                lambda: plot(top / kind, out),
            ]
        elif kind == "s":
            read(status, top / "s")
            calls = [lambda: made.swept(top / "s"), lambda: write_report(top / "s", out / "report.html")]
        else:
            again = {"c": lambda: made.compared(top / "c", top), "d": lambda: made.drawn(top / "d"),
                     "t": lambda: made.trained(top / "t")}  # fmt: skip
            calls = [again[kind], lambda: write_report(top / kind, out / "report.html")]
        for call in calls if often else [calls[self.count % len(calls)]]:
            read(call)


class Arrays(Records):
    """The arrays of stages, with a hash that is right: as JSON the dtype, shape and values of each."""

    def __init__(self, kind, folder):
        super().__init__(kind, folder)
        places = {key.folder: key for key, _ in self.asked.values()}
        self.files = [Path(".qdv-store", place) for place in sorted(places)
                      if (self.top / ".qdv-store" / place / ARRAYS).is_file()][:255]  # fmt: skip

    def seeds(self):
        return [bytes([number]) + json.dumps(self.said(file)).encode() for number, file in enumerate(self.files)]

    def said(self, name):
        with np.load(self.kept / name / ARRAYS) as arrays:
            return {name: [str(array.dtype), list(array.shape), array.ravel()[:4].tolist()]
                    for name, array in arrays.items()}  # fmt: skip

    def change(self, name, said):
        arrays = {}
        for one, (dtype, shape, values) in said.items():
            if np.prod(shape) * np.dtype(dtype).itemsize > 1 << 22:
                raise InputError("too large")
            arrays[one] = np.resize(np.array(values), shape).astype(dtype)
        np.savez((self.top / name / ARRAYS).open("wb"), **arrays)
        manifest = read_sealed(self.top / name / MANIFEST)
        manifest["files"][ARRAYS] = hash_of(self.top / name / ARRAYS)
        write_sealed(self.top / name / MANIFEST, manifest)

    def run(self, data):
        self.files, whole = [name / MANIFEST for name in self.files], self.files
        change = self.change
        try:
            self.change = lambda name, said: change(name.parent, said)
            try:
                super().run(data)
            except (TypeError, ValueError, LookupError, AttributeError):
                if not traceback.extract_tb(sys.exc_info()[2])[-1].filename.endswith(("fuzz.py", "fromnumeric.py")):
                    raise
        finally:
            self.files, self.change = whole, change


class Texts:
    """Sweeps, networks, layers and tables as text."""

    mutate = None
    KINDS = {  # noqa: RUF012
        "sweep": ["[run]\ndata='digits'\nk=[5,3]\nfinetune.samples=9\n[grid]\nnetwork=['alexnet',{base='alexnet',"
                  "edits={a=1}}]\nlr=[1e-3]\nruns=2\n[[points]]\nnetwork='vgg16[width=0.5]'\nruns=[1,2]"],
        "network": ["A=resnet18(num_classes=3)[layer1.0.conv1.kernel_size=5, width=0.5, carry=fresh]=x.pt",
                    "timm:vit(img_size=(2, 3))=none", "a.b:c[features.depth=3,norm=batch]"],
        "edits": ["conv1.kernel_size=5, width=0.5, carry=fresh", "conv2.out_channels=4, activation=elu, pooling=avg",
                  "pool.kernel_size=3, norm=none, zf", "fc.bias=False, conv1.stride=2, conv2.depth=2"],
        "layers": ["relu@2, pool", "conv1,conv2,fc", "all", "dropout@1"],
        "table": ["file,label,split\na.png,1,test\nb.png,2,test\n", "a.png,x\nb.png,y\n", 'a.png,"x\n"\nb.png,2'],
    }  # fmt: skip

    def __init__(self, kind, folder):
        self.kind, self.folder, self.network = kind, folder, load_network(cnn(), device="cpu")
        for name in "ab":
            (folder / f"{name}.png").touch()

    def seeds(self):
        return [text.encode() for text in self.KINDS[self.kind]]

    def run(self, data):
        if self.kind == "table":
            (self.folder / "t.csv").write_bytes(data)
            list_table(self.folder / "t.csv")
            return
        text = data.decode(errors="surrogateescape")
        if self.kind == "sweep":
            (self.folder / "s.toml").write_bytes(data)
            read(read_sweep, self.folder / "s.toml")
            try:
                table = tomllib.loads(text)
            except (ValueError, RecursionError):
                return
            read_sweep(table)
        elif self.kind == "network":
            Spec.parse(text)
        elif self.kind == "edits":
            load_network(f"tiny_networks:cnn[{text}]", weights="none", device="cpu")
        else:
            activations(self.network, torch.zeros(2, 1, 8, 8), layers=text)


TARGETS = {
    **dict.fromkeys(Weights.KINDS, Weights), "records": Records, "arrays": Arrays, **dict.fromkeys(Texts.KINDS, Texts),
}  # fmt: skip


def read(function, *arguments):
    """Call what may refuse what it reads."""
    with contextlib.suppress(InputError):
        function(*arguments)


def main(name, seconds):
    warnings.simplefilter("ignore")
    logging.disable()
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    kept = Path(tempfile.gettempdir(), f"fuzz-{name}")
    target, found = TARGETS[name](name, folder), set()
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds()):
        (corpus / str(number)).write_bytes(seed)

    def one(data):
        try:
            target.run(data)
        except InputError:
            pass
        except Exception as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "qdv_gpu" in frame.filename]
            if not frames:  # of this file
                return
            place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {type(error).__name__}"
            if place not in found:
                found.add(place)
                kept.mkdir(exist_ok=True)
                (kept / str(len(found))).write_bytes(data)
                print(f"{name}: {place}: {error!s:.200} <- {kept / str(len(found))}: {data[:60]!r}", flush=True)

    options = [f"-max_total_time={seconds}", "-max_len=200000", "-timeout=300", "-rss_limit_mb=8000", "-len_control=0",
               "-verbosity=0", "-print_final_stats=1"]  # fmt: skip
    more = {"custom_mutator": target.mutate} if target.mutate else {}
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, **more)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1] == "all":
        for name in TARGETS:
            subprocess.run(
                [sys.executable, "-m", "hard.fuzz", name, str(int(sys.argv[2]) // len(TARGETS))], check=False
            )
    else:
        main(sys.argv[1], int(sys.argv[2]))
