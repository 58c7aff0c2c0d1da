"""A ranking of many candidates in words and tables."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qdv_gpu.report.drawing import plain
from qdv_gpu.report.folder import RunFolder
from qdv_gpu.report.ranking_figures import gains_figure, ranking_figure, span
from qdv_gpu.report.tables import markdown
from qdv_gpu.report.trade_offs import cost_figure, relation_figure
from qdv_gpu.results.ranking import Ranking
from qdv_gpu.scores.ranking import Gains
from qdv_gpu.scores.relation import LEAST

LISTED = 6  # names or layers in a sentence at most


def write_ranking(folder: RunFolder, found: Ranking, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write ranking.md and the figures, whose paths are returned."""
    folder.text("ranking.md", ranking_markdown(found))
    figures = {"ranking": ranking_figure(found), "cost": cost_figure(found)}
    if found.baseline is not None and len(found.candidates) > 1:
        figures["gains"] = gains_figure(found)
    if found.relation is not None:
        figures["relation"] = relation_figure(found)
    return [path for name, one in figures.items() for path in folder.figure(f"figures/{name}", one, formats)]


def ranking_sentences(found: Ranking) -> str:
    """What to change, what it gains at which layer, and what is undecided: three sentences, of one candidate one."""
    name = _name(found, found.winner)
    if found.runs == 2:
        return (
            f"{name} has the highest NH at {_layer(found)}, {found.top.in_maps.nh[found.winner]:.3f}, mean of two runs "
            f"of each of {len(found.candidates)} candidates{_at_baseline(found)}. Two runs give no interval, so all "
            "the rest is undecided: a third of each says how much the runs differ."
        )
    text = [_what_to_change(found)]
    if len(found.candidates) > 1:
        text += [_what_it_gains(found), _undecided(found)]
    return " ".join(text)


def ranking_notes(found: Ranking) -> str:
    """How far the highest NH is to be trusted, what the ranking speaks of, accuracy, and who is left out or dropped."""
    text = []
    if len(found.candidates) > 1 and found.runs != 2:
        text += [_optimism(found), _own_space(found)]
    if found.runs == 1:
        text.append(
            f"This speaks of these trained networks, on images like these {found.samples:,}, and not of their settings."
        )
        if math.isinf(found.top.maps.noise_df) and len(found.candidates) > 1:
            text.append("Each layer has one map, so intervals and ranks do not know how maps of other seeds differ.")
    else:
        text.append(f"This speaks of networks trained as these {found.runs} of each, on images like these.")
    text.append(relation_sentence(found))
    if found.left_out:
        them = "it" if len(found.left_out) == 1 else "them"
        text.append(f"Not ranked, since runs of {them} are missing: {_list([plain(name) for name in found.left_out])}.")
    if found.dropped:
        names = _list([plain(name) for name in found.dropped])
        text.append(f"Dropped earlier as surely not the best (95 % each time), and not compared here: {names}.")
    return " ".join(text)


def advised(found: Ranking) -> int | None:
    """Position of the candidate to change to: the highest NH of those that are surely ahead of the baseline, or None.

    Without a baseline, the one with the highest NH.
    """
    gains = found.top.gains
    if gains is None:
        return found.winner
    return next((i for i in found.order if gains.verdicts[i] == "ahead"), None)


def _what_to_change(found: Ranking) -> str:
    top, winner, layer = found.top, found.winner, _layer(found)
    name, nh = _name(found, winner), _interval(top.in_maps.nh, top.in_maps.low, top.in_maps.high, winner)
    if len(found.candidates) == 1:
        alone = "One candidate is left" if found.left_out or found.dropped else "There is one candidate"
        return f"{alone}, {name}, and nothing to rank: its NH at {layer} is {nh}."
    if found.baseline == winner:
        return f"Change nothing: the baseline, {name}, has the highest NH at {layer}, {nh}."
    best = advised(found)
    if found.baseline is None:
        alone = top.in_maps.can_be_best.sum() == 1
        return f"Choose {name}: {'it is the best' if alone else 'it has the highest NH'} at {layer}, NH {nh}."
    if best is None:
        return (
            f"Nothing is surely worth changing: {name} has the highest NH at {layer}, {nh}, but no candidate is surely "
            f"ahead of the baseline, {_name(found, found.baseline)}."
        )
    change = _change(found, found.baseline, best)
    nh = _interval(top.in_maps.nh, top.in_maps.low, top.in_maps.high, best)
    which = "has the highest NH" if best == winner else "is surely ahead of the baseline"
    return f"Change {change}: {_name(found, best)} {which} at {layer}, {nh}."


