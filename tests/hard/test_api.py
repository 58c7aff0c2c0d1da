"""All that Python code can call, with every kind of value in the place of each argument: done, or an InputError."""

import dataclasses

import pytest

import qdv_gpu

HEAD = """
import decimal, fractions, math, pathlib, shutil, sys, traceback, warnings
import numpy as np, qdv_gpu, torch
from tiny_networks import cnn
warnings.simplefilter("ignore")
from qdv_gpu import *
from qdv_gpu.errors import InputError
from qdv_gpu.report import folder as folders
class Hostile:
    def fails(self, *_):
        raise RuntimeError("of a value")
    __repr__ = __str__ = __len__ = __iter__ = __getitem__ = __float__ = __int__ = __eq__ = __fspath__ = fails
    __hash__ = object.__hash__
def values(): return {
    "None": None, "object": object(), "list": [], "dict": {}, "set": {1}, "text": "", "word": "nosuch", "bytes": b"",
    "float": 1.5, "nan": math.nan, "inf": math.inf, "negative": -1, "zero": 0, "large": 2**63, "huge": 10**400,
    "true": True, "generator": (i for i in "ab"), "function": lambda *_: 1, "class": dict, "module": math,
    "int64": np.int64(3), "float32": np.float32(2), "bool_": np.bool_(1), "str_": np.str_("x"), "array": np.zeros(()),
    "empty array": np.zeros((0, 2)), "tensor": torch.tensor(math.nan), "one": (1,), "five": (1, 2, 3, 4, 5),
    "nested": [[1, [2]]], "texts": ["a", "b"], "nones": [None, None], "mixed": ["a", 1, None], "table": {"a": object()},
    "numbers": {1: 2}, "complex": 1j, "decimal": decimal.Decimal("0.5"), "fraction": fractions.Fraction(1, 3),
    "path": pathlib.Path("nosuch"), "null": "a\\0b", "long": "a" * 5000, "surrogate": "a\\ud800", "lines": "a\\nb",
    "date": np.datetime64("2020-01-01"), "objects": np.array([object()]), "range": range(3), "hostile": Hostile(),
    "network": torch.nn.Linear(2, 2), "dots": ..., "type": np.float16, "parameter": torch.nn.Parameter(torch.ones(2)),
}
folders.DPI = 20
r = np.random.default_rng(0)
x, y = torch.rand(20, 1, 8, 8), [0, 1] * 10
Z = r.normal(size=(20, 2)).astype(np.float32)
net = "tiny_networks:cnn"
few = dict(samples=20, pca=3, perplexity=3, iterations=5, seeds=1, layers="pool@2", device="cpu", report=False)
table = {"run": {"data": "digits", "weights": "none", "analyze": {"samples": 20}, "perplexity": 3, "iterations": 5,
         "seeds": 1, "layers": "pool@2"}, "grid": {"network": [net]}}
images = as_images((x, y))
def network(): return load_network(net, weights="none", device="cpu")
def tsne(**more): return TSNE(**{"perplexity": 3, "iterations": 5, "device": "cpu", **more})
def of_tsne(**more): return tsne(**more).fit_transform(Z)
def of_settings(**more): return analyze(net, "digits", "o", **{**few, **more})
def of_training(**more):
    return finetune(net, "digits", "o", **{"samples": 20, "epochs": 1, "batch_size": 10, "device": "cpu", **more})
def list_of(function): return lambda **more: list(function(**more))
def of_variant(**more): return load_network(Variant(**{"base": net, **more}), weights="none", device="cpu")
"""
RUN = "'{runs}/cnn'"
CALLS = {
    "of_tsne": "perplexity iterations early_exaggeration exaggeration_iterations learning_rate init similarity "
    "affinities engine seed device",
    "tsne().fit_transform": "X=Z y seeds perplexities",
    "tsne().fit": "X=Z y",
    "Deconvnet": "network=cnn()",
    "Deconvnet(network()).reconstruct": "image=x[0] layer='pool@1' maps mode",
    "Deconvnet(network()).top_activations": "images=x layer='pool@1' k=2 maps image_size",
    "Deconvnet(network()).sanity_check": "image=x[0] layer='pool@1' maps seed",
    "Images.from_arrays": "pixels=x labels=y classes name",
    "images.at": "geometry=images.geometry",
    "images.require_labels": "what='x'",
    "images.take": "positions=torch.arange(3)",
    "images.to": "device='cpu' limit",
    "images.__getitem__": "key=0",
    "list_of(images.batches)": "positions=[torch.arange(3)] device='cpu'",
    "Settings": "*Settings",
    "of_settings": "*Settings",
    "Training": "*Training",
    "of_training": "*Training",
    "of_variant": "base edits carry",
    "activations": "network=cnn() images=x layers='pool@1' image_size batch_size precision tokens crop",
    "analyze": "networks=net data='digits' out='o' settings weights='none' device='cpu' formats store skip_bad also "
    "report",
    "as_images": "data=(x,y) classes image_size name",
    "compare": f"first={RUN} second='{{runs}}/other' data out='o' runs pair margin settings weights device formats "
    "store skip_bad",
    "describe_layers": "network=network() image_size tokens every",
    "describe_variant": "network=of_variant(edits={'activation':'elu'}) image_size",
    "export": f"run={RUN} out='o' to='csv'",
    "finetune": "network=net data='digits' out='o' settings=Training(samples=20,epochs=1,threads=1) weights='none' "
    "device='cpu' store skip_bad",
    "load_images": "data='digits' split samples=20 image_size skip_bad root seed",
    "load_network": "spec=net weights='none' num_classes image_size mean std seed device='cpu'",
    "neighborhood_hit": "Z=Z labels=y k=3",
    "picture": "networks=net out='o' data='digits' split index image layers='pool@2' mode top contrast weights='none' "
    "image_size crop mean std formats skip_bad device='cpu'",
    "plot": f"run={RUN} out='o' networks layers k seed formats",
    "plot_maps": "maps=[Z] labels=y classes=['a','b'] titles subtitles groups difficulty",
    "plot_nh": "nh={'a':[0.5,0.6]} errors layers={'a':['x','y']} space chance k differences difference_errors",
    "plot_profile": "shares={1:[('a',0.5,'memory')]} title='t'",
    "plot_reconstructions": "grids=[r.random((4,6,6,1))] titles=['t'] images contrast",
    "plot_sanity": "modules=['a','b'] similarity=[1,0.5] title='t'",
    "plot_top": "patches=r.random((2,9,4,4,1)) pictures=r.random((2,9,4,4,1)) maps=[0,1] title='t'",
    "plot_training": "history=[{'epoch':1,'loss':1.0,'train_accuracy':0.5,'test_accuracy':0.5}] title='t'",
    "profile": "network=net out batch_sizes=[1] precision weights image_size device='cpu'",
    "status": "out='o'",
    "sweep": "source=table out='o' workers gpus slurm dask halve fail_fast retry_failed extend max_points formats "
    "store",
    "write_report": f"runs={RUN} out='o.html' thumbnails",
}
EACH = """
failed = []
for name in values():
    arguments = dict(given)
    arguments[parameter] = values()[name]
    try:
        function(**arguments)
    except (InputError, *more):
        pass
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in where if "/qdv_gpu/" in frame.filename]
        place = f"{pathlib.Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
        said = "" if name == "hostile" else f"{error!s:.150}"
        failed.append(f"{name}: {type(error).__name__} {place} {said}")
    for folder in pathlib.Path().glob("*"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
print("\\n".join(failed))
"""


def arguments_of(text, runs):
    """The names, and the Python of a dict of values, of "A=VALUE B"."""
    if text.startswith("*"):
        table = getattr(qdv_gpu, text[1:])
        return [field.name for field in dataclasses.fields(table)], ""
    parts = [part.partition("=") for part in text.split()]
    return [name for name, _, _ in parts], ", ".join(f"{n}={v}" for n, _, v in parts if v).replace("{runs}", str(runs))


CASES = [(call, name) for call, text in CALLS.items() for name in arguments_of(text, "")[0]]


@pytest.mark.parametrize(("call", "parameter"), CASES)
def test_an_argument(warm, runs, tmp_path, call, parameter):
    _, given = arguments_of(CALLS[call], runs)
    more = "[IndexError, TypeError]" if "getitem" in call else "[]"  # as of a sequence
    asked = f"{HEAD}\nfunction, parameter, given, more = {call}, {parameter!r}, dict({given}), {more}"
    done = warm.run(code=asked + EACH, cwd=tmp_path, timeout=300)
    assert done.code == 0, done.err
    assert not done.out.strip(), done.out
