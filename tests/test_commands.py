"""Every command that README and docs show runs, in their order, on small networks and few images."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_networks
import torch
from PIL import Image
from safetensors.torch import save_file

from qdv_gpu import cli

ROOT = Path(__file__).parents[1]
FIRST = ("docs/numbers.md", "docs/tour.md", "docs/howto/networks.md")  # make what the others show
PAGES = [*(ROOT / page for page in FIRST), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("*.md"))]
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
    "benchmarks/first_layer.toml": "SWEEP.toml", "docs/examples/sweep.toml": "SWEEP.toml", "vgg19": OTHER,
    "cifar10": "digits", "resnet18": CNN,
}  # fmt: skip
ERRORS = ROOT / "docs" / "faq.md"  # whose commands fail: tests/test_documents.py
NETWORKS = ROOT / "docs" / "howto" / "networks.md"
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
    """All lines of code that begin with `qdv-gpu`, without their comments, once each."""
    found = {}
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S):
            for line in block.splitlines() if not language and page != ERRORS else ():
                if line.removeprefix("$ ").startswith("qdv-gpu "):
                    found[line.removeprefix("$ ").partition(" #")[0].strip()] = page
    return list(found)


def small(line, here):
    """The arguments of a command, of small things."""
    words = shlex.split(line)[1:]
    found = []
    for word in words:
        parts = [part if part in ",=" else STANDS_FOR.get(part, part) for part in re.split("([,=])", word)]
        found.append("".join(parts))
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
    if "--slurm" in found and "--dry-run" not in found:  # on a Slurm it is run by tests/studies/test_clusters.py
        found = found[: found.index("--slurm")]
    if "--index" in found:
        found[found.index("--index") + 1] = "5"
    if "--image-size" in found:
        found[found.index("--image-size") + 1] = "8"
    if "POINT" in found:
        found[found.index("POINT")] = next((here / "runs" / "swept" / "points").iterdir()).name
    return found


def write_checkpoints(folder):
    """Weights of the networks that the pages give checkpoints of."""
    mine = runpy.run_path(str(folder / "mine.py"))
    save_file(mine["small"]().state_dict(), folder / "weights3.safetensors")
    torch.save(mine["small"](5).state_dict(), folder / "weights5.pt")
    for number, name in enumerate(("first.ckpt", "best.ckpt")):
        torch.manual_seed(number)
        torch.save({"state_dict": tiny_networks.cnn().state_dict()}, folder / name)


def write_photos(folder):
    """`photos/<class>/*` and a table of them, `photos.csv`."""
    lines = ["file,label,split"]
    random = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / "photos" / label).mkdir(parents=True)
        for number in range(30):
            file = folder / "photos" / label / f"{number}.png"
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
            lines.append(f"photos/{label}/{number}.png,{label},val")
    (folder / "photos.csv").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with what the commands find there."""
    folder = tmp_path_factory.mktemp("shown")
    (folder / "SWEEP.toml").write_text(SWEEP)
    (folder / "slurm.toml").write_text("time = 5")
    (folder / "mine.py").write_text(re.findall(r"^```python\n(.*?)^```", NETWORKS.read_text(), re.M | re.S)[1])
    write_checkpoints(folder)
    write_photos(folder)
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setenv("PYTHONPATH", str(ROOT / "tests"))  # for the processes of a sweep
    for network, name in ((CNN, "a"), (OTHER, "b")):
        quick = [word for pair in FEW.items() for word in pair]
        patch.setattr(sys, "argv", ["qdv-gpu", "analyze", network, "--data", "digits", "--out", f"runs/{name}", *quick])
        assert cli.main() == 0
    yield folder
    patch.undo()


@pytest.mark.parametrize("line", commands())
def test_the_command_runs(line, here, monkeypatch, capsys):
    arguments = small(line, here)
    monkeypatch.setattr(sys, "argv", ["qdv-gpu", *arguments])
    assert cli.main() == 0, capsys.readouterr().err
