"""The pipeline: what it computes, what it finds in the store, and the run folder."""

import csv
import json
import os
import random
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import tiny_networks
import torch
from tiny_analysis import LAYERS, SPECS, TINY, outcome, run

from qdv_gpu import Settings, analyze, load_images, load_network
from qdv_gpu.data.images import Images
from qdv_gpu.errors import InputError
from qdv_gpu.features import forward
from qdv_gpu.report.tables import nh_table
from qdv_gpu.results.stages import VERSIONS
from qdv_gpu.results.store import Store
from qdv_gpu.results.view import view_run
from qdv_gpu.studies import analyze as study
from qdv_gpu.studies import compute
from qdv_gpu.tsne.estimator import warn_if_short


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("analysis") / "run")


@pytest.fixture
def counted(monkeypatch):
    """Counts forward passes over the images, blank ones aside, and maps."""
    counts = {"passes": 0, "maps": 0}
    batches, fit = forward.ForwardPass.batches, compute.tsne_of

    def passes(self, store):
        counts["passes"] += 1
        return batches(self, store)

    def maps(settings, device):
        model = fit(settings, device)
        transform = model.fit_transform

        def fit_transform(X, *, seeds, perplexities):
            counts["maps"] += len(seeds) * len(perplexities)
            return transform(X, seeds=seeds, perplexities=perplexities)

        model.fit_transform = fit_transform
        return model

    monkeypatch.setattr(forward.ForwardPass, "batches", passes)
    monkeypatch.setattr(compute, "tsne_of", maps)
    return counts


def test_run_folder(finished):
    out = finished.out
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    tables = ["layers.csv", "table3.md", "table3.csv", "predictions.csv", "predictions.parquet", "timings.json"]
    maps = [f"embeddings/{network}/{layer}.npz" for network in ("cnn", "other") for layer in LAYERS]
    compared = ["comparison.json", "comparison.csv", "comparison.md", "figures/comparison.png"]
    page = ["report.html", "thumbnails/000.webp"]
    made = [*tables, "figures/maps.png", "figures/nh.png", *compared, *maps, *page]
    assert files == sorted([*made, "run.json"])
    with (out / "layers.csv").open() as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    header = "network,layer,features,samples,perplexity,seed,k,nh,nh_feature_space,chance,tied,trustworthiness"
    assert (VERSIONS["scores"], ",".join(reader.fieldnames or ())) == (4, header + ",continuity,kl,seconds"), (
        'the columns are public, and scores are kept: if they change, raise VERSIONS["scores"] in '
        "qdv_gpu/results/stages.py, or what a store holds is called damaged; then write both here"
    )
    assert len(rows) == 2 * len(LAYERS) * 2 * 2
    arrays = np.load(out / "embeddings" / "cnn" / "pool@1.npz")
    assert arrays["Z"].shape == (2, 100, 2)
    assert arrays["Z"].dtype == np.float32
    about = json.loads((out / "run.json").read_text())
    assert about["settings"]["perplexity"] == 8
    assert about["versions"]["torch"] == torch.__version__
    assert sorted(about["files"]) == sorted(made)
    store = Store(out.parent / ".qdv-store")
    assert set(about["stages"]) == {entry.digest for entry in store.entries()}
    assert not store.unreferenced()


def test_table(finished):
    header, *rows = nh_table(finished.layers, 5)
    assert header == ["layer", "cnn", "other", "chance"]
    assert [row[0] for row in rows] == LAYERS
    text = (finished.out / "table3.md").read_text()
    assert text.startswith("| layer | cnn | other | chance |\n| --- |")
    assert "k = 3" in text
    score = finished.layer("cnn", "relu@1").of(5)
    assert rows[0][1] == f"{score.nh:.3f} ± {score.standard_error:.3f}"
    assert 0.09 < score.chance < 0.1


def test_predictions_are_those_of_the_network(finished):
    from qdv_gpu import load_images
    from qdv_gpu.features.forward import network_input

    images = load_images("digits", samples=100)
    network = load_network(SPECS[0], device="cpu")
    with torch.inference_mode():
        logits = network.module(network_input(network, images.pixels))
    with (finished.out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["cnn prediction"]) for row in rows] == logits.argmax(1).tolist()
    found = torch.tensor([float(row["cnn probability"]) for row in rows])
    torch.testing.assert_close(found, logits.softmax(1).amax(1), rtol=1e-4, atol=1e-4)
    assert [int(row["label"]) for row in rows] == images.labels.tolist()
    hits = np.mean([float(row["other pool@2"]) for row in rows])
    assert hits == pytest.approx(finished.layer("other", "pool@2").of(5).nh, abs=1e-5)


