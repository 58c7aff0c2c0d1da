"""The README's table of measurements, from benchmarks/results/*.json.

python -m benchmarks.readme    writes it into README.md
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks -->\n", "<!-- end of benchmarks -->\n"


def tables() -> str:
    """One table for each device that was measured."""
    reports = [json.loads(file.read_text()) for file in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    return "\n".join(table(report) for report in reports if isinstance(report, dict) and "stages" in report)


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


def updated(readme: str) -> str:
    """The README with the tables of now."""
    before, _, rest = readme.partition(BEGIN)
    return before + BEGIN + tables() + END + rest.partition(END)[2]


if __name__ == "__main__":
    file = ROOT / "README.md"
    file.write_text(updated(file.read_text()))
