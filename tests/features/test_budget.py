"""The plan keeps to its budget, names the least that works, and changes no result beyond rounding."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qdv_gpu import Settings, analyze
from qdv_gpu.errors import InputError
from qdv_gpu.features.budget import Layer, Task, plan
from qdv_gpu.features.normalise import tile_rows
from qdv_gpu.features.pca import principal_components, workspace
from qdv_gpu.files import parse_bytes, readable
from qdv_gpu.machine import _free_in_groups

BIG, MIDDLE, SMALL = Layer("big", (800_000,)), Layer("middle", (40_000, 10_000)), Layer("small", (500,))


def task(layers=(BIG, MIDDLE, SMALL), network="net"):
    return Task(network, layers, images=1000, image_bytes=10**6, pca=50, embedding=10**7, tile=1, batch=64)


def planned(budget, layers=(BIG, MIDDLE, SMALL), **options):
    (chosen,) = plan([task(layers)], budget=budget, **options)
    return chosen


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("2 gib", 2 * 2**30), ("512M", 512 * 10**6), ("1e9", 10**9), ("1.5kB", 1500), ("7", 7)],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4XB", "0", "1..5GB", "inf"])
def test_other_sizes_are_refused(text):
    with pytest.raises(InputError, match="like 4GB"):
        parse_bytes(text)


def test_what_fits_is_held_after_one_pass():
    chosen = planned(20 * 10**9)
    assert chosen.passes == [["big", "middle", "small"]]
    assert chosen.recomputed == []
    assert set(chosen.batches.values()) == {64}
    assert {work.columns for work in chosen.workspaces.values()} == {160}


def test_what_fits_alone_gets_a_pass_of_its_own():
    layers = [Layer(name, (100_000,)) for name in "abc"]
    chosen = planned(800_000_000, layers)
    assert chosen.passes == [["a"], ["b"], ["c"]]
    assert planned(1_200_000_000, layers).passes == [["a", "b"], ["c"]]


def test_what_does_not_fit_is_recomputed():
    chosen = planned(12 * 10**8)
    assert chosen.recomputed == ["big"]
    assert chosen.passes == [["middle", "small"]]
    assert chosen.workspaces["big"].columns < 160
    assert chosen.batches["big"] * (10**6 + BIG.row) + chosen.workspaces["big"].bytes <= 12 * 10**8
    lines = list(chosen.lines("net", {"big": 3_200_000_000, "middle": 200_000_000, "small": 2_000_000}))
    assert re.match(r"net: one pass, \d+ images at a time, holds middle, small \(202 MB\)", lines[0])
    assert re.match(r"net: big \(3.2 GB\) is recomputed \d+ images at a time, with \d+ columns in its PCA", lines[1])


def test_the_least_that_works_is_named_and_works():
    small, big = task([SMALL], "small net"), task([MIDDLE, BIG], "big net")
    with pytest.raises(InputError, match="memory of 1 MB is too small for layer big of big net: at least") as error:
        plan([small, big], budget=10**6, reserved=10**8)
    number, unit = re.search(r"at least ([\d.]+) (\w+)", str(error.value)).groups()
    enough = parse_bytes(number + unit)
    assert plan([small, big], budget=enough, reserved=10**8)[1].recomputed == ["big"]
    with pytest.raises(InputError, match="too small for layer big of big net"):
        plan([small, big], budget=int(0.99 * enough), reserved=10**8)
    with pytest.raises(InputError, match="too small for layer small"):
        planned(9 * 10**6, [SMALL])


@pytest.mark.parametrize("budget", [600_000_000, 900_000_000, 2 * 10**9, 5 * 10**9, 10**10])
def test_no_step_exceeds_the_budget(budget):
    try:
        chosen = planned(budget)
    except InputError:
        assert budget < 10**9
        return
    layers = {layer.name: layer for layer in (BIG, MIDDLE, SMALL)}
    for held in chosen.passes:
        stored = 1000 * sum(layers[name].row for name in held)
        for name in held:
            forward = chosen.batches[name] * (10**6 + sum(layers[n].row for n in held))
            assert stored + max(forward, chosen.workspaces[name].bytes) <= budget
    for name in chosen.recomputed:
        assert chosen.batches[name] * (10**6 + layers[name].row) + chosen.workspaces[name].bytes <= budget


def test_a_smaller_workspace_finds_the_same_components():
    generator = torch.Generator().manual_seed(0)
    X = (
        torch.randn(300, 40, generator=generator)
        * torch.logspace(0, -2, 40)
        @ torch.randn(40, 2000, generator=generator)
    )
    smallest = workspace(300, 2000, 20, memory=0)
    assert smallest.columns == 30
    wide, narrow = principal_components([X], 20), principal_components(X.split(7), 20, workspace=smallest)
    assert narrow.passes >= wide.passes
    assert torch.allclose(narrow.variance, wide.variance, rtol=1e-4)
    assert float(narrow.variance.sum() / wide.variance.sum()) == pytest.approx(1, abs=1e-5)


def test_results_do_not_depend_on_the_budget(tmp_path, lines):
    settings = Settings(samples=300, pca=10, perplexity=10, iterations=300, seeds=2)
    whole = analyze("tiny_networks:cnn", "digits", tmp_path / "a", settings=settings, weights="none")
    tight = Settings(**{**settings.__dict__, "memory": 16_000_000})
    parts = analyze(
        "tiny_networks:cnn", "digits", tmp_path / "b", settings=tight, weights="none", store=tmp_path / "other"
    )
    assert any("images at a time" in line for line in lines())
    for one, other in zip(whole.layers, parts.layers, strict=True):
        assert one.of(5).nh_feature_space == pytest.approx(other.of(5).nh_feature_space, abs=0.005)
        assert one.of(5).nh == pytest.approx(other.of(5).nh, abs=0.05)
    with pytest.raises(InputError, match=r"memory of 1 MB is too small for layer \w+ of cnn: at least"):
        analyze("tiny_networks:cnn", "digits", tmp_path / "c", settings=Settings(**{**tight.__dict__, "memory": 10**6}),
                weights="none", store=tmp_path / "third")  # fmt: skip
    assert not (tmp_path / "c").exists()


ALONE = """
import logging
import sys
from pathlib import Path
from qdv_gpu import Settings, analyze, load_network
logging.basicConfig(level=logging.INFO, stream=sys.stdout)