def _what_it_gains(found: Ranking) -> str:
    layer, top, V, base = _layer(found), found.top, len(found.candidates), found.baseline
    if top.gains is None or base is None:
        below = V - int(top.in_maps.ranks[found.winner, 1])
        return f"At {layer} it is surely above {below} of the {V - 1} others; there is no baseline to gain over."
    best = advised(found)
    one = next(i for i in found.order if i != base) if best is None else best  # the highest beside the baseline
    delta, low, high = (float(values[one]) for values in (top.gains.delta, top.gains.low, top.gains.high))
    text = (
        f"Over {_name(found, base)} {_name(found, one)} gains {delta:+.3f} at {layer} ({low:+.3f} to {high:+.3f}, for "
        f"all candidates{' and layers' if len(found.layers) > 1 else ''} at once)"
    )
    others = [
        (plain(x.name), x.gains.verdicts[one], f"{plain(x.name)} ({x.gains.delta[one]:+.3f})")
        for x in found.layers[:-1]
        if x.gains is not None
    ]
    for verdict, words in (("ahead", "it is surely ahead at"), ("behind", "surely behind at")):
        own = [shown for _, of, shown in others if of == verdict]
        text += f"; {words} {_list(own)}" if own else ""
    own = [name for name, of, _ in others if of == "undecided"]
    return f"{text}{f'; undecided at {_list(own)}' if own else ''}."


def _undecided(found: Ranking) -> str:
    order = [i for i in found.order if found.top.in_maps.can_be_best[i]]
    V, gmac = len(found.candidates), [found.candidates[i].gmac for i in order]
    if len(order) == 1:
        text = f"Which is best is decided: of the {V} no other than {_name(found, order[0])} can still be (95 %)"
    else:
        count = f"all {V} candidates" if len(order) == V else f"{len(order)} of the {V} candidates"
        text = f"Undecided is which is best: {count} can still be (95 %), {_list([_name(found, i) for i in order])}"
        if not np.isnan(gmac).any() and min(gmac) < gmac[0]:
            least = int(np.argmin(gmac))
            text += f"; of these {_name(found, order[least])} costs least ({gmac[least]:.3g} GMAC, not {gmac[0]:.3g})"
    if found.top.gains is not None:
        open_ = found.top.gains.verdicts.count("undecided")
        text += f"; {open_} of {V - 1} are neither surely ahead of the baseline nor behind it" if open_ else ""
    return f"{text}."


def _optimism(found: Ranking) -> str:
    """The highest of many is too high."""
    ranks = found.top.in_maps
    text = f"The NH of {_name(found, found.winner)} is optimistic, since it is the highest of {len(ranks.nh)}"
    if ranks.can_be_best.sum() == 1:
        return f"{text}, but hardly, since no other comes near."
    return f"{text}: by {ranks.optimism:.3f} on average if all that can still be best are equal."


def _own_space(found: Ranking) -> str:
    own, winner = found.top.in_layer, found.winner
    best = int(np.argmax(own.nh))
    if own.can_be_best[winner]:
        return f"In the layer's own space, without t-SNE, {_name(found, winner)} can be the best as well."
    return (
        f"In the layer's own space, without t-SNE, {_name(found, winner)} is surely not the best, {_name(found, best)} "
        "is the highest: trust that one, since the error of a map does not know how the map itself answers to the "
        "images that were drawn."
    )


def relation_sentence(found: Ranking) -> str:
    """What NH says of the accuracy over the candidates."""
    related, V = found.relation, len(found.candidates)
    if related is None:
        return "The candidates' accuracies are not known, so nothing is said of NH and accuracy."
    if V < LEAST:
        few = "1 candidate is" if V == 1 else f"{V} candidates are"
        return f"{few} too few for a correlation of NH and accuracy: {LEAST} are needed."
    if not found.halves:
        return (
            "It is not known which images each candidate gets right, so there is no correlation of NH and accuracy: on "
            "the same images they are alike by chance."
        )
    r, low, high, p = (float(v[-1]) for v in (related.r, related.low, related.high, related.p))
    if math.isnan(r):
        return "NH or accuracy is the same of all candidates, so there is no correlation."
    layers = f", the largest of {len(found.layers)} layers allowed for" if len(found.layers) > 1 else ""
    return (
        f"NH at {_layer(found)} on one half of the images and accuracy on the other have a correlation of {r:.2f} "
        f"({low:.2f} to {high:.2f}) over {V} candidates; p = {p:.2g} by permutation{layers}."
    )


def ranking_table(found: Ranking) -> list[list[str]]:
    """Rows of cells, a header first: the candidates, the highest NH first, with all that is known of their ranks."""
    header = ["", "candidate", f"NH at {_layer(found)}", "can be best", "ranks"]
    gains, ranks = found.top.gains, found.top.in_maps
    if gains is not None and found.baseline is not None:
        header += [f"less {_name(found, found.baseline)}", "verdict"]
    rows = [[*header, "accuracy", "GMAC", "seconds"]]
    for number, i in enumerate(found.order, start=1):
        one = found.candidates[i]
        row = [str(number), _name(found, i), _interval(ranks.nh, ranks.low, ranks.high, i)]
        row += ["" if found.runs == 2 else "yes" if ranks.can_be_best[i] else "no"]
        row += ["" if found.runs == 2 else span(ranks.ranks[i])]
        if gains is not None:
            row += ["", "baseline"] if i == found.baseline else [_signed(gains, i), gains.verdicts[i]]
            row[-1] = "" if found.runs == 2 and i != found.baseline else row[-1]
        rows.append([*row, _number(one.accuracy, ".3f"), _number(one.gmac, ".3g"), _number(one.seconds, ".0f")])
    return rows


