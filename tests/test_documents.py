"""What README, docs and examples show: links lead somewhere, code runs as it stands, errors are as quoted."""

import importlib.util
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import qdv_gpu
from qdv_gpu import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md")])
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
SITE = {"cli.md"}  # made when the site is built


def named(pages):
    return pytest.mark.parametrize("page", pages, ids=[page.relative_to(ROOT).as_posix() for page in pages])


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors(page):
    """Of a page's headings, as forges and the site make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@named(PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', prose(page)):
        link = "".join(target)
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        file = page if not path else (page.parent / path).resolve()
        if file.name in SITE:
            continue
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def code():
    """Python of the pages, each page's blocks together, and of the notebooks' cells."""
    for page in PAGES:
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
        if blocks:
            yield page.relative_to(ROOT).as_posix(), "\n".join(blocks)
    for notebook in sorted((ROOT / "docs").glob("*.ipynb")):
        cells = json.loads(notebook.read_text())["cells"]
        yield notebook.name, "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize(("name", "text"), list(code()), ids=[name for name, _ in code()])
def test_the_code_runs(name, text, tmp_path, monkeypatch):
    assert text.count("\n") > 4
    monkeypatch.chdir(tmp_path)
    exec(compile(text, name, "exec"), {"__name__": name})


@named(EXAMPLES)
def test_the_example_runs(page, tmp_path, monkeypatch, capsys):
    if "timm" in page.name and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(page), run_name="__main__")
    assert capsys.readouterr().out.count("\n") > 1


def test_every_example_is_listed():
    shown = (ROOT / "docs" / "examples.md").read_text()
    assert all(f"(examples/{file.name})" in shown for file in (ROOT / "docs" / "examples").iterdir() if file.is_file())


def errors():
    """Commands of docs/faq.md, and the line that each ends with."""
    return re.findall(r"^```\n\$ (.*)\n(.*)\n```", (ROOT / "docs" / "faq.md").read_text(), re.M)


@pytest.mark.parametrize(("line", "message"), errors())
def test_the_error_is_the_one_that_is_quoted(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    assert cli.main() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_the_reference_has_every_public_name():
    shown = re.findall(r"^::: qdv_gpu\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(shown) == sorted(qdv_gpu.__all__)


def test_the_readme_is_short_enough_to_be_read():
    assert (ROOT / "README.md").read_text().count("\n") <= 150


def test_the_notebook_shows_what_it_printed():
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    shown = [output for cell in cells for output in cell.get("outputs", ())]
    assert not any(output["output_type"] == "error" for output in shown)
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2
