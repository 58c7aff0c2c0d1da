"""What the site has beside the pages of docs/: the repository's own, files that pages link to, the command line.

Pages link to files as they lie in the repository, so that the same links work on a forge, on disk and here.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md"} | {
    name: name.lower() for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
}  # of the repository, and what they are called here
LINK = re.compile(r'(\]\(|src=")([^)"#\s]*)(?=[)"#])')


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/, and what pages link to outside of it."""
    for name, here in PAGES.items():
        files.append(File.generated(config, here, content=linked((ROOT / name).read_text(), name)))
    files.append(File.generated(config, "cli.md", content=command_line()))
    for page in list(files.documentation_pages()):
        for path in elsewhere(page):
            if files.get_file_from_path(path) is None:
                content = (ROOT / path.removeprefix("repository/")).read_bytes()
                files.append(File.generated(config, path, content=content))
    return files


def on_page_read_source(page: Any, config: Any) -> str | None:
    """A page of docs/ with its links as they are here."""
    path = Path(page.file.abs_src_path) if page.file.abs_src_path else None
    return linked(path.read_text(), path.relative_to(ROOT).as_posix()) if path else None


def linked(text: str, page: str) -> str:
    """The text of a page of the repository, with links to where things are on the site."""
    here = address(page)

    def moved(found: re.Match[str]) -> str:
        target = found[2]
        if not target or ":" in target:
            return found[0]
        wanted = os.path.normpath(os.path.join(os.path.dirname(page), target))
        return found[1] + os.path.relpath(address(wanted), os.path.dirname(here) or ".")

    return LINK.sub(moved, text)


def address(path: str) -> str:
    """Where a file of the repository is on the site."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}")


def elsewhere(page: File) -> list[str]:
    """The files outside docs/ that a page links to, as they are called on the site."""
    if page.abs_src_path:
        source = Path(page.abs_src_path)
        text = linked(source.read_text(), source.relative_to(ROOT).as_posix())
    else:
        text = page.content_string
    targets = (os.path.normpath(os.path.join(os.path.dirname(page.src_uri), link)) for _, link in LINK.findall(text))
    return [path for path in targets if path.startswith("repository/")]


def command_line() -> str:
    """Every command with its arguments and options, as the program itself knows them."""
    command = [sys.executable, "-m", "typer", "qdv_gpu.cli", "utils", "docs", "--name", "qdv-gpu"]
    made = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    made = re.sub(r"\*\*Commands\*\*:\n\n.*?(?=^## )", "", made, flags=re.M | re.S)  # a list of what follows, cut short
    made = re.sub(r"\{([^}]+?)(?:\.\.\.)?\}(\.\.\.)?(?=.*\n```)", r"\1\2", made)  # typer writes RUN... as {RUN...}...
    lines = made.partition("\n")[2].splitlines()
    return "\n".join(["# The command line", *(as_text(line) if line.startswith("* ") else line for line in lines)])


def as_text(line: str) -> str:
    """An item of a list whose brackets are no links."""
    name, mark, rest = line.partition("`: ")
    return name + mark + rest.replace("[", "\\[").replace("*", "\\*")