def test_accuracy_is_said(tmp_path, caplog):
    with caplog.at_level("INFO"):
        found = run(tmp_path / "run", replace(TINY, iterations=10, seeds=1), SPECS[:1])
    with (found.out / "predictions.csv").open() as file:
        right = sum(row["label"] == row["cnn prediction"] for row in csv.DictReader(file))
    assert f"cnn: accuracy {right:.1f}% on these 100 images" in caplog.text
    assert f"<td><span>{right:.1f} %<" in (found.out / "report.html").read_text()


def test_no_accuracy_where_classes_are_others(tmp_path, caplog):
    images = Images.from_arrays(torch.randint(0, 255, (60, 1, 8, 8), dtype=torch.uint8), [0, 1, 2] * 20)
    with caplog.at_level("INFO"):
        analyze(SPECS[0], images, tmp_path / "run", settings=replace(TINY, samples="all", iterations=10, seeds=1))
    assert "cnn: no accuracy, since it has not one number for each class of the images (3)" in caplog.text


def test_no_predictions_where_some_are_nan(tmp_path, caplog):
    network = tiny_networks.cnn()
    network.fc.bias.data[7] = torch.nan
    for _ in range(2):  # nothing of them is kept
        caplog.clear()
        with caplog.at_level("INFO"):
            analyze(network, "digits", tmp_path / "run", settings=replace(TINY, iterations=10, seeds=1))
        assert "Tiny gives NaN for 100 of 100 images: its predictions are left out" in caplog.text
        assert "accuracy" not in caplog.text.replace("no accuracy, since it has not one number", "")


