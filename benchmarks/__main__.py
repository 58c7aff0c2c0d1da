"""Time the stages, each validated first and beside its peers.

python -m benchmarks [--device cpu|cuda] [--stage NAME...] [--quick] [--json FILE] [--budget SECONDS]
                     [--network NAME[=CHECKPOINT]...] [--data DATA] [--images N]

FILE is written after each row. A FILE that exists keeps the stages that are not run, if it is from the same device and
versions. The exit status is 1 if a stage, or a part of one, failed.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import bits, deconv, stages, table3, tsne
from benchmarks.common import Stage, device_name, versions
from qdv_gpu.errors import InputError
from qdv_gpu.files import read_json, write_json
from qdv_gpu.machine import resolve_device

STAGES = {
    "transfer": stages.run_transfer,
    "forward": stages.run_forward,
    "layers": stages.run_layers,
    "pca": stages.run_pca,
    "affinities": stages.run_affinities,
    "bits": bits.run,
    "tsne": tsne.run,
    "neighbors": stages.run_neighbors,
    "unpool": deconv.run_unpool,
    "deconv": deconv.run_deconv,
    "table3": table3.run,
    "trace": table3.run_trace,
}


def kept(file: str | None, report: dict[str, Any]) -> dict[str, Any]:
    """The stages that a file of results already holds for this device and these versions."""
    if not file or not Path(file).is_file():
        return {}
    before = read_json(file)
    if all(before[key] == report[key] for key in ("device", "versions", "quick")):
        return before["stages"]
    print(f"{file} is of another device, of other versions or --quick: it is begun anew")
    return {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, print what they measure, and save it; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--stage", nargs="+", choices=STAGES, help="default all; trace requires CUDA")
    parser.add_argument("--quick", action="store_true", help="small sizes, one repeat: a rehearsal in seconds")
    parser.add_argument(
        "--network", nargs="+", help="all are in layers, table3 and trace, the first in every stage; default alexnet "
        "and, on CUDA, vgg19 with random weights",
    )  # fmt: skip
    parser.add_argument("--data", help="their test images, and a third set of points for tsne; default fashion-mnist")
    parser.add_argument("--images", type=int, default=10_000, help="how many of them")
    parser.add_argument("--json")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds that a stage plans with")
    options = parser.parse_args(argv)

    options.device = resolve_device(options.device)
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)
    report: dict[str, Any] = {"device": device_name(options.device), "versions": versions(), "quick": options.quick}
    report["stages"] = kept(options.json, report)
    print(report["device"], *(f"{name} {version}" for name, version in report["versions"].items()), sep=", ")
    failed = False
    for name in options.stage or [name for name in STAGES if name != "trace" or options.device.type == "cuda"]:
        print(f"\n{name}", flush=True)

        def save(record: dict[str, Any], name: str = name) -> None:
            report["stages"][name] = record
            report["stages"] = {known: report["stages"][known] for known in STAGES if known in report["stages"]}
            if options.json:
                write_json(options.json, report)

        stage = Stage(save, options.budget)
        with stage.part(name):
            STAGES[name](options, stage)
        stage.finish()
        failed |= not stage.record["complete"]
        print(f"\n{name}: bars" + " (not meant for --quick sizes)" * options.quick)
        for row in stage.record["bars"]:
            print(f"  {'met   ' if row['met'] else 'MISSED'} {row['what']:<70} {row['value']:.4g} {row['limit']}")
        for failure in stage.failures:
            print(f"  FAILED {failure}", flush=True)
    return int(failed)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except InputError as error:
        raise SystemExit(f"python -m benchmarks: {error}") from None
