"""Data flows one way: no module imports from a package further down this list, not even inside a function."""

import ast
from pathlib import Path

import qdv_gpu

ORDER = [
    "errors", "progress", "files", "sealed", "machine", "arrays", "kernels", "data", "networks", "features",
    "inverted", "neighbors", "tsne", "scores", "deconv", "results", "report", "studies", "doctor", "terminal",
    "options", "app", "cli_report", "cli_sweep", "cli", "__main__",
]  # fmt: skip
ROOT = Path(qdv_gpu.__file__).parent


def imported(file):
    """Names below qdv_gpu that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("qdv_gpu."))
        elif isinstance(node, ast.ImportFrom) and node.module == "qdv_gpu":
            yield from (f"qdv_gpu.{alias.name}" for alias in node.names if alias.name in ORDER)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qdv_gpu."):
            yield str(node.module)


def test_no_import_goes_upward():
    found = 0
    for file in ROOT.rglob("*.py"):
        own = file.relative_to(ROOT).with_suffix("").parts[0]
        if own == "__init__":
            continue  # the public names
        for name in imported(file):
            found += 1
            assert ORDER.index(name.split(".")[1]) <= ORDER.index(own), f"{file} imports {name}"
    assert found > 100
