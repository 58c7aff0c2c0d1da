"""Does qdv_gpu work on this machine's GPU, and how fast? For any CUDA machine, with or without internet.

benchmarks/gpu_check.sh [--out DIR] [--seconds S] [--python PYTHON] [--device cuda|cpu] [--quick] [STAGE...]

Stages in their order, all of them if none is named:
    STAGES
A stage gets 8 minutes at most, and less if the S seconds of all are over sooner; what does not fit is "not run". DIR
holds summary.md (every bar, its value and limit, met, MISSED or not measured, and why), verdict.json (the same), both
written after each stage, benchmarks.json (written after each row) and check.log. A later run on the same device with
the same versions keeps what other stages have left there. The exit status is 0 if every stage that ran is ok and no bar
is missed. With --device cpu or --quick the numbers judge nothing: a rehearsal.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bars

LIMIT = 480  # seconds of a stage at most
SHORTER = {"install": 60, "doctor": 90, "tests": 240, "memcheck": 150, "racecheck": 150}  # so that others have time
MARGIN = 20  # seconds that a stage does not plan with: its start, and the last row
GRACE = 1  # seconds that are too few to start a stage
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
BENCHMARKS = ("bits", "tsne", "unpool", "deconv", "table3")  # these have bars for a GPU
MORE = ("transfer", "forward", "layers", "pca", "affinities", "neighbors", "trace")
STAGES = ("install", "doctor", "tests", *SANITIZERS[:2], *BENCHMARKS, *MORE, *SANITIZERS[2:])
ROOT = Path(__file__).parent.parent
# Kernel tests that a sanitizer, which slows them down a hundredfold, gets through in a minute.
KERNEL_TESTS = ["tests/test_kernels.py", "tests/deconv/test_unpool.py", "tests/test_neighbors.py"]
KERNEL_TESTS += ["tests/scores/test_quality.py", "tests/tsne/test_objective.py", "tests/tsne/test_fft_cuda.py"]
KERNEL_TESTS += ["-m", "gpu", "-q", "-x", "-k", "autograd and (31 or batch) or bits_of_the_cpu or ranks_with_ties"]
KERNEL_TESTS[-1] += " or distances_have_the_same_bits or what_the_loops_do or charges_are or turns_are or who_leaves"
ABOUT = (
    "import json, sys; from benchmarks.common import device_name, versions; "
    "from qdv_gpu.machine import resolve_device; "
    "print(json.dumps({'device': device_name(resolve_device(sys.argv[1])), 'versions': versions()}))"
)


def write(path: Path, text: str) -> None:
    """Replace a file by another at once."""
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.chmod(name, 0o644)
    os.replace(name, path)


def read(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if it is absent."""
    return json.loads(path.read_text()) if path.is_file() else {}


def forget(path: Path, stage: str) -> None:
    """Take what an earlier run measured in a stage out of a file of results: the stage may not come so far again."""
    measured = read(path)
    if measured.get("stages", {}).pop(stage, None):
        write(path, json.dumps(measured, indent=2) + "\n")


def about(options: argparse.Namespace) -> dict[str, Any]:
    """The device's name and the versions of the packages, or why there is none."""
    command = [options.python, "-c", ABOUT, options.device]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = (ran.stdout if ran.returncode == 0 else ran.stderr).strip().splitlines()
    found = json.loads(lines[-1]) if ran.returncode == 0 else {"device": f"no {options.device} device", "versions": {}}
    if ran.returncode:
        found["why"] = lines[-1] if lines else f"{options.python} ended with {ran.returncode}"
    return found | {"quick": options.quick, "rehearsal": options.quick or options.device == "cpu"}


def command(stage: str, options: argparse.Namespace, seconds: float) -> list[str]:
    """What a stage runs."""
    if stage == "install":
        return [options.python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "."]
    if stage == "doctor":
        code = "from qdv_gpu.cli import main; main()"
        return [options.python, "-c", code, "doctor", "--device", options.device]
    if stage == "tests":
        return [options.python, "-m", "pytest", "-m", "gpu", "-q"]
    if stage in SANITIZERS:
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        own = [tool, "--tool", stage, "--error-exitcode", "1", "--print-limit", "20"]
        return [*own, options.python, "-m", "pytest", *KERNEL_TESTS]
    own = ["--device", options.device, "--stage", stage, "--json", str(options.out / "benchmarks.json")]
    budget = f"{max(0, seconds - MARGIN):.0f}"
    return [options.python, "-m", "benchmarks", *own, "--budget", budget, *["--quick"] * options.quick]


