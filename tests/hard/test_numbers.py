"""Every number that an option or an argument cannot be is refused in one line, and nothing is written."""

import pytest
from hard.cases import SMALL

NONE = ("nan", "-1", "-9223372036854775809", "²", "", "1e", "0x10")  # that no number here can be
WHOLE = (*NONE, "inf", "1.5", "9223372036854775808", "1" + "0" * 400)
FEW = ("--data", "digits", "--samples", "60", "--epochs", "1", "--device", "cpu")
ANALYZE = ("analyze", "tiny_networks:cnn", *SMALL, "--out", "out")
FINETUNE = ("finetune", "tiny_networks:cnn", *FEW, "--out", "out")
DECONV = ("deconv", "tiny_networks:cnn", "--data", "digits", "--device", "cpu", "--layers", "pool@1", "--out", "out")
PROFILE = ("profile", "tiny_networks:cnn", "--device", "cpu", "--out", "out")
SWEEP = ("sweep", "{runs}/SWEEP.toml", "--dry-run", "--out", "out")
SIDES = (*WHOLE, "0", "100000", "9223372036854775807")
OPTIONS = [
    (ANALYZE, "samples", (*WHOLE, "0", "3")),
    (ANALYZE, "image-size", SIDES),
    (ANALYZE, "mean", ("nan", "inf", "-inf", "1e300", "²", "", "1e", "0x10", "1,2", ",")),
    (ANALYZE, "std", (*NONE, "inf", "1e300", "0", "1e-320", "1,2")),
    (ANALYZE, "pca", WHOLE),
    (ANALYZE, "perplexity", (*NONE, "inf", "1e300", "0", "0.5", "20")),
    (ANALYZE, "iterations", (*WHOLE, "0")),
    (ANALYZE, "learning-rate", (*NONE, "inf", "1e300", "1e-320", "0")),
    (ANALYZE, "seeds", (*WHOLE, "0", "9223372036854775807", "100000")),
    (ANALYZE, "k", (*WHOLE, "0", "30", "1,1")),
    (ANALYZE, "memory", (*NONE, "inf", "0", "1e400", "1KB")),
    (FINETUNE, "samples", (*WHOLE, "0", "3")),
    (FINETUNE, "image-size", SIDES),
    (FINETUNE, "std", ("0", "nan", "1e-320")),
    (FINETUNE, "epochs", (*WHOLE, "0")),
    (FINETUNE, "batch-size", (*WHOLE, "0")),
    (FINETUNE, "lr", (*NONE, "inf", "1e300", "0")),
    (FINETUNE, "seed", (*WHOLE, "9223372036854775807")),
    (FINETUNE, "threads", (*WHOLE, "0", "100000")),
    (DECONV, "index", (*WHOLE, "899")),
    (DECONV, "top", (*WHOLE, "900", "9223372036854775807")),
    (DECONV, "image-size", SIDES),
    (DECONV, "std", ("0", "nan", "²")),
    (PROFILE, "image-size", SIDES),
    (PROFILE, "batch-sizes", (*WHOLE, "0", "1,0", "9223372036854775807")),
    (("layers", "tiny_networks:cnn"), "image-size", SIDES),
    (("compare", "{runs}/cnn", "{runs}/other", "--out", "out"), "margin", (*NONE, "inf", "0", "1")),
    (("compare", "{runs}/cnn", "{runs}/other", "--out", "out"), "k", (*WHOLE, "0")),
    (("plot", "{runs}/cnn", "--out", "out"), "k", (*WHOLE, "0", "60")),
    (("plot", "{runs}/cnn", "--out", "out"), "seed", (*WHOLE, "1")),
    (("report", "{runs}/cnn", "--out", "out"), "thumbnails", (*NONE, "0", "1.5")),
    (SWEEP, "workers", (*WHOLE, "0", "9223372036854775807")),
    (SWEEP, "max-points", (*WHOLE, "0")),
]


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        pytest.param(command, option, value, id=f"{command[0]}-{option}-{ascii(value)[1:20]}")
        for command, option, values in OPTIONS
        for value in values
    ],
)
def test_an_option_is_refused(warm, runs, tmp_path, *, command, option, value):
    command = [part.replace("{runs}", str(runs)) for part in command]
    done = warm.run(*command, f"--{option}={value}", cwd=tmp_path)
    assert done.refused, (done.code, done.err)
    assert not list(tmp_path.iterdir())