def gains_table(found: Ranking) -> list[list[str]]:
    """Rows of cells, a header first: NH less the baseline's at each layer, with simultaneous intervals."""
    rows = [["candidate", *(plain(layer.name) for layer in found.layers)]]
    for i in found.order:
        if i != found.baseline:
            own = [_signed(layer.gains, i) for layer in found.layers if layer.gains is not None]
            rows.append([_name(found, i), *own])
    return rows


def ranking_markdown(found: Ranking) -> str:
    """Sentences and tables in Markdown."""
    intervals = "" if found.runs == 2 else " (its 95 % interval)"
    text = f"# Ranking of {len(found.candidates)}\n\n{ranking_sentences(found)}\n\n{ranking_notes(found)}\n\n"
    text += f"{markdown(ranking_table(found))}\nNeighborhood hit (k = {found.k}){intervals}."
    if found.runs != 2:
        text += (
            " Can be best: the true best is among these in at least 95 % of samples. Ranks: those that each can have; "
            "they hold for all at once in at least 90 %."
        )
    if found.baseline is not None and len(found.candidates) > 1:
        text += (
            f"\n\n## Less {_name(found, found.baseline)}, by layer\n\n{markdown(gains_table(found))}\n"
            "Intervals hold for all candidates and layers at once with 95 %."
        )
    return f"{text}\n"


def sweep_rows(found: Ranking) -> list[dict[str, Any]]:
    """One dict for each candidate, in the order in which they were given: its ranking, for sweep.csv.

    The keys are name, nh, low, high, standard_error, can_be_best, rank_low, rank_high, with a baseline delta,
    delta_low, delta_high and verdict, all at the layer that is ranked by; then for each layer "nh LAYER",
    "standard_error LAYER", "nh_feature_space LAYER", and with a baseline "delta LAYER". What is not known is NaN; of
    two runs can_be_best and verdict are None.
    """
    rows, top = [], found.top
    for i, one in enumerate(found.candidates):
        row: dict[str, Any] = {"name": one.name}
        row |= {x: float(getattr(top.in_maps, x)[i]) for x in ("nh", "low", "high")}
        row["standard_error"] = float(top.maps.standard_error[i])
        row["can_be_best"] = None if found.runs == 2 else bool(top.in_maps.can_be_best[i])
        row["rank_low"], row["rank_high"] = top.in_maps.ranks[i].tolist()
        if top.gains is not None:
            row |= {f"delta{x and '_' + x}": float(getattr(top.gains, x or "delta")[i]) for x in ("", "low", "high")}
            row["verdict"] = None if found.runs == 2 and i != found.baseline else top.gains.verdicts[i]
        for layer in found.layers:
            row[f"nh {layer.name}"] = float(layer.maps.nh[i])
            row[f"standard_error {layer.name}"] = float(layer.maps.standard_error[i])
            row[f"nh_feature_space {layer.name}"] = float(layer.space.nh[i])
            if layer.gains is not None:
                row[f"delta {layer.name}"] = float(layer.gains.delta[i])
        rows.append(row)
    return rows


def _change(found: Ranking, old: int, new: int) -> str:
    """The settings in which two candidates differ."""
    a, b = found.candidates[old].values, found.candidates[new].values
    names = [name for name in dict.fromkeys([*a, *b]) if _value(a, name) != _value(b, name)]
    if not names:
        return f"{_name(found, old)} for {_name(found, new)}"
    return _list([f"{plain(name)} from {_value(a, name)} to {_value(b, name)}" for name in names])


def _value(values: Any, name: str) -> str:
    return plain(values[name]) if name in values else "nothing"


def _at_baseline(found: Ranking) -> str:
    if found.baseline is None or found.baseline == found.winner:
        return ""
    return f" (the baseline, {_name(found, found.baseline)}, has {found.top.in_maps.nh[found.baseline]:.3f})"


def _name(found: Ranking, i: int) -> str:
    return plain(found.candidates[i].name)


def _layer(found: Ranking) -> str:
    return plain(found.top.name)


def _interval(values: np.ndarray, low: np.ndarray, high: np.ndarray, i: int) -> str:
    return f"{values[i]:.3f}" + ("" if math.isnan(low[i]) else f" ({low[i]:.3f} to {high[i]:.3f})")


def _signed(gains: Gains, i: int) -> str:
    ends = "" if math.isnan(gains.low[i]) else f" ({gains.low[i]:+.3f} to {gains.high[i]:+.3f})"
    return f"{gains.delta[i]:+.3f}{ends}"


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else f"{value:{form}}"


def _list(names: Sequence[str]) -> str:
    if len(names) > LISTED:
        return f"{', '.join(names[: LISTED - 1])} and {len(names) - LISTED + 1} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