def run(stage: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run a stage for so many seconds at most; its output goes to the log, and what it comes to is returned."""
    own, started = command(stage, options, seconds), time.monotonic()
    if stage in SANITIZERS and not Path(own[0]).is_file():
        return {"result": "skipped", "seconds": 0, "why": "compute-sanitizer is not installed"}
    log = options.out / "check.log"
    with log.open("a") as file:
        file.write(f"\n== {stage}, {seconds:.0f} s at most\n")
        file.flush()
        begin = file.tell()
        # A sanitizer sees only what torch asks of the driver, so that torch may keep no blocks of its own.
        more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if stage in SANITIZERS else {}
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | more
        try:
            process = subprocess.Popen(own, cwd=ROOT, stdout=file, stderr=file, env=environment, process_group=0)
        except OSError as error:
            return {"result": "failed", "seconds": 0, "why": str(error)}
        try:
            status = process.wait(seconds)
            result = "ok" if status == 0 else "failed"
        except subprocess.TimeoutExpired:
            status, result = 0, "timed out"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    with log.open(errors="replace") as file:
        file.seek(begin)
        text = file.read()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    entry: dict[str, Any] = {"result": result, "seconds": round(time.monotonic() - started, 1)}
    if result == "timed out":
        entry["why"] = f"stopped after {seconds:.0f} s"
    elif status < 0:
        entry["why"] = f"killed by signal {-status}"
    elif result == "failed":
        failed = [line for line in lines if line.startswith("FAILED")] or lines[-1:]
        entry["why"] = "; ".join(failed[:3]) or f"ended with {status}"
    return entry | {"bars": [*counted(stage, text, complete=result == "ok")]}


def counted(stage: str, text: str, *, complete: bool) -> Iterator[dict[str, Any]]:
    """The bar of the tests or of a sanitizer, from its output; no errors mean nothing unless it came to its end."""
    if stage == "tests":
        ends = re.findall(r"(\d+) (failed|passed|errors?)\b", text)
        bad = sum(int(count) for count, kind in ends if kind != "passed")
        if bad or (complete and any(kind == "passed" for _, kind in ends)):
            yield bars.bar(bars.TESTS, bad)
    elif stage in SANITIZERS:
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
        bad = sum(map(int, found))
        if bad or (complete and found):
            yield bars.bar(bars.sanitized(stage), bad)


def table(verdict: dict[str, Any], measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar for a GPU, then the others that were measured: value, limit, verdict and why."""
    found = {one["what"]: one for entry in verdict["stages"].values() for one in entry.get("bars", ())}
    places = {one["what"]: name for name, record in measured.items() for one in record["bars"]}
    found |= {one["what"]: one for record in measured.values() for one in record["bars"]}
    rows = []
    for bar in bars.BARS:
        one = found.pop(bar.what, None)
        if one:
            rows.append(judged(one, bar.stage, verdict))
        else:
            row = {"bar": bar.what, "stage": bar.stage, "value": None, "limit": f"{bar.sign} {bar.limit:g}"}
            rows.append(row | {"verdict": "not measured", "why": missing(bar, verdict, measured.get(bar.stage))})
    return rows + [judged(one, places.get(what, ""), verdict) for what, one in found.items()]


def judged(one: dict[str, Any], stage: str, verdict: dict[str, Any]) -> dict[str, Any]:
    """A row of the table for a bar that was measured."""
    said = "rehearsed" if verdict["rehearsal"] else "met" if one["met"] else "MISSED"
    return {
        "bar": one["what"],
        "stage": stage,
        "value": one["value"],
        "limit": one["limit"],
        "verdict": said,
        "why": "",
    }


def missing(bar: bars.Bar, verdict: dict[str, Any], record: dict[str, Any] | None) -> str:
    """Why a bar was not measured."""
    entry = verdict["stages"].get(bar.stage)
    if entry is None or entry["result"] == "not run":
        return entry["why"] if entry else f"stage {bar.stage} was not run"
    if entry["result"] == "skipped":
        return entry["why"]
    if bar.needs and not any(name.startswith(bar.needs) for name in verdict["versions"]):
        return f"{bar.needs} is not installed"
    if entry["result"] != "ok":
        return f"stage {bar.stage} {entry['result']}: {entry['why']}"
    if record and record.get("left_out"):
        return f"no time for {'; '.join(record['left_out'])}"
    return "measured on a GPU only" if verdict["rehearsal"] else f"stage {bar.stage} did not measure it"


def markdown(verdict: dict[str, Any], measured: dict[str, Any]) -> str:
    """The summary."""
    packages = ", ".join(f"{name} {version}" for name, version in verdict["versions"].items())
    if verdict["rehearsal"]:
        meant = "A rehearsal: the numbers judge nothing."
    elif any(name in verdict["device"] for name in bars.DEVICES):
        meant = f"The bars are meant for this device ({' or '.join(bars.DEVICES)})."
    else:
        meant = f"The bars are meant for an {' or '.join(bars.DEVICES)}, which this is not."
    lines = [f"# GPU check: {verdict['device']}", "", verdict.get("why", packages), "", meant, ""]
    lines += ["| bar | value | limit | verdict |", "| --- | --- | --- | --- |"]
    for row in verdict["bars"]:
        value = "" if row["value"] is None else f"{row['value']:.4g}"
        said = row["verdict"] + (f": {row['why']}" if row["why"] else "")
        lines.append(f"| {row['bar']} | {value} | {row['limit']} | {said.replace('|', '/')} |")
    lines += ["", "| stage | result | seconds | |", "| --- | --- | --- | --- |"]
    for name, entry in verdict["stages"].items():
        without = [*measured.get(name, {}).get("left_out", [])]
        why = "; ".join([entry.get("why", ""), *(f"left out: {what}" for what in without)]).strip("; ")
        lines.append(f"| {name} | {entry['result']} | {entry['seconds']} | {why.replace('|', '/')} |")
    counts = [sum(row["verdict"] == kind for row in verdict["bars"]) for kind in ("met", "MISSED", "not measured")]
    failed = [name for name, entry in verdict["stages"].items() if entry["result"] in ("failed", "timed out")]
    lines += ["", f"{counts[0]} bars met, {counts[1]} missed, {counts[2]} not measured; stages that failed: "]
    lines[-1] += ", ".join(failed) or "none"
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and sum up after each; returns the exit status."""
    text = (__doc__ or "").replace("STAGES", " ".join(STAGES))
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_check.sh", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all stages")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]}: allowed are {' '.join(STAGES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.absolute()
    ends, chosen = time.monotonic() + options.seconds, options.stages or STAGES
    verdict = about(options)
    before = read(options.out / "verdict.json")
    same = all(before.get(key) == verdict[key] for key in ("device", "versions", "rehearsal"))
    entries: dict[str, Any] = before["stages"] if same else {}
    for stage in chosen:
        left = min(SHORTER.get(stage, LIMIT), ends - time.monotonic())
        if stage in (*BENCHMARKS, *MORE):
            forget(options.out / "benchmarks.json", stage)
        if left < GRACE:
            entries[stage] = {"result": "not run", "seconds": 0, "why": f"the {options.seconds:g} s were over"}
        else:
            entries[stage] = run(stage, options, left)
        if stage == "install":
            verdict = about(options)
        entry = entries[stage]
        print(f"{stage:<12}{entry['result']:<10}{entry['seconds']:>7} s  {entry.get('why', '')}", flush=True)
        verdict["stages"] = {name: entries[name] for name in STAGES if name in entries}
        measured = read(options.out / "benchmarks.json")
        fits = all(measured.get(key) == verdict[key] for key in ("device", "versions", "quick"))
        records = measured["stages"] if fits else {}
        verdict["bars"] = table(verdict, records)
        bad = any(entry["result"] in ("failed", "timed out") for entry in entries.values())
        verdict["ok"] = not bad and not any(row["verdict"] == "MISSED" for row in verdict["bars"])
        summary = markdown(verdict, records)
        write(options.out / "verdict.json", json.dumps(verdict, indent=1) + "\n")
        write(options.out / "summary.md", summary)
    print(f"\n{summary}\n{'ok' if verdict['ok'] else 'NOT OK'}: {options.out / 'summary.md'}")
    return int(not verdict["ok"])


if __name__ == "__main__":
    raise SystemExit(main())
