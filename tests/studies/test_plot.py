"""Figures drawn again from a run's folder, and what a folder must hold for that."""

import shutil

import numpy as np
import pytest
import torch
from made_run import made_run

from qdv_gpu import analyze
from qdv_gpu.errors import InputError
from qdv_gpu.report import figures
from qdv_gpu.studies import plot as study
from qdv_gpu.studies.plot import KEPT, plot

QUICK = {"samples": 60, "pca": 5, "perplexity": 5, "iterations": 20, "seeds": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return analyze(["tiny_networks:cnn", "tiny_networks:other"], "digits", out, k=(5, 3), **QUICK)


@pytest.fixture
def drawn(monkeypatch):
    """The records that figures are drawn of."""
    seen = []
    for name in ("maps_figure", "nh_figure"):
        real = getattr(figures, name)
        monkeypatch.setattr(
            figures, name, lambda records, *rest, real=real: seen.append(records) or real(records, *rest)
        )
    return seen


def test_the_same_figures_from_the_folder(run, tmp_path):
    for path in plot(run.out, tmp_path):
        assert path.read_bytes() == (run.out / "figures" / path.name).read_bytes()


def test_scores_of_every_k_are_those_of_the_analysis(run, tmp_path, drawn):
    for k in (5, 3):
        plot(run.out, tmp_path, k=k)
        for found, layer in zip(drawn[-1], run.layers, strict=True):
            expected, got = layer.of(k), found.of(k)
            assert (found.network, found.layer, found.position) == (layer.network, layer.layer, layer.position)
            assert (got.nh, got.standard_error, got.chance) == pytest.approx(
                (expected.nh, expected.standard_error, expected.chance), abs=1e-12
            )
            assert [getattr(got, name) for name in KEPT] == [getattr(expected, name) for name in KEPT]
            assert torch.equal(found.scores[0].influence, next(s for s in layer.scores if s.k == k).influence)
    plot(run.out, tmp_path, k=1)
    assert np.isnan([getattr(drawn[-1][0].of(1), name) for name in KEPT]).all()


def test_a_score_that_an_older_version_did_not_compute_is_unknown(tmp_path, drawn):
    plot(made_run(tmp_path / "run", older=True), tmp_path)
    found = drawn[-1][0].of(5)
    assert found.trustworthiness == 0.9
    assert np.isnan(found.continuity)


def test_some_networks_layers_maps_and_formats(run, tmp_path, drawn):
    layer = run.layers[0].layer
    paths = plot(run.out, tmp_path, networks=["other"], layers=[layer], seed=1, formats="pdf,svg")
    assert [path.name for path in paths] == ["maps.pdf", "maps.svg", "nh.pdf", "nh.svg"]
    assert all(path.stat().st_size > 1000 for path in paths)
    (record,) = drawn[-1]
    assert (record.network, record.layer) == ("other", layer)
    assert np.array_equal(record.Z[0], run.layer("other", layer).Z[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": ["cn"]}, "unknown network of the run 'cn': did you mean cnn"),
        ({"layers": ["nothing"]}, "unknown layer of the run"),
        ({"seed": 2}, "seed must be within 0 and 1"),
        ({"formats": "gif"}, "unknown figure format 'gif'"),
        ({"k": 60}, "k must"),
        ({"k": 0}, "k must"),
    ],
)
def test_bad_options(run, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        plot(run.out, tmp_path, **options)


def test_folders_that_are_no_finished_run(run, tmp_path):
    with pytest.raises(InputError, match="holds no finished run"):
        plot(tmp_path)
    for number, (file, contents) in enumerate(
        [("table3.csv", b"\xff\xfe"), ("table3.csv", b"a,b\n1,2\n"), ("run.json", b"[]"), ("run.json", b"{"),
         ("embeddings/cnn/conv2.npz", b"PK"), ("embeddings/cnn/conv2.npz", b"")],
    ):  # fmt: skip
        copy = tmp_path / str(number)
        shutil.copytree(run.out, copy)
        (copy / file).write_bytes(contents)
        with pytest.raises(InputError, match=r"damaged|not of qdv-gpu analyze|not valid JSON"):
            plot(copy)


def test_unlabelled_images_have_maps_and_no_hits(tmp_path, monkeypatch):
    said, real = [], figures.plot_maps
    monkeypatch.setattr(figures, "plot_maps", lambda *own, **kw: said.append(kw["subtitles"]) or real(*own, **kw))
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options = {**QUICK, "samples": "all"}
    result = analyze("tiny_networks:cnn", images, tmp_path / "run", **options)
    assert [path.name for path in result.figures] == ["maps.png"]
    layer = result.layers[0]
    assert not layer.labelled
    assert np.isnan(layer.of(5).nh)
    assert 0 < layer.of(5).trustworthiness <= 1
    assert (tmp_path / "run" / "predictions.csv").read_text().splitlines()[:2] == ["file", "0"]
    assert "Trustworthiness (k = 5) of images without labels" in (tmp_path / "run" / "table3.md").read_text()
    assert ",,,," in (tmp_path / "run" / "layers.csv").read_text().splitlines()[1]
    assert [path.name for path in plot(tmp_path / "run", tmp_path / "again")] == ["maps.png"]
    plot(tmp_path / "run", tmp_path / "again", k=3)
    assert said[0] == said[1] == [f"trustworthiness {one.of(5).trustworthiness:.3f}" for one in result.layers]
    assert not any(said[2])
    assert study.plot is plot
    labelled = analyze("tiny_networks:cnn", (images, torch.arange(40) % 2), tmp_path / "run", **options)
    assert np.array_equal(labelled.layers[0].Z, layer.Z)
