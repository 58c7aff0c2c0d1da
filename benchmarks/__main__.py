"""Time the stages, each validated first and beside its peers.

python -m benchmarks [--device cpu|cuda] [--stage NAME...] [--quick] [--json FILE] [--activations FILE.npz]
"""

import argparse

from benchmarks import tsne
from benchmarks.common import device_name, versions
from qdv_gpu.device import resolve_device
from qdv_gpu.files import write_json

STAGES = {"tsne": tsne.run}


def main() -> None:
    """Run the stages, print what they measure, and save it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--quick", action="store_true", help="small sizes, one repeat: a rehearsal in seconds")
    parser.add_argument("--activations", help="tsne: X [N, d] and labels [N] of a layer, to compare quality on as well")
    parser.add_argument("--json")
    options = parser.parse_args()

    options.device = resolve_device(options.device)
    report = {"device": device_name(options.device), "versions": versions(), "quick": options.quick, "stages": {}}
    print(report["device"], *(f"{name} {version}" for name, version in report["versions"].items()), sep=", ")
    for name in options.stage:
        print(f"\n{name}", flush=True)
        stage = STAGES[name](options)
        report["stages"][name] = stage
        print(f"\n{name}: bars" + " (not meant for --quick sizes)" * options.quick)
        for row in stage["bars"]:
            print(f"  {'met   ' if row['met'] else 'MISSED'} {row['what']:<70} {row['value']:.4g} {row['limit']}")
        if options.json:
            write_json(options.json, report)


if __name__ == "__main__":
    main()
