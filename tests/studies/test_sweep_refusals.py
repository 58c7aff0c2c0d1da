"""Sweeps that are refused before anything is computed."""

import re
from functools import partial

import pytest
from tiny_sweep import TABLE, TOML, changed, drawn, plain

from qdv_gpu.errors import InputError
from qdv_gpu.studies.outlook import foreseen
from qdv_gpu.studies.sweep import sweep


@pytest.mark.parametrize(
    ("table", "halve", "message"),
    [
        (plain(), "images", "cnn, 25 images: perplexity must be at least 1 and 3 * perplexity below N - 1 = 24, got 8"),
        (plain(perplexity=2, k=[15]), "images", "cnn, 25 images: k must be smaller than half the number of images"),
        (plain(analyze={"samples": 36}), "images", "cnn, 9 images: samples must be at least one per class (10), got 9"),
        (changed(run={"finetune": {"samples": 20}}), "images", ", 5 images: finetune.samples must be at least one per"),
        (plain(perplexity=40), None, "tiny_networks:cnn: perplexity must be at least 1 and 3 * perplexity below N - 1"),
    ],
)
def test_too_few_images_are_said_first(tmp_path, table, halve, message):
    for begin in (sweep, partial(foreseen, max_points=100)):
        with pytest.raises(InputError, match=re.escape(message)) as caught:
            begin(table, tmp_path / "one", halve=halve)
        assert str(caught.value).startswith("--halve: tiny_networks:cnn" if halve else "tiny_networks:cnn")
    assert not list(tmp_path.iterdir())


def test_too_few_images_of_an_earlier_call_are_said_first(tmp_path):
    table = plain(perplexity=2, analyze={"samples": 36})
    sweep(table, tmp_path / "one")
    before = (tmp_path / "one" / "sweep.json").read_bytes()
    more = plain(perplexity=2, analyze={"samples": 100})
    with pytest.raises(InputError, match="--halve: tiny_networks:cnn, 9 images: samples must be at least"):
        sweep(more, tmp_path / "one", halve="images", extend=True)
    assert (tmp_path / "one" / "sweep.json").read_bytes() == before


def test_images_without_labels_are_said_first(tmp_path):
    drawn(tmp_path / "images", 0)
    table = plain(data=str(tmp_path / "images"), analyze={"samples": "all"}, image_size=8)
    with pytest.raises(InputError, match=r"^tiny_networks:cnn: a sweep requires labels, and .*images has none"):
        sweep(table, tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_points_that_are_the_same_when_halved_are_refused(tmp_path):
    table = changed(grid={"network": ["tiny_networks:cnn"], "epochs": [4, 5], "lr": None}, run={"epochs": None})
    with pytest.raises(InputError, match=r"^--halve epochs: .*epochs=4\) and .*epochs=5\) are the same with a part of"):
        sweep(table, tmp_path / "one", halve="epochs")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ('"tiny_networks:other"', '"resnet19"', 15, "grid.network: unknown network 'resnet19': did you mean resnet18"),
        ('"tiny_networks:other"', '"alexnet[features.0.kernel=7]"', 15, "grid.network: "),
        ('data = "digits"', 'data = "digit"', 3, "run.data: "),
        ('layers = "pool"', 'layers = "pol"', 15, "grid.network: unknown layer of "),
    ],
)
def test_what_cannot_be_loaded_is_said_first(tmp_path, old, new, line, message):
    file = tmp_path / "sweep.toml"
    file.write_text(TOML.replace(old, new))
    with pytest.raises(InputError) as caught:
        sweep(file, tmp_path / "one")
    assert str(caught.value).startswith(f"{file}:{line}: {message}"), str(caught.value)
    assert not (tmp_path / "one").exists()


def test_two_places_are_refused(tmp_path):
    with pytest.raises(InputError, match="one place to compute at is required, got --workers or --gpus and --dask"):
        sweep(TABLE, tmp_path / "one", workers=2, dask="tcp://localhost:1")
    with pytest.raises(InputError, match="workers must be an integer within 1 and 1024, got 0"):
        sweep(TABLE, tmp_path / "one", workers=0)
    with pytest.raises(InputError, match="unknown option of Slurm 'tim': did you mean time"):
        sweep(TABLE, tmp_path / "one", slurm={"tim": 3})
    assert not list(tmp_path.iterdir())
