"""The summary of many random comparisons, read back word by word and held against the numbers of comparison.json."""

import math
import re

import numpy as np
import pytest
import torch
from scipy import stats

from qdv_gpu.report.contrast import summary
from qdv_gpu.results.comparison import Comparison, LayerPair, as_json
from qdv_gpu.results.records import AnalysedLayer
from qdv_gpu.scores.comparison import Side, differences

N = 6_000


def layer(name, position):
    return AnalysedLayer(
        network="", layer=name, position=position, features=1, samples=N, tokens=None, perplexity=1, engine="",
        Z=np.empty((0, N, 2)), kl=[], scores=(), stages={},
    )  # fmt: skip


def random_comparison(seed):
    random = np.random.default_rng(seed)
    L, R, S = int(random.integers(1, 6)), int(random.choice([1, 1, 1, 2, 3])), int(random.integers(1, 4))
    labels = torch.arange(N) % 2
    spread, margin = float(random.choice([0.002, 0.03, 0.3])), float(random.choice([0.001, 0.02, 0.3]))

    def sides(centre):
        values = [centre + spread * torch.from_numpy(random.normal(size=(S, N))) for _ in range(R)]
        return [Side(one, tuple(one.mean(dim=1).tolist())) for one in values]

    def compare(shift):
        return differences([(sides(0.5), sides(0.5 + by)) for by in shift], labels, margin=margin)

    scale = float(random.choice([0, 0.001, 0.01, 0.1]))
    maps, own = (compare(random.normal(random.choice([-1, 0, 1]) * scale, scale, L)) for _ in range(2))
    order = np.arange(L) if random.random() < 0.8 else random.permutation(L)
    extra = int(random.integers(0, 2))
    names = (tuple(f"a{i}" for i in range(L + extra)), tuple(f"b{i}" for i in range(L)))
    nothing = np.zeros(2)
    pairs = tuple(
        LayerPair(layer(f"a{i}", i + 1), layer(f"b{order[i]}", int(order[i]) + 1), (0.5, 0.5 + maps[i].delta),
                  (0.5, 0.5 + own[i].delta), maps[i], own[i], (0.5, 0.5, 0.1), nothing, nothing, nothing)
        for i in range(L)
    )  # fmt: skip
    return Comparison("A", "B", 5, margin, R, S, names, ("x", "y"), pairs, np.zeros((L + extra, L)), np.zeros((2, N)))


def items(text):
    """What a list with commas, brackets and an "and" holds."""
    return [one for one in re.split(r", (?![^(]*\))| and (?![^(]*\))", text) if one]


def one_sided(pair, sign):
    """By hand from the numbers of the file."""
    one = pair["in_maps"]
    return sign * one["delta"] > 0 and stats.t.sf(sign * one["delta"] / one["standard_error"], one["df"]) <= 0.025


