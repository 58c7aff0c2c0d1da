"""The figure of a comparison: measured as the others; and the words of its summary for every kind of outcome."""

from dataclasses import replace

import numpy as np
import pytest
from measured_figures import long, problems, short

from qdv_gpu.report.contrast import plot_comparison, summary
from qdv_gpu.report.pictures import plot_images
from qdv_gpu.results.comparison import Comparison, LayerPair
from qdv_gpu.results.records import AnalysedLayer
from qdv_gpu.scores.comparison import Difference


@pytest.mark.parametrize("name", [long, short])
@pytest.mark.parametrize("C", [2, 10, 100])
@pytest.mark.parametrize("L", [1, 5, 16])
def test_no_overlap(L, C, name):
    random = np.random.default_rng(0)
    delta = random.normal(0, 0.1, L)
    ends = np.stack([delta, delta - 0.05, delta + 0.05], axis=1)
    layers = [name("layer", i) for i in range(L)]
    figure, axes = plot_comparison(
        random.uniform(0.2, 0.9, (2, L)), np.full((2, L), 0.01), ends, ends, class_delta=random.normal(0, 0.1, (C, L)),
        cka=random.uniform(0, 1, (L, L + 1)), networks=(name("network", 0), name("network", 1)), layers=layers,
        classes=[name("class", c) for c in range(C)], cka_layers=(layers, [*layers, name("layer", 99)]),
    )  # fmt: skip
    assert len(axes) == 4
    assert problems(figure) == []


@pytest.mark.parametrize("name", [long, short])
@pytest.mark.parametrize("count", [1, 7, 12])
def test_no_overlap_in_images(count, name):
    images = [np.full((1 + 2 * (i % 2), 8 + i, 9), 99, np.uint8) for i in range(count)]
    figure, _ = plot_images(images, [[name("class", i), "0.20 → 0.90"] for i in range(count)], name("title", 0))
    assert problems(figure) == []


def layer(name, position):
    return AnalysedLayer(
        network="", layer=name, position=position, features=1, samples=10, tokens=None, perplexity=1, engine="",
        Z=np.empty((0, 10, 2)), kl=[], scores=(), stages={},
    )  # fmt: skip


def pair(name, delta, verdict, own="undecided", half=0.01):
    nothing = np.zeros(2)
    ends = dict(df=90.0, p=0.0, p_holm=0.0)
    maps, space = (
        Difference(
            delta=delta,
            standard_error=half / 2,
            low=delta - half,
            high=delta + half,
            equivalent=False,
            verdict=one,
            **ends,
        )
        for one in (verdict, own)
    )
    one = layer(name, 1)
    return LayerPair(one, one, (0.5, 0.5 + delta), (0.5, 0.5), maps, space, (0.5, 0.5, 0.1), nothing, nothing, nothing)


def found(*pairs, runs=1, seeds=2):
    layers = (("x",), ("x",))
    return Comparison(
        "A", "B", 5, 0.02, runs, seeds, layers, ("x", "y"), pairs, np.zeros((1, 1)), np.zeros((2, 10))
    )  # fmt: skip


def test_words_of_every_outcome():
    text = summary(
        found(
            pair("one", 0.001, "equivalent", "equivalent", 0.005),
            pair("two", 0.005, "undecided"),
            pair("three", -0.1, "behind", "behind"),
            pair("four", 0.1, "ahead", "ahead"),
            pair("five", 0.2, "ahead", "undecided"),
        )
    )
    assert "B keeps the classes together better than A at four (by 0.100, 0.090 to 0.110) and five" in text
    assert "; from four on it is ahead to the last layer" in text
    assert "A keeps the classes together better than B at three (by 0.100, 0.090 to 0.110)." in text
    assert "They differ by less than 0.02 at one; undecided at two" in text
    assert "the verdict is another at five (it is undecided, +0.200): trust that one" in text
    assert text.endswith("on images like these 10, and not of their architectures.")
    assert "None" not in text
    assert "nan" not in text


def test_layers_without_a_partner_are_named():
    deeper = replace(found(pair("x", 0.1, "ahead")), layers=(("x",), ("x", "y", "z")))
    assert "Not compared: y and z of B; --pair x=z sets the last layers side by side. This speaks" in summary(deeper)
    both = replace(deeper, layers=(("x", "v"), ("x", "y")))
    assert "Not compared: v of A, and y of B; --pair v=y sets" in summary(both)
    tokens = replace(deeper, layers=(("x", "v [mean]"), ("x", "y", "z [cls]")))
    assert "Not compared: v [mean] of A, and y and z [cls] of B; --pair v=z sets" in summary(tokens)
    assert "Not compared" not in summary(found(pair("x", 0.1, "ahead")))


def test_words_where_all_agree_and_of_more_runs():
    text = summary(found(pair("one", 0.1, "ahead", "ahead"), runs=3))
    assert "In the layer's own space, without t-SNE, the verdict is the same." in text
    assert text.endswith("This speaks of networks trained as these 3 of each, on images like these.")
    two = summary(replace(found(pair("one", 0.1, "undecided"), pair("two", -0.2, "undecided")), runs=2))
    assert two.startswith("B less A, mean of two runs of each: one +0.100, two -0.200.")
    alike = summary(found(pair("one", 0.001, "equivalent", "equivalent")))
    assert alike.startswith("They differ by less than 0.02 at one.")
