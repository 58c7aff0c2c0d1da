"""The package as a whole: its public names, and what a wheel carries."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import qdv_gpu

ROOT = Path(__file__).parents[1]


def test_public_names_are_what_they_say():
    """Also after the modules of the same stems have been imported."""
    code = (
        "import importlib, pkgutil, qdv_gpu\n"
        "for module in pkgutil.walk_packages(qdv_gpu.__path__, 'qdv_gpu.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "for name in qdv_gpu.__all__:\n"
        "    assert callable(getattr(qdv_gpu, name)), name\n"
        "    assert getattr(qdv_gpu, name).__doc__, name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_mistake_is_caught_by_a_public_name():
    with pytest.raises(qdv_gpu.InputError, match="unknown data set"):
        qdv_gpu.load_images("nowhere")


def test_nothing_but_the_package_is_importable_through_it():
    """The kernels lie beside the package; the tests, or a second copy of it, must not come along."""
    code = (
        "import importlib.util, qdv_gpu, qdv_gpu.errors, qdv_gpu.kernels\n"
        "for name in ('tests', 'benchmarks', 'qdv_gpu', 'docs', 'kernels.kernels'):\n"
        "    assert importlib.util.find_spec(f'qdv_gpu.{name}') is None, name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_wheel_carries_the_kernels(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        (about,) = (wheel.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    for path in (*ROOT.glob("kernels/*"), *ROOT.glob("qdv_gpu/**/*")):
        if path.suffix in (".py", ".cu", ".typed", ".js", ".css", ".html"):
            name = path.relative_to(ROOT)
            assert f"{'qdv_gpu/' if name.parts[0] == 'kernels' else ''}{name}" in names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
    assert "License-Expression: Apache-2.0\n" in about
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_version_is_the_same_wherever_it_stands():
    log = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert log
    assert citation
    assert {log[1], citation[1]} == {qdv_gpu.__version__.removesuffix(".dev0")}
