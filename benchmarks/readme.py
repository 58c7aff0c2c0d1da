"""The tables of measurements in docs/numbers.md, and a few of their rows in the README, from benchmarks/results/*.json.

python -m benchmarks.readme    writes them
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {"docs/numbers.md": "benchmarks", "README.md": "some benchmarks"}
QUOTED = (
    "5 layers of",
    "t-SNE, Fashion-MNIST, 10,000 points",
    "Deconvnet, 256 maps",
    "Table 3 of",
)  # as rows begin


def tables() -> str:
    """One table for each device and versions that were measured, of one file or more."""
    reports = [json.loads(file.read_text()) for file in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    found: dict[str, list[str]] = {}
    for report in reports:
        if isinstance(report, dict) and "stages" in report:
            head, *rows = table(report).splitlines()
            found[head] = [*found.get(head, rows[:3]), *rows[3:]]
    return "\n".join("\n".join([head, *rows, ""]) for head, rows in found.items())


def table(report: dict[str, Any]) -> str:
    """Median seconds of each stage (least-most), of its peers, and how many times as long these take."""
    versions = ", ".join(
        f"{name} {report['versions'][name]}" for name in ("torch", "numba") if name in report["versions"]
    )
    lines = [
        f"**{report['device']}** ({versions}):",
        "",
        "| work | seconds (least-most) | peers |",
        "| --- | --- | --- |",
    ]
    for stage in report["stages"].values():
        for row in stage.get("timings", []):
            peers = [f"{name} {seconds(spent)} ({spent / row['seconds']:.1f}x)" for name, spent in row["peers"].items()]
            if row["parts"]:
                peers.append("of which " + ", ".join(f"{name} {seconds(s)}" for name, s in row["parts"].items()))
            spread = "-".join(map(seconds, row["spread"]))
            lines.append(f"| {row['work']} | {seconds(row['seconds'])} ({spread}) | {', '.join(peers)} |")
    return "\n".join([*lines, ""])


def seconds(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def some(tables: str) -> str:
    """The heads of the tables, and of their rows those that the README quotes."""
    return "".join(
        line
        for line in tables.splitlines(keepends=True)
        if not line.startswith("| ") or line.startswith(("| work", "| ---", *(f"| {work}" for work in QUOTED)))
    )


def updated(page: str) -> str:
    """A page with the tables of now."""
    name = PAGES[page]
    before, begin, rest = (ROOT / page).read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->\n")
    return before + begin + (some(tables()) if name.startswith("some") else tables()) + end + after


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(updated(page))