def status(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

fixed = {"iterations": 250, "seeds": 1}
analyze("tiny_networks:cnn", "digits", sys.argv[1] + "/a", settings=Settings(**fixed), weights="none")
load_network("squeezenet1_1", weights="none")
before = status("VmRSS")  # Python, its libraries, and what they compile
settings = Settings(samples=430, image_size=160, layers=("layer1",), memory=int(sys.argv[2]), **fixed)
analyze("resnet18", "digits", sys.argv[1] + "/b", settings=settings, weights="none")
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
def test_a_process_stays_within_its_budget(tmp_path):
    budget = 250_000_000
    command = [sys.executable, "-c", ALONE, str(tmp_path), str(budget)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert "layer1 (176 MB) is recomputed" in done.stdout
    assert int(done.stdout.split()[-1]) <= 1.1 * budget  # a tenth for what oneDNN compiles


def test_control_groups_limit_what_is_free(tmp_path):
    process, root = tmp_path / "cgroup", tmp_path / "root"
    job = root / "memory" / "slurm" / "job"
    job.mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text("4000\n")
    (job / "memory.usage_in_bytes").write_text("3000\n")
    (job / "memory.stat").write_text("cache 900\ntotal_inactive_file 500\n")
    pod = root / "pod"
    (pod / "inner").mkdir(parents=True)
    for group, limit in ((pod, "7000"), (pod / "inner", "max")):
        (group / "memory.max").write_text(limit)
        (group / "memory.current").write_text("9000")
        (group / "memory.stat").write_text("inactive_file 100")
    process.write_text("4:cpu,cpuacct:/\n3:memory:/slurm/job\n0::/pod/inner\n")
    assert list(_free_in_groups(process, root)) == [1500, 0]
    assert list(_free_in_groups(tmp_path / "absent", root)) == []


def test_sizes_are_written():
    assert [readable(size) for size in (5, 1500, 2_450_000, 1.28e9, 3.2e13)] == [
        "5 B", "1.5 kB", "2.45 MB", "1.28 GB", "32 TB",
    ]  # fmt: skip
    assert np.isfinite(workspace(10, 10, 5).bytes)


def test_a_gpus_workspace_holds_its_larger_tile():
    task = Task("a", [Layer("x", (4096,))], 100_000, 10**6, pca=50, embedding=0, tile=1, batch=64, device="cuda")
    tile = 4 * 4096 * tile_rows(4096, "cuda")
    assert tile == 4 << 26
    assert task.work(task.layers[0]).bytes > tile + 8 * 3 * (1 << 24)  # and its copies in float64
    few = workspace(100, 4096, 50, device="cuda")
    assert few.bytes < tile  # of fewer rows than a tile has
