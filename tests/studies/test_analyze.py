"""The pipeline and its run folder."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import qdv_gpu
from qdv_gpu import analyze
from qdv_gpu.errors import InputError
from qdv_gpu.studies import analyze as analysis
from qdv_gpu.studies.analyze import Settings
from qdv_gpu.studies.records import Analysis

TINY = Settings(layers=("relu", "pool"), samples=100, pca=10, perplexity=8, iterations=60, seeds=2, k=(5, 3))
SPECS = ["tiny_networks:cnn", "tiny_networks:other"]


def quiet(_line):
    pass


def run(out, settings=TINY, specs=SPECS, **options):
    return analyze(specs, "digits", out, settings=settings, report=quiet, **{"device": "cpu"} | options)


def outcome(out):
    """Everything that must not depend on how often the run was killed."""
    with (out / "layers.csv").open() as file:
        rows = [{**row, "seconds": ""} for row in csv.DictReader(file)]
    return rows, {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.npz"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("analysis") / "run"
    return run(out)


def test_run_folder(finished):
    out = finished.out
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    layers = [f"embeddings/{n}/{layer}.{e}" for n in ("cnn", "other") for layer in LAYERS for e in ("json", "npz")]
    assert files == sorted(
        [
            "run.json",
            "layers.csv",
            "table3.md",
            "table3.csv",
            "timings.json",
            "figures/maps.png",
            "figures/nh.png",
            *layers,
        ]
    )
    with (out / "layers.csv").open() as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    header = "network,layer,features,samples,perplexity,seed,k,nh,nh_feature_space,chance,tied,trustworthiness"
    assert ",".join(reader.fieldnames or ()) == header + ",continuity,kl,seconds"
    assert len(rows) == 2 * len(LAYERS) * 2 * 2
    arrays = np.load(out / "embeddings" / "cnn" / "pool@1.npz")
    assert arrays["Z"].shape == (2, 100, 2)
    assert arrays["Z"].dtype == np.float32
    settings = json.loads((out / "run.json").read_text())
    assert settings["inputs"]["perplexity"] == 8
    assert settings["versions"]["torch"] == torch.__version__


LAYERS = ["relu@1", "relu@2", "pool@1", "pool@2"]


def test_table(finished):
    header, *rows = finished.table(5)
    assert header == ["layer", "cnn", "other", "chance"]
    assert [row[0] for row in rows] == LAYERS
    text = (finished.out / "table3.md").read_text()
    assert text.startswith("| layer | cnn | other | chance |\n| --- |")
    assert "k = 3" in text
    score = next(s for s in finished.scores if s["network"] == "cnn" and s["k"] == 5)
    assert rows[0][1] == f"{score['nh']:.3f} ± {score['standard_error']:.3f}"
    assert 0.09 < score["chance"] < 0.1


def test_scores_agree_with_scikit_learn(finished):
    from sklearn.neighbors import NearestNeighbors

    arrays = np.load(finished.out / "embeddings" / "other" / "relu@2.npz")
    with (finished.out / "layers.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if (r["network"], r["layer"], r["k"]) == ("other", "relu@2", "3")]
    for seed, row in enumerate(rows):
        neighbours = NearestNeighbors(n_neighbors=3).fit(arrays["Z"][seed]).kneighbors(return_distance=False)
        nh = (arrays["labels"][neighbours] == arrays["labels"][:, None]).mean()
        assert float(row["nh"]) == pytest.approx(nh, abs=1e-12)


def test_a_finished_run_is_not_computed_again(finished, monkeypatch):
    before = outcome(finished.out)
    monkeypatch.setattr(analysis, "hold", None)
    again = run(finished.out)
    assert again.scores == finished.scores
    assert outcome(finished.out) == before


def test_layers_that_do_not_fit_are_recomputed_to_the_same_bits(finished, tmp_path, monkeypatch):
    def recompute(tasks, **options):
        return [
            replace(chosen, passes=[], recomputed=[name for held in chosen.passes for name in held])
            for chosen in plan(tasks, **options)
        ]

    plan = analysis.plan
    monkeypatch.setattr(analysis, "plan", recompute)
    monkeypatch.setattr(analysis, "hold", None)
    run(tmp_path)
    assert outcome(tmp_path) == outcome(finished.out)


def test_networks_of_one_name_are_numbered(tmp_path):
    result = run(tmp_path, specs=["tiny_networks:cnn", "tiny_networks:cnn"])
    assert {score["network"] for score in result.scores} == {"cnn-1", "cnn-2"}
    assert outcome(tmp_path)[1]["embeddings/cnn-1/pool@1.npz"] == outcome(tmp_path)[1]["embeddings/cnn-2/pool@1.npz"]


def test_layers_of_some_networks_only(tmp_path):
    settings = Settings(layers=("pool", "pair"), samples=60, pca=5, perplexity=5, iterations=20, seeds=1)
    with pytest.raises(InputError, match="unknown layer of cnn 'poor': did you mean pool"):
        run(tmp_path, replace(settings, layers=("pool", "poor")), ["tiny_networks:cnn", "tiny_networks:pair"])
    settings = replace(settings, layers=("pool", "conv2"))
    result = run(tmp_path, settings, ["tiny_networks:pair", "tiny_networks:cnn"])
    assert [(s["network"], s["layer"]) for s in result.scores] == [
        ("pair", "conv2"),
        ("cnn", "pool@1"),
        ("cnn", "pool@2"),
        ("cnn", "conv2"),
    ]


def test_loaded_networks_and_single_ones(tmp_path):
    network = qdv_gpu.load_network("tiny_networks:cnn")
    settings = Settings(samples=60, pca=5, perplexity=5, iterations=20, seeds=1, k=3)
    result = analyze(network, "digits", tmp_path, settings=settings, report=quiet, device="cpu")
    assert {score["k"] for score in result.scores} == {3}


def test_layers_that_differ_in_name_are_paired_by_position():
    score = {"k": 5, "standard_error": 0.01, "chance": 0.1}
    scores = [
        {**score, "position": 1, "network": "a", "layer": "conv3", "nh": 0.3},
        {**score, "position": 1, "network": "b", "layer": "maxpool3", "nh": 0.4},
        {**score, "position": 2, "network": "b", "layer": "maxpool4", "nh": 0.5},
    ]
    assert Analysis(Path(), scores).table(5) == [
        ["layer", "a", "b", "chance"],
        ["1", "conv3 0.300 ± 0.010", "maxpool3 0.400 ± 0.010", "0.100"],
        ["2", "", "maxpool4 0.500 ± 0.010", "0.100"],
    ]


def test_without_pca_and_other_normalisations(tmp_path):
    for normalise in ("l2", "standard", "none"):
        settings = Settings(
            layers=("relu", "pool"), samples=60, pca=0, normalise=normalise, perplexity=8, iterations=20, seeds=1
        )
        result = run(tmp_path / normalise, settings, ["tiny_networks:cnn"])
        assert len(result.scores) == len(LAYERS)


def test_bad_settings_write_nothing(tmp_path):
    for wrong, message in [
        ({"perplexity": 33}, "3 [*] perplexity below N - 1 = 99, got 33"),
        ({"perplexity": float("nan")}, "perplexity"),
        ({"k": (50,)}, "k must be smaller than half the number of images"),
        ({"k": (5, 5)}, "different positive numbers"),
        ({"samples": 10}, "at least 2 are required|perplexity"),
        ({"samples": 2000}, "fewer than the"),
        ({"normalise": "max"}, "unknown normalisation 'max': did you mean minmax"),
        ({"engine": "exat"}, "unknown t-SNE engine 'exat': did you mean exact"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"layers": ("pol",)}, "unknown layer of cnn 'pol': did you mean pool"),
    ]:
        with pytest.raises(InputError, match=message):
            run(tmp_path / "out", replace(TINY, **wrong))
        assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else(finished, tmp_path):
    with pytest.raises(InputError, match=r"holds a run with another perplexity \(8, not 9\): choose another --out"):
        run(finished.out, replace(TINY, perplexity=9))
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"is not empty and holds no run.json"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_infinite_activations_name_their_layer(tmp_path):
    settings = Settings(samples=100, layers=("conv1", "stage"), perplexity=8, iterations=20, seeds=1)
    with pytest.raises(InputError, match="poisoned stage: activations must be finite"):
        run(tmp_path / "out", settings, ["tiny_networks:poisoned"])
    with pytest.raises(InputError, match="pair gives a tuple"):
        run(tmp_path / "new", replace(settings, layers=("conv1", "pair")), ["tiny_networks:cnn", "tiny_networks:pair"])
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="cnn cannot take images of 2 x 2 pixels"):
        run(tmp_path / "new", replace(TINY, image_size=2))
    assert not (tmp_path / "new").exists()


def test_full_disk(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"disk full while writing .*run\.json"):
        run(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_runs_end_as_if_they_had_not_been(finished, tmp_path, kills):
    """SIGKILL after ever later progress; the last run is left alone."""
    code = (
        "from test_analyze import SPECS, TINY, analyze\n"
        f"analyze(SPECS, 'digits', {str(tmp_path / 'run')!r}, settings=TINY, device='cpu')"
    )
    command = [sys.executable, "-u", "-c", code]
    here = Path(__file__).parent
    path = {**os.environ, "PYTHONPATH": str(here.parent)}
    for number in range(kills):
        process = subprocess.Popen(command, cwd=here, env=path, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()  # it has begun to say something: a layer is done, or was done before
        time.sleep(0.07 * number)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    subprocess.run(command, cwd=here, env=path, check=True, stdout=subprocess.DEVNULL)
    assert outcome(tmp_path / "run") == outcome(finished.out)
    assert not list((tmp_path / "run").rglob(".*"))


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [None, 1_100_000_000])
def test_a_gpu_gives_the_scores_of_the_cpu(finished, tmp_path, memory):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    result = run(tmp_path / "run", replace(TINY, memory=memory), device="cuda")
    for ours, theirs in zip(result.scores, finished.scores, strict=True):
        assert ours["nh_feature_space"] == pytest.approx(theirs["nh_feature_space"], abs=0.01)
        assert ours["nh"] == pytest.approx(theirs["nh"], abs=0.1)  # of other maps
    if memory is not None:
        assert torch.cuda.max_memory_reserved() <= memory