def check(text, said):
    """Take every sentence away that is true; nothing may remain."""
    pairs, margin = said["pairs"], said["margin"]
    named = {f"{pair['first']}/{pair['second']}": pair for pair in pairs}
    names = list(named)

    def of(verdict, space="in_maps"):
        return [name for name in names if named[name][space]["verdict"] == verdict]

    sentences = re.split(r"(?<=\.) (?=[A-Z])", text)
    if said["runs"] == 2:
        shown = items(re.fullmatch(r"B less A, mean of two runs of each: (.*)\.", sentences[0])[1])
        assert shown == [f"{name} {named[name]['in_maps']['delta']:+.3f}" for name in names]
        assert sentences[1:] == ["Two runs give no interval: a third of each says how much the runs differ."]
        return
    crossed = [int(pair["second"][1:]) for pair in pairs]
    last = "the last layer" if [len(own) for own in said["layers"]] == [
        int(pairs[-1][side][1:]) + 1 for side in ("first", "second")
    ] else "the last layer compared"  # fmt: skip
    for verdict, sign, better, worse in (("ahead", 1, "B", "A"), ("behind", -1, "A", "B")):
        tail = [name for name in names if all(one_sided(named[x], sign) for x in names[names.index(name) :])]
        assert said["behind_from" if sign < 0 else "ahead_from"] == (
            len(names) - len(tail) if tail and crossed == sorted(crossed) else None
        )
        tail = tail if crossed == sorted(crossed) else []
        all_sure = set(tail) <= set(of(verdict))
        if of(verdict):
            start = f"{better} keeps the classes together better than {worse} at "
            sentence = sentences.pop(0)
            assert sentence.startswith(start)
            where, _, more = sentence.removeprefix(start).removesuffix(".").partition("; ")
            said_names = []
            for item in items(where):
                name, by, low, high, small = re.fullmatch(
                    r"(\S+) \(by ([\d.]+), ([\d.]+) to ([\d.]+)(, less than the margin of [\d.]+)?\)", item
                ).groups()
                one = named[name]["in_maps"]
                assert float(low) <= float(by) <= float(high)
                ends = sorted(sign * one[end] for end in ("low", "high"))
                digits = len(low) - 2  # as many as show that it is not 0
                assert [by, low, high] == [f"{value:.{digits}f}" for value in (sign * one["delta"], *ends)]
                assert ends[0] > 0
                assert float(low) > 0
                assert digits == 3 or float(f"{ends[0]:.{digits - 1}f}") == 0
                assert (small == f", less than the margin of {margin:g}") if one["equivalent"] else small is None
                said_names.append(name)
            assert said_names == of(verdict)
            words = f"from {tail[0]} on it is ahead to {last}" if tail and all_sure else ""
            if tail and not all_sure:
                words = f"in tests one by one, from {last} back, it is ahead down to {tail[0]}"
                if len(tail) == 1:
                    words = f"in a test of {last} alone it is ahead at {tail[0]}"
            assert more == ("" if len(tail) == 1 and all_sure else words)
        elif tail:
            alone = f"In a test of {last} alone {better} is ahead of {worse} at {tail[0]}."
            several = f"In tests one by one, from {last} back, {better} is ahead of {worse} down to {tail[0]}."
            assert sentences.pop(0) == (alone if len(tail) == 1 else several)
    rest = []
    if of("equivalent"):
        rest.append(f"they differ by less than {margin:g} at {joined(of('equivalent'))}")
    if of("undecided"):
        for name in of("undecided"):
            one = named[name]["in_maps"]
            assert one["low"] <= 0 <= one["high"]
            assert max(-one["low"], one["high"]) >= margin
        words = "interval holds 0 and reaches" if len(of("undecided")) == 1 else "intervals hold 0 and reach"
        rest.append(f"undecided at {joined(of('undecided'))}, where the {words} beyond ±{margin:g}")
    if rest:
        line = "; ".join(rest)
        assert sentences.pop(0) == line[0].upper() + line[1:] + "."
    other = [name for name in names if named[name]["in_maps"]["verdict"] != named[name]["in_layer"]["verdict"]]
    sentence = sentences.pop(0)
    one = len(names) == 1
    assert sentence.startswith(f"In the {'layer' if one else 'layers'}'{'s' if one else ''} own space, without t-SNE, ")
    if not other:
        assert sentence.endswith(f"the verdict{' is' if one else 's are'} the same.")
    else:
        meaning = {"ahead": "B is ahead", "behind": "A is ahead", "equivalent": "they are alike",
                   "undecided": "it is undecided"}  # fmt: skip
        shown = joined([f"{name} ({meaning[named[name]['in_layer']['verdict']]}, "
                        f"{named[name]['in_layer']['delta']:+.3f})" for name in other])  # fmt: skip
        words = ("the verdict is another", "that one") if len(other) == 1 else ("other verdicts hold", "those")
        assert f" {words[0]} at {shown}: trust {words[1]}, since" in sentence
    left = []
    for side, place, name in (("first", 0, "A"), ("second", 1, "B")):
        paired, depth = {int(pair[side][1:]) for pair in pairs}, len(said["layers"][place])
        if depth - 1 not in paired:
            left.append(f"{joined([pairs[0][side][0] + str(i) for i in range(depth) if i not in paired])} of {name}")
    if left:
        ends = "=".join(pairs[0][side][0] + str(len(own) - 1)
                        for side, own in zip(("first", "second"), said["layers"], strict=True))  # fmt: skip
        words = f"Not compared: {', and '.join(left)}; --pair {ends} sets the last layers side by side."
        assert sentences.pop(0) == words
    if said["runs"] == said["seeds"] == 1:
        assert sentences.pop(0).startswith("Where a layer has one map, ")
    assert len(sentences) == 1
    number = said["runs"] if said["runs"] > 1 else said["images"]
    assert re.findall(r"[\d,]*\d", sentences[0]) == [f"{number:,}"]


def joined(names):
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


@pytest.mark.parametrize("block", range(4))
def test_every_word_of_random_summaries(block):
    seen = set()
    for seed in range(block * 40, block * 40 + 40):
        found = random_comparison(seed)
        text, said = summary(found), as_json(found)
        assert not any(isinstance(value, float) and math.isnan(value) for value in said["pairs"][0]["in_maps"].values())
        check(text, said)
        seen |= {(said["runs"], pair["in_maps"]["verdict"]) for pair in said["pairs"]}
    assert {(1, verdict) for verdict in ("ahead", "behind", "undecided")} <= seen
