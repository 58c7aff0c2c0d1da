"""Every command that README and tour show runs, in their order, on small networks and few images."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from qdv_gpu import cli

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/tour.md")
CNN, OTHER = "tiny_networks:cnn", "tiny_networks:other"
FEW = {"--samples": "60", "--pca": "5", "--perplexity": "5", "--iterations": "20", "--seeds": "2"}
LITTLE = {"--samples": "60", "--epochs": "1", "--batch-size": "20"}
ADDED = {"analyze": FEW, "compare": FEW, "finetune": LITTLE}
STANDS_FOR = {
    "A": CNN, "B": OTHER, "NETWORK": CNN, "DATA": "digits",
    **{f"A{seed}": f"tiny_networks:seeded(seed={seed})" for seed in (1, 2, 3)},
    **{f"B{seed}": f"tiny_networks:seeded(seed={seed}, kernel=5)" for seed in (1, 2, 3)},
    "CIFAR": "digits", "alexnet": CNN, "benchmarks.networks:vgg11": OTHER,
    "benchmarks.networks:efficientnet_lite0": OTHER, "docs/tour.toml": "SWEEP.toml",
}  # fmt: skip
SWEEP = """
[run]
data = "digits"
weights = "none"
analyze.samples = 60
finetune.samples = 40
epochs = 1
perplexity = 5
iterations = 20
seeds = 1
[grid]
network = ["tiny_networks:cnn", "tiny_networks:other"]
"""


def commands():
    """All lines of code that begin with `qdv-gpu`, once each."""
    for page in PAGES:
        for block in re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S):
            yield from (line for line in block.splitlines() if line.removeprefix("$ ").startswith("qdv-gpu "))


def small(line, here):
    """The arguments of a command, of small things."""
    words = shlex.split(line.removeprefix("$ "), comments=True)[1:]
    found = []
    for word in words:
        name, mark, rest = word.partition("=")
        parts = [STANDS_FOR.get(part, part) for part in word.split(",")]
        found.append(f"{STANDS_FOR[name]}{mark}{rest}" if mark and name in STANDS_FOR else ",".join(parts))
    added = ADDED.get(words[0], {})
    if "..." in found:
        found[found.index("...") :] = found[found.index("...") + 1 :]
        added = {**added, **({} if "--data" in found else {"--data": "digits", "--out": "runs/several"})}
    if not all(word.startswith("runs/") for word in found[1:3]):
        for option, value in added.items():
            if option in found:
                found[found.index(option) + 1] = value
            else:
                found += [option, value]
    if "--index" in found:
        found[found.index("--index") + 1] = "5"
    if "--image-size" in found:
        found[found.index("--image-size") + 1] = "8"
    if "POINT" in found:
        found[found.index("POINT")] = next((here / "runs" / "swept" / "points").iterdir()).name
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with what the commands find there."""
    folder = tmp_path_factory.mktemp("shown")
    (folder / "SWEEP.toml").write_text(SWEEP)
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setenv("PYTHONPATH", str(ROOT / "tests"))  # for the processes of a sweep
    for network, name in ((CNN, "a"), (OTHER, "b")):
        quick = [word for pair in FEW.items() for word in pair]
        patch.setattr(sys, "argv", ["qdv-gpu", "analyze", network, "--data", "digits", "--out", f"runs/{name}", *quick])
        assert cli.main() == 0
    yield folder
    patch.undo()


@pytest.mark.parametrize("line", list(dict.fromkeys(commands())))
def test_the_command_runs(line, here, monkeypatch, capsys):
    arguments = small(line, here)
    monkeypatch.setattr(sys, "argv", ["qdv-gpu", *arguments])
    assert cli.main() == 0, capsys.readouterr().err
