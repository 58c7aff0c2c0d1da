"""The package as a whole: its public names, and what a wheel carries."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_public_names_are_what_they_say():
    """Also after the modules of the same stems have been imported."""
    code = (
        "import importlib, pathlib, qdv_gpu\n"
        "for file in pathlib.Path(qdv_gpu.__file__).parent.glob('[a-z]*.py'):\n"
        "    importlib.import_module(f'qdv_gpu.{file.stem}')\n"
        "for name in qdv_gpu.__all__:\n"
        "    assert callable(getattr(qdv_gpu, name)), name\n"
        "    assert getattr(qdv_gpu, name).__doc__, name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_wheel_carries_the_kernels(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    for folder, package in (("kernels", "qdv_gpu/kernels"), ("qdv_gpu", "qdv_gpu")):
        for path in (ROOT / folder).iterdir():
            if path.suffix in (".py", ".cu", ".typed"):
                assert f"{package}/{path.name}" in names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


def test_gpu_check_names_its_stages_and_reports_each(tmp_path):
    script = ROOT / "benchmarks" / "gpu_check.sh"
    wrong = subprocess.run(["bash", script, "nonsense"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "allowed are install doctor tests memcheck" in wrong.stderr
    python = tmp_path / "python"  # every stage fails, and the reports are still written
    python.write_text(f'#!/bin/sh\n[ "$1" = - ] && exec {sys.executable} "$@"\nexit 3\n')
    python.chmod(0o755)
    command = ["bash", script, "--out", tmp_path / "out", "--python", python, "install", "doctor"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert json.loads((tmp_path / "out" / "verdict.json").read_text())["stages"] == {
        "install": "failed",
        "doctor": "failed",
    }
