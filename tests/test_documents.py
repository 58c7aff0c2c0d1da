"""What the README and the notebook show, runs as it stands."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks():
    """Python code of the documents: the README's blocks together, and the notebook's cells."""
    readme = (ROOT / "README.md").read_text()
    yield "README", "\n".join(re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S))
    for notebook in sorted((ROOT / "docs").glob("*.ipynb")):
        cells = json.loads(notebook.read_text())["cells"]
        yield notebook.name, "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize(("name", "code"), list(blocks()), ids=[name for name, _ in blocks()])
def test_the_code_runs(name, code, tmp_path, monkeypatch):
    assert code.count("\n") > 5
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, "exec"), {})


def test_the_notebook_shows_what_it_printed():
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    shown = [output for cell in cells for output in cell.get("outputs", ())]
    assert not any(output["output_type"] == "error" for output in shown)
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2
