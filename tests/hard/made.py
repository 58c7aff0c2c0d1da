"""Folders of every command, of tiny networks and few images, made once to be copied and damaged."""

import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_sweep import changed

from qdv_gpu import Settings, analyze
from qdv_gpu.errors import InputError
from qdv_gpu.report import folder as folders
from qdv_gpu.studies.compare import compare
from qdv_gpu.studies.deconv import picture
from qdv_gpu.studies.export import export
from qdv_gpu.studies.finetune import finetune
from qdv_gpu.studies.plot import plot
from qdv_gpu.studies.profile import profile
from qdv_gpu.studies.report import write_report
from qdv_gpu.studies.sweep import sweep

A, B = "tiny_networks:cnn", "tiny_networks:other"
SETTINGS = Settings(layers=("relu",), samples=60, pca=5, perplexity=5, iterations=20, seeds=2, k=(5, 3))
TRAINING = {"epochs": 2, "batch_size": 50, "lr": 1e-2, "samples": 100, "device": "cpu"}
TABLE = changed(
    run={"finetune": {"samples": 60}, "analyze": {"samples": 60}, "iterations": 20, "perplexity": 5},
    grid={"network": [A, B], "lr": [1e-2], "runs": 1},
)


def refused(function, *arguments, **options):
    """What a command says that ends in an error in one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def analysed(out, network=A, **options):
    return analyze(network, "digits", out, **{"settings": SETTINGS, "device": "cpu", **options})


def trained(out, **options):
    return finetune(A, "digits", out, **{**TRAINING, **options})


def drawn(out, **options):
    return picture(A, out, **{"data": "digits", "layers": ["relu@1"], "device": "cpu", **options})


def swept(out, table=TABLE, **options):
    return sweep(table, out, **options)


def compared(out, top, **options):
    return compare(top / "a", top / "b", out=out, **options)


def both_compared(out, **options):
    return compare(A, B, "digits", out, **{"settings": SETTINGS, "device": "cpu", **options})


def exported(out, top, to="csv"):
    return export(top / "a", out, to=to)


def plotted(out, top, **options):
    return plot(top / "a", out, **options)


def reported(out, top):
    return write_report(top / "a", out / "report.html")


def profiled(out):
    return profile(A, out, batch_sizes=[1], device="cpu")


def quick_pictures(patch):
    """Have figures be written without being drawn."""

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8))
    patch.setattr(folders, "save_figure", lambda _, path: noise.save(path, "PNG"))


def make(top):
    """a and b, runs of two networks; c, their comparison; d, pictures; t, a training; s, a sweep."""
    analysed(top / "a")
    analysed(top / "b", B)
    compared(top / "c", top)
    drawn(top / "d")
    trained(top / "t")
    swept(top / "s")
    return top


def copy(top, target):
    """Folders and store, elsewhere; what is damaged there is damaged nowhere else."""
    shutil.copytree(top, target, dirs_exist_ok=True)
    return target
