"""Figures of a ranking, measured as the others; its words for every kind of outcome, its tables and rows."""

import math
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from measured_figures import long, problems, short

from qdv_gpu.errors import InputError
from qdv_gpu.report import ranking as report
from qdv_gpu.report.folder import RunFolder
from qdv_gpu.report.ranking_figures import OTHER, gains_figure, plot_gains, plot_ranking
from qdv_gpu.report.trade_offs import front, plot_cost, plot_relation, relation_figure
from qdv_gpu.results.ranking import Candidate, Trained, ranked
from qdv_gpu.results.records import AnalysedLayer
from qdv_gpu.scores.quality import score_maps

N, C = 80, 4
LABELS = np.arange(N) % C
ANGLE = 2 * np.pi * np.arange(C) / C
CENTRES = np.stack([np.cos(ANGLE), np.sin(ANGLE)], axis=1)
COUNTS = [1, 2, 5, 20, 60]


def odd(text, i):
    return f"{text}$_{i}$[a=1,\nb={i}]|x"


@cache
def scores(apart, seed):
    random = np.random.default_rng(seed)
    X = apart * CENTRES[LABELS] + random.normal(size=(N, 2))
    maps = np.stack([X + 0.05 * random.normal(size=X.shape) for _ in range(3)])
    return tuple(score_maps(torch.from_numpy(X), torch.from_numpy(maps), torch.from_numpy(LABELS), k=[5]))


def layer(name, apart, seed=0):
    return AnalysedLayer(
        network="", layer=name, position=1, features=1, samples=N, tokens=None, perplexity=1, engine="",
        Z=np.empty((3, N, 2)), kl=[], scores=scores(apart, seed), stages={"tsne": {"seconds": 2.0, "memory": 0}},
    )  # fmt: skip


def candidate(name, aparts, *, runs=1, layers=("x", "y"), gmac=1.0, right=0.5, **values):
    hits = np.random.default_rng(0).random(N) < right
    own = [layer(one, apart, 0) for one, apart in zip(layers, aparts, strict=True)]
    other = [[layer(one, apart, 1 + run) for one, apart in zip(layers, aparts, strict=True)] for run in range(runs - 1)]
    return Candidate(name, values, tuple(Trained(x, hits, float(hits.mean()), 10.0) for x in [own, *other]), gmac)


BASE = candidate("base", (1.0, 1.0), lr=0.1, depth=4)


def words(found):
    """All that is said of a ranking: a summary of at most three sentences, and notes."""
    said = report.ranking_sentences(found)
    assert len(re.findall(r"\.(?: (?=[A-Z])|$)", said)) <= 3
    return f"{said} {report.ranking_notes(found)}"


def test_words_where_a_change_gains():
    best = candidate("best", (1.0, 6.0), lr=0.01, depth=4)
    found = ranked([BASE, best, candidate("worse", (1.0, 0.0))], LABELS, k=5, baseline="base")
    text = words(found)
    nh, gains = found.top.in_maps.nh, found.top.gains
    assert text.startswith(f"Change lr from 0.1 to 0.01: best has the highest NH at y, {nh[1]:.3f} (")
    assert f"Over base best gains {nh[1] - nh[0]:+.3f} at y ({gains.low[1]:+.3f} to {gains.high[1]:+.3f}, for" in text
    assert "for all candidates and layers at once); undecided at x." in text
    assert "Which is best is decided: of the 3 no other than best can still be (95 %)" in text
    assert "The NH of best is optimistic, since it is the highest of 3, but hardly" in text
    assert "on images like these 80, and not of their settings." in text
    assert report.advised(found) == found.winner == 1


def test_words_where_nothing_is_decided():
    others = [candidate(f"c{i}", (1.0, 1.01 + 0.001 * i), gmac=2.0 - 0.1 * i) for i in range(8)]
    found = ranked([BASE, *others], LABELS, k=5, baseline="base")
    text = words(found)
    assert text.startswith("Nothing is surely worth changing: ")
    assert "no candidate is surely ahead of the baseline, base." in text
    assert "Undecided is which is best: all 9 candidates can still be (95 %), " in text
    assert " and 4 more; of these base costs least (1 GMAC, not " in text
    assert "; 8 of 8 are neither surely ahead of the baseline nor behind it." in text
    assert f": by {found.top.in_maps.optimism:.3f} on average if all that can still be best are equal." in text
    assert found.top.in_maps.optimism > 0
    assert report.advised(found) is None


