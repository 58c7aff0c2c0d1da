"""The part of a report about a sweep: ranking, cost, accuracy, of what sweep.csv says."""

from collections.abc import Mapping, Sequence

import numpy as np

from qdv_gpu.report.charts import Series, interval_chart, scatter_chart
from qdv_gpu.report.page import Cell, Section, Table

COLUMNS = {
    "candidate": "candidate", "candidate nh": "NH", "candidate low": "from", "candidate high": "to",
    "candidate can_be_best": "can be best", "candidate delta": "less the baseline", "candidate verdict": "verdict",
    "accuracy": "accuracy", "gmac": "GMAC",
}  # fmt: skip
LISTED = 60  # candidates in charts and table at most


def candidates_of(rows: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """A row of sweep.csv for each candidate that was ranked, the highest NH first; accuracy is the mean of the runs."""
    last = max((row["rung"] for row in rows), key=int, default="1")
    groups: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        if row["rung"] == last and row.get("candidate nh"):
            groups.setdefault(row["candidate"], []).append(row)
    found = []
    for own in groups.values():
        known = [float(row["accuracy"]) for row in own if row.get("accuracy")]
        found.append({**own[0], "accuracy": str(np.mean(known)) if known else ""})
    return sorted(found, key=lambda row: -float(row["candidate nh"]))


def sweep_section(rows: Sequence[Mapping[str, str]]) -> Section:
    """Ranking with intervals, NH against cost with the points that nothing beats, and a table."""
    every = candidates_of(rows)
    ranked = every[:LISTED]
    states = [row["state"] for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    words = [f"{len(rows)} point{'s' * (len(rows) > 1)}: {counts}."]
    if not ranked:
        return Section("Sweep", words=words)
    if ranked[0]["rung"] != "1":
        words.append(f"Ranked are those of rung {ranked[0]['rung']}.")
    if len(every) > LISTED:
        words.append(f"Of {len(every)} candidates the {LISTED} with the highest NH are here; sweep.csv has all.")
    if len({row["run"] for row in rows if row["candidate"] == ranked[0]["candidate"]}) > 1:
        words.append("Rankings are of all runs; maps and scores by layer of the first one that was finished.")
    names = [f"{i + 1}: {row['candidate']}" for i, row in enumerate(ranked)]
    nh, low, high, gmac = (
        [_number(row, column) for row in ranked]
        for column in ("candidate nh", "candidate low", "candidate high", "gmac")
    )
    possible = [row.get("candidate can_be_best") != "False" for row in ranked]
    title = "Neighborhood hit with its 95 % interval; the first colour can be the best"
    if np.isnan(low).all():
        title = "Neighborhood hit; two runs of each give no interval"
    charts = [interval_chart(Series("NH", nh, low, high), names, title, marked=possible)]
    if not np.isnan(gmac).any():
        best = [not any(g <= gmac[i] and v > nh[i] for g, v in zip(gmac, nh, strict=True)) for i in range(len(nh))]
        title = "NH against cost; in the first colour those that none beats at the same cost or less"
        charts.append(scatter_chart(gmac, nh, [row["candidate"] for row in ranked], title, across="GMAC", best=best))
    accuracy = [_number(row, "accuracy") for row in ranked]
    if not np.isnan(accuracy).any():
        names = [row["candidate"] for row in ranked]
        alike = [True] * len(nh)
        charts.append(
            scatter_chart(accuracy, nh, names, "NH against accuracy", across="accuracy", best=alike, zero=False)
        )
    shown = {name: text for name, text in COLUMNS.items() if any(row.get(name) for row in ranked)}
    table = [[Cell(str(i + 1)), *(Cell(_text(row.get(name, ""))) for name in shown)] for i, row in enumerate(ranked)]
    return Section("Sweep", words, charts, [Table("Candidates, the highest NH first", ["", *shown.values()], table)])


def _number(row: Mapping[str, str], column: str) -> float:
    return float(row.get(column) or "nan")


def _text(value: str) -> str:
    try:
        return f"{float(value):.3f}"
    except ValueError:
        return {"True": "yes", "False": "no"}.get(value, value)
