"""Comparisons of networks and of run folders; what cannot be compared is refused, naming the first that differs."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch

from qdv_gpu import analyze, compare
from qdv_gpu.errors import InputError
from qdv_gpu.report.contrast import summary
from qdv_gpu.results.run import read_run

QUICK = {"samples": 100, "pca": 5, "perplexity": 8, "iterations": 40, "seeds": 3, "device": "cpu"}
A, B = "tiny_networks:cnn", "tiny_networks:other"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    for name, spec in (("a", A), ("b", B)):
        analyze(spec, "digits", top / name, k=(5, 1), **QUICK)
    return top


def test_networks_and_run_folders_give_the_same(runs, tmp_path):
    from_runs = compare(runs / "a", runs / "b", out=tmp_path / "c")
    from_networks = compare(A, B, "digits", tmp_path / "n", store=runs / ".qdv-store", k=(5, 1), **QUICK)
    analysed = analyze([A, B], "digits", tmp_path / "both", store=runs / ".qdv-store", k=(5, 1), **QUICK)
    texts = [(tmp_path / name / "comparison.json").read_text() for name in ("c", "n", "both")]
    assert texts[0] == texts[1] == texts[2]
    assert summary(from_runs) == summary(from_networks) == summary(analysed.comparison)
    assert {path.name for path in (tmp_path / "c").rglob("*") if path.is_file()} == {
        "comparison.json", "comparison.csv", "comparison.md", "comparison.png", "changed.png",
    }  # fmt: skip
    assert (tmp_path / "both" / "figures" / "comparison.png").is_file()


def test_every_word_of_the_summary_is_in_the_numbers(runs, tmp_path):
    found = compare(runs / "a", runs / "b", out=tmp_path / "c", k=1)
    said = json.loads((tmp_path / "c" / "comparison.json").read_text())
    with (tmp_path / "c" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert said["k"] == 1
    assert [row["verdict"] for row in rows] == [pair["in_maps"]["verdict"] for pair in said["pairs"]]
    text = summary(found)
    for pair in said["pairs"]:
        verdict, name = pair["in_maps"]["verdict"], pair["first"]
        assert re.search(rf"\b{re.escape(name)}\b", text)
        if verdict in ("ahead", "behind"):
            assert f"{name} (by {abs(pair['in_maps']['delta']):.3f}" in text
    assert "these two trained networks, on images like these 100" in text


def test_pairing(runs, tmp_path):
    by_name = compare(runs / "a", runs / "b", out=tmp_path / "n", pair="name")
    assert [(p.first.layer, p.second.layer) for p in by_name.pairs] == [(x, x) for x in ("conv2", "pool@1", "pool@2")]
    said = compare(runs / "a", runs / "b", out=tmp_path / "m", pair={"conv2": "pool@2"})
    assert [(p.first.layer, p.second.layer) for p in said.pairs] == [("conv2", "pool@2")]
    alike = compare(runs / "a", runs / "b", out=tmp_path / "k", pair="cka")
    assert len(alike.pairs) == 3
    for pair, message in (({"conv2": "x"}, "unknown layer of other 'x'"), ("size", "unknown pairing of layers 'size'")):
        with pytest.raises(InputError, match=message):
            compare(runs / "a", runs / "b", out=tmp_path / "w", pair=pair)


def test_runs_of_each(runs, tmp_path):
    pairs = [(runs / "a", runs / "b")]
    two = compare(runs / "a", runs / "b", out=tmp_path / "2", runs=pairs)
    assert np.isnan(two.pairs[0].in_maps.low)
    assert "Two runs give no interval" in summary(two)
    three = compare(runs / "a", runs / "b", out=tmp_path / "3", runs=pairs * 2)
    assert three.runs == 3
    assert "networks trained as these 3 of each" in summary(three)
    with pytest.raises(InputError, match="runs must be pairs"):
        compare(runs / "a", runs / "b", out=tmp_path / "w", runs=[(runs / "a",)])


def test_what_cannot_be_compared(runs, tmp_path):
    def refused(message, *sides, **options):
        with pytest.raises(InputError, match=message) as caught:
            compare(*sides, **{"out": tmp_path / "w", **options})
        assert "\n" not in str(caught.value)

    refused("has scores for k = 5, 1, not 3: run its command with --k 5,1,3", runs / "a", runs / "b", k=3)
    refused("a run folder and a network were given", runs / "a", B)
    refused("data is required", A, B)
    refused("margin must be", runs / "a", runs / "b", margin=-1)
    analyze(B, "digits", tmp_path / "few", **{**QUICK, "samples": 90})
    refused("other images: image 9 is", runs / "a", tmp_path / "few")
    analyze(B, "digits", tmp_path / "perplexity", **{**QUICK, "perplexity": 9})
    refused("were made with perplexity 8 and 9", runs / "a", tmp_path / "perplexity")
    pixels = torch.randint(0, 256, (100, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(100) % 10
    options = {**QUICK, "samples": "all"}
    for name, images in (("x", (pixels, labels)), ("y", (pixels, labels.flip(0))), ("z", (255 - pixels, labels))):
        analyze(A, images, tmp_path / name, **options)
    refused("other labels: 0 is 0 in one and 9 in the other", tmp_path / "x", tmp_path / "y")
    refused("the same names with other contents", tmp_path / "x", tmp_path / "z")
    analyze(A, pixels, tmp_path / "unlabelled", **options)
    refused("images without labels", tmp_path / "x", tmp_path / "unlabelled")
    analyze([A, B], "digits", tmp_path / "both", **QUICK)
    refused("is of 2 networks: a run folder of one", tmp_path / "both", runs / "b")
    refused("holds no comparison.json: choose another", runs / "a", runs / "b", out=tmp_path)
    shutil.copytree(runs / "a", tmp_path / "old")
    about = json.loads((tmp_path / "old" / "run.json").read_text())
    about["outputs"]["cnn"][0]["scores"]["5"] = "0" * 64
    (tmp_path / "old" / "run.json").write_text(json.dumps(about))
    refused("run its command again, or name its --store", tmp_path / "old", runs / "b")
    del about["outputs"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(about))
    refused("or one of an older version", tmp_path / "old", runs / "b")


def test_runs_of_another_version(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(read_run.__globals__["VERSIONS"], "scores", 99)
    with pytest.raises(InputError, match="was made by another version of qdv_gpu"):
        compare(runs / "a", runs / "b", out=tmp_path / "c")