def test_words_of_the_baseline_itself_of_one_and_without_a_baseline():
    best = candidate("best", (6.0, 6.0))
    text = words(ranked([best, BASE], LABELS, k=5, baseline="best"))
    assert text.startswith("Change nothing: the baseline, best, has the highest NH at y, ")
    assert "Over best base gains -" in text
    assert "surely behind at x" in text
    free = words(ranked([BASE, best], LABELS, k=5))
    assert free.startswith("Choose best: it is the best at y, NH ")
    assert "At y it is surely above 1 of the 1 others; there is no baseline to gain over." in free
    alone = words(ranked([BASE], LABELS, k=5, baseline="base"))
    assert alone.startswith("There is one candidate, base, and nothing to rank: its NH at y is ")
    left = words(replace(ranked([BASE], LABELS, k=5), left_out=("best",)))
    assert left.startswith("One candidate is left, base, and nothing to rank: ")


def test_words_of_two_and_three_runs():
    pair = [replace(BASE, runs=candidate("", (1.0, 1.0), runs=2).runs), candidate("best", (6.0, 6.0), runs=2)]
    two = ranked(pair, LABELS, k=5, baseline="base")
    text = words(two)
    assert text.startswith("best has the highest NH at y, ")
    assert "mean of two runs of each of 2 candidates (the baseline, base, has 0." in text
    assert "a third of each says how much the runs differ." in text
    rows = report.sweep_rows(two)
    assert rows[1]["can_be_best"] is rows[1]["verdict"] is None
    assert math.isnan(rows[1]["low"])
    assert "nan" not in report.ranking_markdown(two)
    assert "yes" not in report.ranking_markdown(two)
    three = [candidate(name, (a, a), runs=3) for name, a in (("base", 1.0), ("best", 6.0))]
    text = words(ranked(three, LABELS, k=5, baseline="base"))
    assert "This speaks of networks trained as these 3 of each, on images like these." in text
    left = replace(ranked(three, LABELS, k=5), left_out=("a", "b"))
    assert words(left).endswith("Not ranked, since runs of them are missing: a and b.")
    dropped = replace(ranked(three, LABELS, k=5), dropped=("c, 1 epochs",))
    assert words(dropped).endswith("surely not the best (95 % each time), and not compared here: c, 1 epochs.")


def test_words_of_one_map():
    found = ranked([BASE, candidate("other", (1.0, 1.1))], LABELS, k=5)
    said = "Each layer has one map, so intervals and ranks do not know how maps of other seeds differ."
    assert said not in words(found)
    single = replace(found.top, maps=replace(found.top.maps, noise_df=math.inf))
    assert said in words(replace(found, layers=(found.layers[0], single)))


def test_the_layers_own_space_is_trusted():
    found = ranked([BASE, candidate("other", (1.0, 1.1))], LABELS, k=5)
    w = found.winner
    space = replace(found.top.space, nh=np.where(np.arange(2) == w, 0.1, 0.9))
    found = replace(found, layers=(found.layers[0], replace(found.top, space=space)))
    assert "is surely not the best, " in words(found)
    assert "is the highest: trust that one" in words(found)


def test_layers_are_paired_by_position_by_name_or_only_the_last():
    two = candidate("b", (1.0, 2.0), layers=("x", "z"))
    found = ranked([BASE, two], LABELS, k=5)
    assert [one.name for one in found.layers] == ["x", "layer 2"]
    assert found.top.name == "layer 2"
    three = candidate("c", (3.0, 1.0, 2.0), layers=("y", "m", "x"))
    found = ranked([BASE, three], LABELS, k=5)
    assert [one.name for one in found.layers] == ["x", "y", "last layer"]
    assert found.layers[1].in_maps.nh[1] == pytest.approx(scores(3.0, 0)[0].mean.nh)
    assert found.top.name == "last layer"
    assert found.top.in_maps.nh[1] == pytest.approx(scores(2.0, 0)[0].mean.nh)
    deeper = candidate("e", (1.0, 2.0, 3.0), layers=("x", "m", "y"))
    assert [one.name for one in ranked([BASE, deeper], LABELS, k=5).layers] == ["x", "y"]
    none = candidate("d", (1.0, 2.0, 3.0), layers=("p", "q", "r"))
    found = ranked([BASE, none], LABELS, k=5)
    assert [one.name for one in found.layers] == ["last layer"]
    assert found.top.in_maps.nh[1] == pytest.approx(scores(3.0, 0)[0].mean.nh)


