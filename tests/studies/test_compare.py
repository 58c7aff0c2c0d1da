"""Comparisons of networks and of run folders; what cannot be compared is refused, naming the first that differs."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import tiny_networks
import torch
from torch.utils.data import DataLoader, TensorDataset

from qdv_gpu import Images, analyze, compare
from qdv_gpu.errors import InputError
from qdv_gpu.report.contrast import summary
from qdv_gpu.results.run import read_run
from qdv_gpu.sealed import read_sealed, write_sealed

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
        "report.html",
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
    assert [(p.first.layer, p.second.layer) for p in by_name.pairs] == [(x, x) for x in ("pool@1", "conv2", "pool@2")]
    said = compare(runs / "a", runs / "b", out=tmp_path / "m", pair={"conv2": "pool@2"})
    assert [(p.first.layer, p.second.layer) for p in said.pairs] == [("conv2", "pool@2")]
    alike = compare(runs / "a", runs / "b", out=tmp_path / "k", pair="cka")
    assert len(alike.pairs) == 3
    for pair, message in (({"conv2": "x"}, "unknown layer of other 'x'"), ("size", "unknown pairing of layers 'size'")):
        with pytest.raises(InputError, match=message):
            compare(runs / "a", runs / "b", out=tmp_path / "w", pair=pair)


def test_runs_of_each(runs, tmp_path):
    for name, make in (("a", tiny_networks.cnn), ("b", tiny_networks.other)):
        for seed in (2, 3):
            network = make()
            torch.manual_seed(seed)
            network.conv1.reset_parameters()
            network.conv2.reset_parameters()
            analyze({{"a": "cnn", "b": "other"}[name]: network}, "digits", tmp_path / f"{name}{seed}", **QUICK)
    first = (runs / "a", runs / "b")
    second, third = ((tmp_path / f"a{seed}", tmp_path / f"b{seed}") for seed in (2, 3))
    two = compare(*first, out=tmp_path / "2", runs=[second])
    assert np.isnan(two.pairs[0].in_maps.low)
    assert "Two runs give no interval" in summary(two)
    assert "confidence" not in (tmp_path / "2" / "comparison.md").read_text()
    three = compare(*first, out=tmp_path / "3", runs=[second, third])
    assert three.runs == 3
    assert "networks trained as these 3 of each" in summary(three)
    with (tmp_path / "3" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    tables = []
    for folder in (*first, *second, *third):
        with (folder / "table3.csv").open() as file:
            tables.append([float(row["nh"]) for row in csv.DictReader(file) if row["k"] == "5"])
    for number, row in enumerate(rows):  # of all runs, so that it is theirs less A's
        nh = [np.mean([table[number] for table in tables[side::2]]) for side in (0, 1)]
        np.testing.assert_allclose([float(row["nh_first"]), float(row["nh_second"])], nh, atol=1e-6)
        assert abs(float(row["nh_second"]) - float(row["nh_first"]) - float(row["delta"])) < 1e-6
    for wrong, message in (
        ([(runs / "a",)], "runs must be pairs"),
        (None, "runs must be a list of pairs of a run of A and a run of B, got None"),
        ([second, first], "two of the runs of cnn are the same: --runs is for other seeds of training"),
        ([second[::-1]], "b2 is of other and stands among the runs of cnn: --runs takes A2,B2"),
    ):
        with pytest.raises(InputError, match=message):
            compare(*first, out=tmp_path / "w", runs=wrong)
    small = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.MaxPool2d(2))
    with pytest.raises(InputError, match="the runs of cnn must have the same layers, got pool@1, conv2, pool@2 and 0"):
        compare(A, B, "digits", tmp_path / "w", runs=[(small, B)], **QUICK)


def test_k_in_another_order_and_folders_of_one_name(runs, tmp_path):
    analyze(B, "digits", tmp_path / "a", store=runs / ".qdv-store", k=(1, 5), **QUICK)
    found = compare(runs / "a", tmp_path / "a", out=tmp_path / "c")
    assert (found.k, found.second) == (5, "other")
    assert compare(tmp_path / "a", runs / "a", out=tmp_path / "c").k == 1
    shutil.copytree(runs / "a", tmp_path / "copy" / "a")
    same = compare(runs / "a", tmp_path / "copy" / "a", out=tmp_path / "d")
    assert (same.first, same.second) == (f"cnn ({runs / 'a'})", f"cnn ({tmp_path / 'copy' / 'a'})")
    itself = compare(runs / "a", runs / "a", out=tmp_path / "d")
    assert (itself.first, itself.second) == ("cnn (A)", "cnn (B)")
    assert {pair.in_layer.verdict for pair in itself.pairs} == {"equivalent"}
    assert len(itself.changed()) == 0


def test_pairs_in_any_order(runs, tmp_path):
    layers = ("pool@1", "conv2", "pool@2")
    sorted_ = compare(runs / "a", runs / "b", out=tmp_path / "s", pair={name: name for name in reversed(layers)})
    assert [pair.first.layer for pair in sorted_.pairs] == list(layers)
    crossed = compare(runs / "a", runs / "b", out=tmp_path / "x", pair={"pool@2": "conv2", "conv2": "pool@2"})
    assert crossed.ahead_from() is crossed.ahead_from(sign=-1) is None
    said = json.loads((tmp_path / "x" / "comparison.json").read_text())
    assert said["layers"] == [list(layers)] * 2
    assert np.shape(said["cka"]) == (3, 3)


def test_pictures_of_an_earlier_comparison_do_not_stay(runs, tmp_path):
    compare(runs / "a", runs / "b", out=tmp_path / "c", formats=("png", "svg"))
    assert len(list((tmp_path / "c" / "figures").iterdir())) == 4
    compare(runs / "a", runs / "a", out=tmp_path / "c")  # of which no image's hits differ
    assert [path.name for path in (tmp_path / "c" / "figures").iterdir()] == ["comparison.png"]


def test_a_later_run_removes_the_comparison(tmp_path):
    a, b, c, d = (tiny_networks.seeded(seed) for seed in range(4))
    compare(a, b, "digits", tmp_path / "c", runs=[(c, d)], layers="conv2", **QUICK)
    own = ["comparison.json", "comparison.csv", "comparison.md", "figures/comparison.png", "figures/changed.png"]
    assert all((tmp_path / "c" / name).is_file() for name in own)
    analyze(a, "digits", tmp_path / "c", layers="conv2", **QUICK)
    assert not any((tmp_path / "c" / name).exists() for name in own)
    assert "less that of" not in (tmp_path / "c" / "report.html").read_text()


@pytest.mark.parametrize(
    "options",
    [{"margin": "0.02"}, {"margin": None}, {"pair": {1: 2}}, {"pair": {}}, {"pair": None}, {"formats": 5},
     {"store": 5}, {"perplexity": 9}, {"data": "digits"}, {"seedz": 1}],
)  # fmt: skip
def test_wrong_types_and_what_does_not_belong_are_one_line(runs, tmp_path, options):
    with pytest.raises(InputError) as caught:
        compare(runs / "a", runs / "b", **{"out": tmp_path / "c", **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_images_that_are_others_by_now_are_not_drawn(runs, tmp_path, lines):
    for name in "ab":
        shutil.copytree(runs / name, tmp_path / name)
        said = read_sealed(tmp_path / name / "run.json")
        write_sealed(tmp_path / name / "run.json", said | {"images": said["images"] | {"contents": "0" * 64}})
    compare(tmp_path / "a", tmp_path / "b", out=tmp_path / "c", store=runs / ".qdv-store")
    assert not (tmp_path / "c" / "figures" / "changed.png").exists()
    assert any("not drawn: the images of digits are not those of the run" in line for line in lines())


def test_damaged_run_folders(runs, tmp_path):
    def broken(name, **changes):
        shutil.copytree(runs / "a", tmp_path / name)
        write_sealed(tmp_path / name / "run.json", read_sealed(tmp_path / name / "run.json") | changes)
        return tmp_path / name

    rows = (runs / "a" / "predictions.csv").read_text().splitlines()
    folders = [broken(name) for name in "uvwx"]
    (folders[0] / "predictions.csv").unlink()
    (folders[1] / "predictions.csv").write_bytes(b"\xff\xfe")
    (folders[2] / "predictions.csv").write_text("\n".join(rows[:50]))
    (folders[3] / "predictions.csv").write_text("")
    wrong = [{"outputs": {}}, {"outputs": []}, {"outputs": {"cnn": []}}, {"store": None}, {"images": {}}]
    for folder in (*folders, *(broken(f"j{number}", **changes) for number, changes in enumerate(wrong))):
        with pytest.raises(InputError, match=r"is damaged \(.*\): run its command again"):
            compare(folder, runs / "b", out=tmp_path / "c")
    (folders[0] / "layers.csv").unlink()  # as long as it runs
    with pytest.raises(InputError, match=r"run folders alone, and .*u is no finished run"):
        compare(folders[0], runs / "b", "digits", out=tmp_path / "c")


def test_what_cannot_be_compared(runs, tmp_path):
    def refused(message, *sides, **options):
        with pytest.raises(InputError, match=message) as caught:
            compare(*sides, **{"out": tmp_path / "w", **options})
        assert "\n" not in str(caught.value)

    refused("has scores for k = 5, 1, not 3: run its command with --k 5,1,3", runs / "a", runs / "b", k=3)
    refused("run folders alone, and tiny_networks:other is no finished run", runs / "a", B)
    refused("data is required to compare networks, and tiny_networks:cnn is no finished run: pass --data", A, B)
    refused("and Tiny is no finished run", tiny_networks.cnn(), B)
    refused("margin must be", runs / "a", runs / "b", margin=-1)
    analyze(B, "digits", tmp_path / "few", **{**QUICK, "samples": 90})
    other = tmp_path / "classes"
    shutil.copytree(runs / "b", other)
    about = read_sealed(other / "run.json")
    write_sealed(other / "run.json", about | {"classes": [*about["classes"], "ten"]})
    refused("of other classes: class 10 is missing in one and ten in the other", runs / "a", other)
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
    about = read_sealed(tmp_path / "old" / "run.json")
    about["outputs"]["cnn"][0]["scores"]["5"] = "0" * 64
    write_sealed(tmp_path / "old" / "run.json", about)
    refused("run its command again, or name its --store", tmp_path / "old", runs / "b")
    del about["outputs"]
    write_sealed(tmp_path / "old" / "run.json", about)
    refused("or one of an older version", tmp_path / "old", runs / "b")


def test_runs_of_another_version_are_refused_and_kept(runs, tmp_path, monkeypatch):
    def other(*_, **__):
        raise ValueError("it does not say all scores")

    before = sorted((runs / ".qdv-store" / "scores").iterdir())
    monkeypatch.setitem(read_run.__globals__["VERSIONS"], "scores", 99)
    monkeypatch.setitem(read_run.__globals__, "check_scores", other)
    with pytest.raises(InputError, match="was made by another version of qdv_gpu"):
        compare(runs / "a", runs / "b", out=tmp_path / "c")
    assert sorted((runs / ".qdv-store" / "scores").iterdir()) == before


def test_one_class_is_refused_before_anything_is_computed(tmp_path):
    images = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    for labels, message in ((torch.zeros(40), "at least two classes are required, all 40 images are of '0'"),
                            (torch.arange(40) == 0, "class '1' has 1 image: at least 2 are required")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            compare(A, B, (images, labels.long()), tmp_path / "c", **{**QUICK, "samples": "all"})
        assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pair": {"conv2": "convx"}}, "unknown layer of other 'convx'"), ({"data": "unlabelled"}, "requires labels")],
)
def test_what_cannot_be_compared_is_refused_before_it_is_computed(options, message, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it was computed")

    monkeypatch.setattr("qdv_gpu.studies.compare.analysing", never)
    if options.pop("data", None):
        options["data"] = Images.from_arrays(torch.zeros(40, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(InputError, match=message):
        compare("tiny_networks:cnn", "tiny_networks:other", **{"data": "digits", "out": tmp_path / "o", **options})
    assert not (tmp_path / "o").exists()


def test_arrays_without_labels_are_refused_before_anything_is_computed(tmp_path):
    pixels = torch.rand(40, 1, 8, 8)
    for data in (pixels, (pixels,), DataLoader(TensorDataset(pixels))):
        with pytest.raises(InputError, match=r"a comparison requires labels, and .* has none: give \(images, labels\)"):
            compare(A, B, data, tmp_path / "c", **QUICK)
    assert not list(tmp_path.iterdir())