BEFORE = """
import numpy as np, torch, qdv_gpu
from tiny_networks import cnn
x, y, Z = torch.rand(20, 1, 8, 8), [0, 1] * 10, torch.rand(20, 2)
tsne = lambda **more: qdv_gpu.TSNE(**{'perplexity': 3, 'iterations': 5, **more}).fit_transform(Z)
sheet = {'run': {'data': 'digits', 'weights': 'none'}, 'grid': {'network': ['nosuch']}}
"""
NO_COUNT = ("float('nan')", "-1", "2**63", "10**400", "1e300", "1.5", "'²'", "[]", "True", "np.float32(2)")
NO_NUMBER = ("float('nan')", "float('inf')", "10**400", "1e300", "'²'", "1j")
ARGUMENTS = [
    ("qdv_gpu.neighborhood_hit(Z, y, k=V)", (*NO_COUNT, "0", "20")),
    ("qdv_gpu.activations(cnn(), x, layers='pool', batch_size=V)", (*NO_COUNT, "0")),
    ("qdv_gpu.activations(cnn(), x, layers='pool', image_size=V)", (*NO_COUNT, "0", "100_000")),
    ("qdv_gpu.load_network(cnn(), image_size=V)", (*NO_COUNT, "0", "100_000")),
    ("qdv_gpu.load_network(cnn(), num_classes=V)", (*NO_COUNT, "0", "2**40")),
    ("qdv_gpu.load_network(cnn(), seed=V)", NO_COUNT),
    ("qdv_gpu.load_network(cnn(), mean=V)", NO_NUMBER),
    ("qdv_gpu.load_network(cnn(), std=[V])", (*NO_NUMBER, "0", "-1")),
    ("qdv_gpu.load_images('digits', image_size=V)", (*NO_COUNT, "0", "2**40")),
    ("qdv_gpu.load_images('digits', samples=V)", (*NO_COUNT, "0")),
    ("qdv_gpu.load_images('digits', samples=20, seed=V)", (*NO_COUNT, "2**40")),
    ("qdv_gpu.as_images(x, image_size=V)", (*NO_COUNT, "0")),
    ("tsne(perplexity=V)", (*NO_NUMBER, "0", "-1", "10")),
    ("tsne(iterations=V)", (*NO_COUNT, "0")),
    ("tsne(learning_rate=V)", (*NO_NUMBER, "0", "-1", "1e-320")),
    ("tsne(early_exaggeration=V)", (*NO_NUMBER, "0.5")),
    ("tsne(seed=V)", NO_COUNT),
    ("qdv_gpu.picture(cnn(), 'out', data='digits', index=V)", (*NO_COUNT, "899")),
    ("qdv_gpu.picture(cnn(), 'out', data='digits', top=V)", (*NO_COUNT, "900")),
    ("qdv_gpu.profile(cnn(), batch_sizes=[V])", (*NO_COUNT, "0")),
    ("qdv_gpu.sweep(sheet, 'out', workers=V)", (*NO_COUNT, "0", "10_000")),
    ("qdv_gpu.sweep(sheet, 'out', max_points=V)", (*NO_COUNT, "0")),
    ("qdv_gpu.Settings(learning_rate=V)", (*NO_NUMBER, "True", "0")),
    ("qdv_gpu.Settings(k=V)", NO_COUNT[:-1]),
    ("qdv_gpu.Training(lr=V)", (*NO_NUMBER, "True", "0")),
]


@pytest.mark.parametrize(
    ("call", "value"), [(call, value) for call, values in ARGUMENTS for value in values], ids=lambda text: ascii(text)
)
def test_an_argument_is_refused(warm, tmp_path, call, value):
    done = warm.run(code=f"{BEFORE}\nV = {value}\n{call}", cwd=tmp_path)
    assert done.refused, (done.code, done.err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("network", ["cnn", "normalised"])
@pytest.mark.parametrize(("samples", "batch"), [(60, 1), (10, 1), (31, 10), (10, 64), (10, 9)])
def test_every_batch_size_trains(warm, tmp_path, network, samples, batch):
    """Also where one image is left over in the last batch."""
    arguments = ["--data", "digits", "--samples", samples, "--epochs", 1, "--batch-size", batch, "--device", "cpu"]
    done = warm.run("finetune", f"tiny_networks:{network}", *arguments, "--out", "out", cwd=tmp_path)
    assert done.code == 0, done.err
    left = samples % batch == 1 and network == "normalised"
    assert ("not trained on" in done.err) == left