def test_relation_is_of_halves_if_hits_are_known():
    many = [candidate(f"c{i}", (1.0, 1.0 + 0.5 * i), right=0.3 + 0.1 * i) for i in range(6)]
    found = ranked(many, LABELS, k=5)
    assert found.halves
    assert found.relation.r[1] > 0.9
    assert found.relation.p[1] < 0.05
    assert "NH at y on one half of the images and accuracy on the other" in report.relation_sentence(found)
    assert "the largest of 2 layers allowed for" in report.relation_sentence(found)
    unknown = [replace(one, runs=(replace(one.runs[0], hits=None),)) for one in many]
    without = ranked(unknown, LABELS, k=5)
    assert not without.halves
    assert np.isnan(without.relation.r).all()
    assert "not known which images" in report.relation_sentence(without)
    assert without.relation.nh[1] == pytest.approx(without.top.in_maps.nh)
    nothing = [replace(one, runs=(replace(one.runs[0], accuracy=math.nan),)) for one in unknown]
    assert ranked(nothing, LABELS, k=5).relation is None
    assert "accuracies are not known" in report.relation_sentence(ranked(nothing, LABELS, k=5))
    assert "2 candidates are too few" in report.relation_sentence(ranked(many[:2], LABELS, k=5))
    with pytest.raises(InputError, match="accuracies are not known"):
        relation_figure(ranked(nothing, LABELS, k=5))


def test_rows_and_tables():
    best = candidate("be|st\n$x$", (1.0, 6.0), gmac=math.nan)
    found = ranked([BASE, best], LABELS, k=5, baseline="base")
    rows = report.sweep_rows(found)
    assert [row["name"] for row in rows] == ["base", "be|st\n$x$"]
    assert rows[0] | {"delta": 0.0, "delta_low": 0.0, "delta_high": 0.0, "verdict": "baseline"} == rows[0]
    assert rows[1]["delta y"] == rows[1]["delta"] == rows[1]["nh y"] - rows[0]["nh y"]
    assert (rows[1]["can_be_best"], rows[1]["rank_low"], rows[1]["rank_high"]) == (True, 1, 1)
    assert {"nh x", "standard_error x", "nh_feature_space x", "delta x"} < set(rows[0])
    assert [row[1] for row in report.ranking_table(found)] == ["candidate", "be|st\\n$x$", "base"]
    assert report.ranking_table(found)[1][-2:] == ["", "14"]  # 10 s of training, 2 s for each layer
    text = report.ranking_markdown(found)
    assert "be\\|st\\n$x$" in text
    assert "## Less base, by layer" in text
    assert "nan" not in text


def test_bad_input():
    other = candidate("other", (1.0, 1.0))
    for arguments, message in (
        (([],), "at least one candidate is required"),
        (([BASE, BASE],), "candidates must have names of their own, 'base' is there twice"),
        (([replace(BASE, runs=())],), "at least one, got none of 'base'"),
        (([BASE, candidate("o", (1.0, 1.0), runs=2)],), r"equally many runs, at least one, got \[1, 2\]"),
    ):
        with pytest.raises(InputError, match=message):
            ranked(*arguments, LABELS, k=5)
    with pytest.raises(InputError, match="unknown baseline 'bas': did you mean base"):
        ranked([BASE, other], LABELS, k=5, baseline="bas")
    mixed = replace(BASE, runs=(BASE.runs[0], candidate("", (1.0,), layers=("x",)).runs[0]))
    with pytest.raises(InputError, match="the runs of 'base' have other layers"):
        ranked([mixed], LABELS, k=5)
    with pytest.raises(InputError, match="gains need a baseline"):
        gains_figure(ranked([BASE, other], LABELS, k=5))


def test_files(tmp_path):
    many = [candidate(f"c{i}", (1.0, 1.0 + 0.5 * i), gmac=i + 1.0, right=0.3 + 0.1 * i) for i in range(5)]
    folder = RunFolder(tmp_path)
    found = ranked(many, LABELS, k=5, baseline="c0")
    written = report.write_ranking(folder, found)
    assert sorted(path.name for path in written) == ["cost.png", "gains.png", "ranking.png", "relation.png"]
    assert (tmp_path / "ranking.md").read_text() == report.ranking_markdown(found)
    few = report.write_ranking(RunFolder(tmp_path / "one"), ranked(many[:1], LABELS, k=5, baseline="c0"))
    assert [path.name for path in few] == ["ranking.png", "cost.png", "relation.png"]