def test_images_that_are_not_drawn_one_by_one_are_warned_of(tmp_path, caplog):
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 1, 8, 8), generator=random, dtype=torch.uint8)
    labels, small = torch.arange(60) % 3, replace(TINY, samples="all", iterations=10, seeds=1)
    analyze(SPECS[0], (pixels, labels), tmp_path / "run", settings=small)
    assert "too small" not in caplog.text
    assert "60 images, one t-SNE map, ± without what its seed adds (perp" in (tmp_path / "run/table3.md").read_text()
    analyze(SPECS[0], (torch.cat([pixels[:57], pixels[:3]]), labels), tmp_path / "copies", settings=small)
    assert "3 of the 60 images of arrays are copies of others: as neighbours they raise NH" in caplog.text
    assert "have two images" not in caplog.text
    analyze(SPECS[0], (pixels, (torch.arange(60) // 2).clamp(max=20)), tmp_path / "pairs", settings=small)
    assert "20 of the classes of arrays have two images: the error of NH is too small" in caplog.text


def test_neighbours_that_are_drawn_by_lot_are_said(tmp_path, caplog):
    """In a layer of two values."""
    network = torch.nn.Sequential(OrderedDict(conv=torch.nn.Conv2d(1, 1, 8), sign=torch.nn.Hardtanh(0, 1e-30)))
    settings = replace(TINY, iterations=10, seeds=1, layers=("conv", "sign"), image_size=8)
    with caplog.at_level("WARNING", logger="qdv_gpu.studies.compute"):
        analyze(network, "digits", tmp_path / "run", settings=settings)
    [said] = [record.getMessage() for record in caplog.records if "equally far" in record.getMessage()]
    assert said.startswith(
        "Sequential sign: for 100 % of the images the nearest neighbours are drawn by lot from equally far"
    )


def test_floating_point_images_are_not_normalised(tmp_path, caplog):
    pixels, labels = torch.rand(60, 1, 8, 8), [0, 1, 2] * 20
    small = replace(TINY, samples="all", iterations=10, seeds=1)
    with pytest.raises(InputError, match="mean and std are for images of uint8, and those of arrays are of floating"):
        analyze(SPECS[0], (pixels, labels), tmp_path / "run", settings=small, mean=0.5)
    analyze(SPECS[0], (2 * pixels - 1, labels), tmp_path / "run", settings=small)
    assert "of floating point in" not in caplog.text
    pixels[:, 0, 0, 0] = 1
    analyze(SPECS[0], (255 * pixels, labels), tmp_path / "raw", settings=small)
    assert "of floating point in 0..255: networks get them as they are" in caplog.text
    analyze(SPECS[0], (pixels, labels), tmp_path / "run", settings=small)
    assert "floating point in 0..1, as ToTensor leaves them" in caplog.text


def test_scores_agree_with_scikit_learn(finished):
    from sklearn.neighbors import NearestNeighbors

    arrays = np.load(finished.out / "embeddings" / "other" / "relu@2.npz")
    with (finished.out / "layers.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if (r["network"], r["layer"], r["k"]) == ("other", "relu@2", "3")]
    for seed, row in enumerate(rows):
        neighbours = NearestNeighbors(n_neighbors=3).fit(arrays["Z"][seed]).kneighbors(return_distance=False)
        nh = (arrays["labels"][neighbours] == arrays["labels"][:, None]).mean()
        assert float(row["nh"]) == pytest.approx(nh, abs=1e-12)


def test_a_finished_run_is_not_computed_again(finished, counted):
    before = outcome(finished.out)
    again = run(finished.out)
    assert counted == {"passes": 0, "maps": 0}
    assert again.layers[0].of(5) == finished.layers[0].of(5)
    assert outcome(finished.out) == before


def test_only_what_is_new_is_computed(finished, counted, tmp_path, lines):
    store = finished.out.parent / ".qdv-store"
    run(tmp_path / "k", replace(TINY, k=(7, 5)), store=store)
    assert counted == {"passes": 0, "maps": 0}
    run(tmp_path / "seed", replace(TINY, seeds=3), store=store)
    assert counted == {"passes": 0, "maps": 2 * len(LAYERS)}  # one for each layer
    run(tmp_path / "network", specs=[*SPECS, "tiny_networks:normalised"], store=store)
    assert counted == {"passes": 2, "maps": 2 * len(LAYERS) + 2 * len(LAYERS)}  # two images, then all
    assert "cnn: 4 of 4 layers and 8 of 8 maps are in the store" in lines()
    run(tmp_path / "perplexity", replace(TINY, perplexity=9), store=store)
    assert counted["passes"] == 2
    run(tmp_path / "layer", replace(TINY, layers=("conv2",)), SPECS[:1], store=store)
    assert counted["passes"] == 4
    np.testing.assert_array_equal(
        np.load(tmp_path / "seed" / "embeddings" / "cnn" / "pool@1.npz")["Z"][:2],
        np.load(finished.out / "embeddings" / "cnn" / "pool@1.npz")["Z"],
    )


def test_an_edited_network_is_computed_anew(counted, tmp_path, monkeypatch):
    run(tmp_path / "a", specs=SPECS[:1], store=tmp_path / "store")
    made = dict(counted)

    class Edited(tiny_networks.Tiny):
        def __init__(self):
            super().__init__()
            self.pool = torch.nn.AvgPool2d(2)

    monkeypatch.setattr(tiny_networks, "Tiny", Edited)  # the same weights, by another factory of the same name
    run(tmp_path / "a", specs=SPECS[:1], store=tmp_path / "store")
    assert counted == {name: 2 * count for name, count in made.items()}


def test_other_images_are_computed_anew_and_other_places_are_not(counted, tmp_path):
    pixels = (torch.arange(60 * 64).reshape(60, 1, 8, 8) * 7919 % 251).to(torch.uint8)
    labels, small = torch.arange(60) % 3, {"samples": "all", "perplexity": 5, "iterations": 20, "seeds": 1, "k": 3}
    changed = pixels.clone()
    changed[30, 0, 2, 2] ^= 1

    def go(images, name):
        analyze(
            SPECS[0], images, tmp_path / name, layers="pool", pca=5, device="cpu", store=tmp_path / "store", **small
        )
        return dict(counted)

    first = go((pixels, labels), "a")
    assert go((pixels.numpy(), labels.numpy()), "b") == first
    assert go((pixels, (labels + 1) % 3), "c") == first  # other labels, another score of the same maps
    assert go((changed, labels), "d") != first


def test_a_folder_shows_the_latest_run_and_keeps_what_is_not_its_own(tmp_path):
    out = tmp_path / "run"
    run(out)
    (out / "notes.txt").write_text("mine")
    run(out, replace(TINY, layers=("conv2",), k=3), SPECS[:1])
    found = {str(path.relative_to(out)) for path in out.rglob("*.npz")}
    assert found == {"embeddings/cnn/conv2.npz"}
    assert not (out / "embeddings" / "other").exists()
    assert (out / "notes.txt").read_text() == "mine"
    with (out / "layers.csv").open() as file:
        assert {row["k"] for row in csv.DictReader(file)} == {"3"}


def test_layers_that_do_not_fit_are_recomputed_to_the_same_bits(finished, tmp_path, monkeypatch):
    def recompute(tasks, **options):
        return [
            replace(chosen, passes=[], recomputed=[name for held in chosen.passes for name in held])
            for chosen in plan(tasks, **options)
        ]

    plan = study.plan
    monkeypatch.setattr(study, "plan", recompute)
    monkeypatch.setattr(compute, "hold", None)
    run(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(finished.out)


@pytest.mark.parametrize("layers", ["conv1", "conv1,fc"])
def test_a_layer_is_in_the_layout_that_the_whole_network_takes(tmp_path, layers):
    """Or its bits would depend on what it is computed with."""
    layouts = []

    class Viewing(tiny_networks.Viewing):
        def forward(self, x):
            if x.shape[0] > 2:  # no trial
                layouts.append(x.stride(1) > 1)
            return super().forward(x)

    images = load_images("digits").take(torch.arange(128))
    images = Images.from_arrays(images.pixels, images.labels % 2)  # classes that it does not name
    analyze(
        Viewing(),
        images,
        tmp_path / "run",
        settings=replace(TINY, iterations=10, seeds=1, samples="all", layers=layers),
    )
    assert layouts == [True, True]


def test_networks_of_one_name_are_numbered(tmp_path):
    result = run(tmp_path / "run", specs=["tiny_networks:cnn", "tiny_networks:cnn"])
    assert {layer.network for layer in result.layers} == {"cnn-1", "cnn-2"}
    arrays = outcome(tmp_path / "run")[1]
    assert arrays["embeddings/cnn-1/pool@1.npz"] == arrays["embeddings/cnn-2/pool@1.npz"]


def test_layers_of_some_networks_only(tmp_path):
    settings = Settings(layers=("pool", "pair"), samples=60, pca=5, perplexity=5, iterations=20, seeds=1)
    with pytest.raises(InputError, match="unknown layer of cnn 'poor': did you mean pool"):
        run(tmp_path, replace(settings, layers=("pool", "poor")), ["tiny_networks:cnn", "tiny_networks:pair"])
    settings = replace(settings, layers=("pool", "conv2"))
    result = run(tmp_path, settings, ["tiny_networks:pair", "tiny_networks:cnn"])
    assert [(s.network, s.layer) for s in result.layers] == [
        ("pair", "conv2"),
        ("cnn", "pool@1"),
        ("cnn", "pool@2"),
        ("cnn", "conv2"),
    ]


def test_one_call_of_a_layer(tmp_path, finished):
    result = run(tmp_path / "run", replace(TINY, layers=("pool@2", "conv2")), SPECS[:1])
    assert [layer.layer for layer in result.layers] == ["pool@2", "conv2"]
    assert result.layer("cnn", "pool@2").of(5) == finished.layer("cnn", "pool@2").of(5)
    with pytest.raises(InputError, match="unknown call of a layer of cnn 'pool@9': did you mean pool@"):
        run(tmp_path / "other", replace(TINY, layers=("pool@9",)), SPECS[:1])


def test_modules_and_networks_are_not_changed(tmp_path):
    module = tiny_networks.normalised().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    small = {"samples": 60, "pca": 5, "perplexity": 5, "iterations": 20, "seeds": 1, "k": 3, "layers": ["pool"]}
    first = analyze(module, "digits", tmp_path / "a", **small)
    network = load_network(module)
    network.module.train()
    second = analyze(network, "digits", tmp_path / "b", device="cpu", **small)
    assert [layer.of(3) for layer in first.layers] == [layer.of(3) for layer in second.layers]
    assert all(child.training for child in module.modules())
    assert network.module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert not any(child._forward_hooks for child in module.modules())
    assert json.loads((tmp_path / "a" / "run.json").read_text())["networks"]["Tiny"]["weights"] == "given"


def test_without_pca_and_other_normalisations(tmp_path):
    for normalise in ("l2", "standard", "none"):
        settings = Settings(
            layers=("relu", "pool"), samples=60, pca=0, normalise=normalise, perplexity=8, iterations=20, seeds=1
        )
        result = run(tmp_path / normalise, settings, ["tiny_networks:cnn"])
        assert len(result.layers) == len(LAYERS)


def test_bad_settings_write_nothing(tmp_path):
    for wrong, message in [
        ({"perplexity": 33}, "3 [*] perplexity below N - 1 = 99, got 33"),
        ({"perplexity": float("nan")}, "perplexity"),
        ({"k": (50,)}, "k must be smaller than half the number of images"),
        ({"k": (5, 5)}, "different positive numbers"),
        ({"samples": 10}, "at least 2 are required|perplexity"),
        ({"samples": 2000}, "fewer than the"),
        ({"normalise": "max"}, "unknown value of normalise 'max': did you mean minmax"),
        ({"engine": "exat"}, "unknown value of engine 'exat': did you mean exact"),
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"layers": ("pol",)}, "unknown layer of cnn 'pol': did you mean pool"),
    ]:
        with pytest.raises(InputError, match=message):
            run(tmp_path / "out", replace(TINY, **wrong))
        assert not (tmp_path / "out").exists()


def test_unknown_settings_are_refused(tmp_path):
    with pytest.raises(InputError, match="unknown setting 'perplexty': did you mean perplexity"):
        run(tmp_path / "out", perplexty=3)


def test_folders_that_hold_something_else(tmp_path):
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


def test_layers_are_in_the_order_asked_for_or_of_the_forward_pass(tmp_path):
    """In which a module that is called again has other layers between its calls."""
    for layers, names in (
        ("pool@2,conv2,pool@1", ["pool@2", "conv2", "pool@1"]),
        ("conv2,pool", ["conv2", "pool@1", "pool@2"]),
        (None, ["pool@1", "conv2", "pool@2"]),
    ):
        network = replace(load_network("tiny_networks:cnn"), layers={"conv2": "conv2", "pool": "pool"})
        result = run(tmp_path / str(layers), replace(TINY, layers=layers, iterations=10), network)
        assert [layer.layer for layer in result.layers] == names


def test_full_disk(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"disk full while writing .*run\.json"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_damaged_stages_are_computed_again(tmp_path, caplog):
    run(tmp_path / "run")
    before = outcome(tmp_path / "run")
    stages = sorted((tmp_path / ".qdv-store").glob("*/*/arrays.npz"))
    for number, file in enumerate(random.Random(0).sample(stages, 12)):
        data = bytearray(file.read_bytes())
        if number % 3 == 0:
            data[len(data) // 2] ^= 4
        file.write_bytes(data[: len(data) // 2] if number % 3 == 1 else b"" if number % 3 == 2 else data)
    run(tmp_path / "run")
    assert sum("will be computed again" in message for message in caplog.messages) == 12
    assert outcome(tmp_path / "run") == before
    assert not Store(tmp_path / ".qdv-store").unreferenced()


@pytest.mark.parametrize("memory", [None, 1_100_000_000])
def test_a_gpu_gives_the_scores_of_the_cpu(finished, tmp_path, memory, cuda):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    result = run(tmp_path / "run", replace(TINY, memory=memory), device=cuda)
    for ours, theirs in zip(result.layers, finished.layers, strict=True):
        assert ours.of(5).nh_feature_space == pytest.approx(theirs.of(5).nh_feature_space, abs=0.01)
        assert ours.of(5).nh == pytest.approx(theirs.of(5).nh, abs=0.1)  # of other maps
    if memory is not None:
        assert torch.cuda.max_memory_reserved() <= memory


def test_a_layer_that_is_called_prediction(tmp_path):
    network = torch.nn.Sequential(
        OrderedDict(prediction=torch.nn.Conv2d(1, 2, 3), flat=torch.nn.Flatten(), fc=torch.nn.Linear(72, 3))
    )
    pixels = torch.randint(256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    options = {"layers": "prediction", "perplexity": 5, "iterations": 20, "seeds": 1, "device": "cpu"}
    for labels in (torch.arange(40) % 3, None):
        images = Images.from_arrays(pixels, labels, classes=("a", "b", "c"))
        found = analyze({"net": network}, images, tmp_path / f"labelled {labels is not None}", **options)
        view = view_run(found.out)
        [layer] = view.layers
        about = json.loads((found.out / "run.json").read_text())["networks"]["net"]
        said = network((pixels / 255 - about["mean"][0]) / about["std"][0]).argmax(dim=1)
        assert view.predictions["net"][0].tolist() == said.tolist()
        if labels is None:
            assert layer.hits is None
        else:
            assert layer.hits.mean() == pytest.approx(layer.scores["nh"], abs=1e-5)


def test_too_few_iterations_are_said_once_also_when_all_is_kept(tmp_path, lines):
    for _ in range(2):
        warn_if_short.cache_clear()
        run(tmp_path / "run")
    assert sum(line.startswith("60 iterations of t-SNE end within the early") for line in lines()) == 2
