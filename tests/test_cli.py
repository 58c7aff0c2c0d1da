"""The command line: what it prints, and one line and exit code 2 for bad input."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.markup import render
from typer.main import get_command

import qdv_gpu
from qdv_gpu import cli

QUICK = ["--samples", "60", "--pca", "5", "--perplexity", "5", "--iterations", "20", "--seeds", "2", "--device", "cpu"]


@pytest.fixture
def qdv(monkeypatch, capsys):
    """Run `qdv-gpu ARGUMENTS` in this process; gives (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qdv-gpu", *map(str, arguments)])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_layers(qdv):
    code, out, _ = qdv("layers", "alexnet", "--image-size", 64)
    assert code == 0
    assert "features.12" in out
    assert "256 x 1 x 1" in out
    assert "3,136" in out


def test_analyze(qdv, tmp_path):
    code, out, err = qdv(
        "analyze", "tiny_networks:cnn", "--data", "digits", "--out", tmp_path / "o", "--k", 5, "--k", 3, *QUICK
    )
    assert code == 0, err
    assert "pool@2" in out
    assert "(k = 3)" in out
    assert str(tmp_path / "o" / "figures" / "maps.png") in out
    assert "cnn pool@2: NH 0." in err


def test_finetune_then_analyze_the_checkpoint(qdv, tmp_path):
    code, out, err = qdv(
        "finetune", "tiny_networks:cnn", "--data", "digits", "--out", tmp_path / "net", "--epochs", 1, "--lr", 0.01,
        "--samples", 200, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "test accuracy" in out
    spec = f"tiny_networks:cnn={tmp_path / 'net'}"
    code, _, err = qdv("analyze", spec, "--data", "digits", "--out", tmp_path / "o", "--layers", "conv2,fc", *QUICK)
    assert code == 0, err


def test_doctor(qdv):
    code, out, _ = qdv("doctor", "--device", "cpu")
    assert code == 0
    assert "t-SNE, exact, cpu" in out
    assert "failed" not in out


def bad_folder(tmp_path):
    """A data set whose class cat has an empty file."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(30):
                pixels = np.full((8, 8, 3), i, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    (tmp_path / "data" / "test" / "cat" / "bad.png").touch()
    return tmp_path / "data"


ANALYZE = ["analyze", "tiny_networks:cnn", "--data", "digits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze", "alexnett", "--data", "digits"], "unknown network 'alexnett': did you mean alexnet"),
        ([*ANALYZE, "--layers", "pool,convx"], "unknown layer of cnn 'convx': did you mean conv"),
        (["analyze", "tiny_networks:cnn", "--data", "digit"], "unknown data set 'digit': did you mean digits"),
        (["analyze", "tiny_networks:cnn", "--data", "no/such/folder"], "data folder no/such/folder does not exist"),
        (["analyze", "tiny_networks:cnn=absent.pt", "--data", "digits"], "weights file absent.pt does not exist"),
        ([*ANALYZE, "--samples", "5000"], "class '0' has 88 images, fewer than the 500 asked for"),
        ([*ANALYZE, "--samples", "few"], "samples must be a number or all, got 'few'"),
        ([*ANALYZE, "--perplexity", "400"], "3 * perplexity below N - 1 = 898, got 400"),
        ([*ANALYZE, "--k", "899"], "k must be smaller than half the number of images (899), got 899"),
        ([*ANALYZE, "--pca", "-1"], "pca must be an integer of at least 0, got -1"),
        ([*ANALYZE, "--seeds", "five"], "--seeds"),
        ([*ANALYZE, "--preset", "papr"], "unknown preset 'papr': did you mean paper"),
        ([*ANALYZE, "--engine", "cuml"], "cuml"),
        ([*ANALYZE, "--device", "cuda:9"], "device cuda:9 was asked for, but"),
        ([*ANALYZE, "--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ([*ANALYZE, "--memory", "1MB"], "memory of 1 MB is too small for layer"),
        ([*ANALYZE, "--memory", "much"], "memory must be a size like 4GB"),
        ([*ANALYZE, "--precision", "tf32", "--device", "cpu"], "precision tf32 requires a CUDA device"),
        ([*ANALYZE, "--store", ""], "an empty value is given for --store"),
        ([*ANALYZE, "--store="], "an empty value is given for --store"),
        (
            [*ANALYZE, "--store", "/dev/null"],
            "the store must be a folder, and /dev/null is none: choose another --store",
        ),
        (["profile", "tiny_networks:cnn", "--batch-sizes", "4,0"], "batch sizes must be at least 1, got 4, 0"),
        (["analyze", "tiny_networks:pair", "--data", "digits", "--layers", "pair"], "gives a tuple, not a tensor"),
        (
            ["finetune", "tiny_networks:cnn", "--data", "digits", "--batch-size", "0"],
            "batch size must be an integer of at least 1",
        ),
    ],
)
def test_bad_input(qdv, tmp_path, arguments, message):
    code, out, err = qdv(*arguments, "--out", tmp_path / "out")
    assert code == 2
    assert out == ""
    assert err.startswith("qdv-gpu: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_bad_images(qdv, tmp_path):
    data = bad_folder(tmp_path)
    common = ["analyze", "resnet18", "--weights", "none", "--image-size", 32, "--layers", "layer1", "--data", data]
    common += ["--out", tmp_path / "out", "--perplexity", 5, "--iterations", 20, "--seeds", 1, "--device", "cpu"]
    code, _, err = qdv(*common)
    assert (code, err.count("\n")) == (2, 1)
    assert "bad.png cannot be read: it is empty" in err
    assert not (tmp_path / "out").exists()
    code, out, err = qdv(*common, "--skip-bad")
    assert code == 0, err
    assert "skipped 1 unreadable files" in err
    assert "layer1" in out


def test_errors_of_our_own_keep_their_traceback(qdv, monkeypatch):
    monkeypatch.setattr("qdv_gpu.doctor.diagnose", math.sqrt)  # which takes no such arguments
    with pytest.raises(TypeError):
        qdv("doctor")


def test_help_does_not_import_torch():
    code = (
        "import sys; sys.argv = ['qdv-gpu', '--help']; from qdv_gpu import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'matplotlib', 'numba'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "finetune" in done.stdout


def test_version_and_short_help(qdv):
    code, out, _ = qdv("--version")
    assert (code, out) == (0, f"qdv-gpu {qdv_gpu.__version__}\n")
    for command in ("analyze", "finetune", "deconv", "plot", "export", "layers", "profile", "store", "demo", "doctor"):
        code, out, _ = qdv(command, "-h")
        assert code == 0
        assert "--quiet" in out
    code, out, _ = qdv("analyze", "-h")
    for shown in ("(40.0)", "(1000)", "(auto)", "imagenet", "(5)"):
        assert f"default: {shown}" in out


def test_help_is_shown_as_it_is_written():
    """Lower-case words in brackets are markup to rich, which leaves them out."""
    texts = [option.help or "" for command in get_command(cli.app).commands.values() for option in command.params]
    assert len(texts) > 100
    assert [text for text in texts if render(text).plain != text] == []


def test_what_is_said(qdv, tmp_path):
    """A line a layer; with -v what it took, with -q nothing."""
    arguments = ["analyze", "tiny_networks:cnn", "--data", "digits", *QUICK, "--out"]
    _, out, err = qdv(*arguments, tmp_path / "1" / "a")
    assert err.count(": NH 0.") == 3
    assert "tsne" not in err
    _, _, err = qdv(*arguments, tmp_path / "2" / "a", "-v")
    assert err.count("tsne") == 3
    assert "cnn: 8 px, mean (0.5,)" in err
    code, again, err = qdv(*arguments, tmp_path / "3" / "a", "-q")
    assert (code, err) == (0, "")
    assert again.splitlines()[:5] == out.splitlines()[:5]


def test_every_module_is_listed(qdv):
    _, out, _ = qdv("layers", "tiny_networks:cnn", "--all")
    names = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert names == ["conv1", "relu@1", "pool@1", "conv2", "relu@2", "pool@2", "dropout", "fc"]
    _, out, _ = qdv("layers", "timm:vit_tiny_patch16_224", "--tokens", "all")
    assert "37,824" in out
    assert "[all]" in out


def test_names_as_they_are(qdv, tmp_path):
    """Classes, files and labels with signs that mean something to figures, tables and terminals."""
    names = ["a$b$", "_c<d>", "e\nf", "[red]g", os.fsdecode(b"h\xe9")]
    for name in names:
        folder = tmp_path / "data" / "test" / name
        folder.mkdir(parents=True)
        for i in range(15):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(os.fsencode(folder) + f"/{i}$".encode() + b"\xe9.png")
    arguments = ["[x]$y$=tiny_networks:cnn", "--data", tmp_path / "data", *QUICK, "--samples", "all"]
    code, out, err = qdv("analyze", *arguments, "--out", tmp_path / "o", "--format", "png,pdf,svg")
    assert code == 0, err
    assert "[x]$y$" in out
    with (tmp_path / "o" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} == {*names[:4], "h\\xe9"}
    assert rows[0]["file"].endswith("0$\\xe9.png")


def test_compare(qdv, tmp_path):
    for name in ("cnn", "other"):
        code, _, err = qdv(
            "analyze", f"tiny_networks:{name}", "--data", "digits", *QUICK, "--k", "5,1", "--out", tmp_path / name
        )
        assert code == 0, err
    code, out, err = qdv("compare", tmp_path / "cnn", tmp_path / "other", "--k", 1, "--out", tmp_path / "c")
    assert code == 0, err
    assert "This speaks of these two trained networks" in out
    assert "in the layers' own space" in out
    assert (tmp_path / "c" / "figures" / "comparison.png").is_file()
    code, out, err = qdv(
        "compare", "a=tiny_networks:wide(maps=3)", "b=tiny_networks:wide(maps=6)", "--data", "digits", *QUICK,
        "--pair", "2=2", "--runs", "tiny_networks:wide(maps=4), tiny_networks:wide(maps=7)",
        "--runs", "tiny_networks:wide[0.kernel_size=5, 0.padding=1],tiny_networks:wide(maps=8)",
        "--out", tmp_path / "d",
    )  # fmt: skip
    assert code == 0, err
    assert "networks trained as these 3 of each" in out
    for wrong, message in [
        (["--pair", "cka", "--pair", "conv2=conv2"], "--pair is position, name, cka or LAYER=LAYER"),
        (["--margin", "2"], "margin must be a difference"),
        (["--pair", "cka", "--pair", "name"], "--pair is position, name, cka or LAYER=LAYER"),
        (["--pair", "conv2=conv2", "--pair", "conv2=pool@1"], "--pair is position, name, cka or LAYER=LAYER"),
        (["--runs", "x"], "runs must be pairs"),
    ]:
        code, _, err = qdv("compare", tmp_path / "cnn", tmp_path / "other", *wrong, "--out", tmp_path / "e")
        assert code == 2
        assert message in err