def drawn(V):
    random = np.random.default_rng(V)
    nh = random.normal(0.6, 0.03, V)
    half = 0.015 + 0.01 * random.random(V)
    return random, nh, nh - half, nh + half, nh >= np.quantile(nh, 0.7) - 1e-9


@pytest.mark.parametrize("name", [long, short, odd])
@pytest.mark.parametrize("V", COUNTS)
def test_no_overlap_in_the_order(V, name):
    _, nh, low, high, best = drawn(V)
    names = [name("candidate", i) for i in range(V)]
    spans = [[1, V]] * V
    figure, ax = plot_ranking(nh, low, high, spans, best, names=names, baseline=V // 2, layer=name("layer", 0))
    assert problems(figure) == []
    shown = [text.get_text() for text in ax.get_yticklabels()]
    assert len(set(shown)) == V
    points = [line for line in ax.lines if len(line.get_xdata()) == 1 and line.get_markerfacecolor() != "none"]
    assert [line.get_xdata()[0] for line in points] == sorted(nh, reverse=True)
    assert sum(to_hex(line.get_color()) != OTHER for line in points) == best.sum()
    nan = np.full(V, math.nan)
    assert problems(plot_ranking(nh, nan, nan, spans, np.ones(V), names=names)[0]) == []


@pytest.mark.parametrize("name", [long, short, odd])
@pytest.mark.parametrize("L", [1, 5, 16])
@pytest.mark.parametrize("V", [1, 5, 59])
def test_no_overlap_in_gains(V, L, name):
    delta = np.random.default_rng(0).normal(0, 0.05, (V, L))
    layers = [name("layer", i) for i in range(L)]
    names = [name("candidate", i) for i in range(V)]
    figure, ax = plot_gains(delta, delta > 0.05, names=names, layers=layers, baseline=name("candidate", 99))
    assert problems(figure) == []
    bold = [text for text in ax.texts if text.get_weight() == "bold"]
    assert len(bold if ax.texts else ax.lines) == (delta > 0.05).sum()


@pytest.mark.parametrize("name", [long, odd])
@pytest.mark.parametrize("L", [1, 16])
@pytest.mark.parametrize("V", [1, 5, 60])
def test_no_overlap_in_the_relation(V, L, name):
    random, nh, _, _, best = drawn(V)
    r = random.uniform(-0.9, 0.9, L) if V >= 5 else np.full(L, math.nan)
    figure, axes = plot_relation(
        nh, nh + 0.1 * random.random(V), best, r=r, low=r - 0.05, high=r + 0.05, p=0.0123, baseline=0,
        layers=[name("layer", i) for i in range(L)],
    )  # fmt: skip
    assert problems(figure) == []
    assert len(axes) == (2 if V >= 5 and L > 1 else 1)
    assert any(text.get_text().startswith("r = " if V >= 5 else "no coefficient") for text in figure.texts)


@pytest.mark.parametrize("name", [long, short, odd])
@pytest.mark.parametrize("V", COUNTS)
def test_no_overlap_in_costs(V, name):
    random, nh, low, high, _ = drawn(V)
    costs = {"GMAC": 10 ** random.uniform(-1, 1.5, V), "seconds": np.where(np.arange(V) == 0, math.nan, 100.0)}
    names = [name("candidate", i) for i in range(V)]
    figure, axes = plot_cost(nh, costs, low=low, high=high, names=names, baseline=0, layer=name("layer", 0))
    assert problems(figure) == []
    assert axes[1].get_xlabel() == ("seconds: not known" if V == 1 else "seconds")


def test_front_by_brute_force():
    random = np.random.default_rng(0)
    nh, cost = random.integers(0, 6, 30) / 6, random.integers(0, 6, 30).astype(float)
    cost[3] = math.nan
    found = front(nh, cost)
    known = [i for i in range(30) if i != 3]
    surpassed = [
        any(nh[j] >= nh[i] and cost[j] <= cost[i] and (nh[j], cost[j]) != (nh[i], cost[i]) for j in known)
        for i in known
    ]
    expected = {(nh[i], cost[i]) for i, one in zip(known, surpassed, strict=True) if not one}
    assert {(nh[i], cost[i]) for i in found} == expected
    assert [cost[i] for i in found] == sorted(cost[i] for i in found)
