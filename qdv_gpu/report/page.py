"""One HTML page out of a template, a style sheet and scripts: nothing is fetched when it is opened."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

import qdv_gpu

ASSETS = files("qdv_gpu") / "report" / "assets"
SCRIPTS = ("data", "geometry", "choice", "paint", "panel", "thumbnails", "main")  # each uses those before it
CITATION = (
    "Wang & Liu, Refining Deep Neural Networks via Interpretability Using Transfer Learning, CIKM 2024; "
    "t-SNE: van der Maaten & Hinton 2008; neighborhood hit: Paulovich et al. 2008; Deconvnet: Zeiler & Fergus 2014."
)


@dataclass(frozen=True)
class Cell:
    """A cell of a table; `colour` and `ink` are of its background and text."""

    text: str
    colour: str | None = None
    ink: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells, each with its name first.

    `kind` is "heat" for cells with colours, "words", "layers" for the names of network and layer first.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    kind: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture that grows on a click; `source` is a data URL."""

    title: str
    source: str


@dataclass(frozen=True)
class Section:
    """A part of the page: words, charts, tables, pictures, and named facts."""

    title: str
    words: Sequence[str] = ()
    charts: Sequence[Markup] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    facts: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class PanelTitle:
    """What stands above a map, its network where there are several, and what a screen reader says of it.

    `first` begins a new row.
    """

    network: str
    layer: str
    score: str
    label: str
    first: bool = False


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes
    ----------
    title : str
    summary : sequence of str
        Paragraphs.
    panels : sequence of PanelTitle
        Of the maps that `data` has, in order.
    data : str
        Of `Packed`; empty if there are no maps.
    labelled : bool
        Whether the images have labels.
    turns : int
        Maps of each panel at most.
    note : str
        Below the maps.
    sections : sequence of Section
    command : str
        That made it.
    """

    title: str
    summary: Sequence[str] = ()
    panels: Sequence[PanelTitle] = ()
    data: str = ""
    labelled: bool = True
    turns: int = 1
    note: str = ""
    sections: Sequence[Section] = field(default_factory=list)
    command: str = ""
    version: str = qdv_gpu.__version__
    citation: str = CITATION

    def html(self) -> str:
        """The page, in which every text is shown as it is."""
        text = _template().render(
            page=self, style=Markup(_asset("style.css")), script=Markup(_script()), policy=_policy()
        )
        return re.sub("[\ud800-\udfff]", _escaped, text)


@lru_cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    return environment.from_string(_asset("page.html"))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@lru_cache
def _policy() -> str:
    """What a browser may do for the page: run this script and no other, and fetch nothing."""
    script = base64.b64encode(sha256(_script().encode()).digest()).decode()
    return f"default-src 'none'; script-src 'sha256-{script}'; style-src 'unsafe-inline'; img-src data: blob:"


def _escaped(half: re.Match[str]) -> str:
    r"""A letter that UTF-8 lacks, which stands for a byte of a file's name, as "\xNN"."""
    code = ord(half[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


@lru_cache
def _script() -> str:
    """All scripts as one module: without imports and exports, since a file may not import others."""
    text = "\n".join(_asset(f"{name}.js") for name in SCRIPTS)
    text = re.sub(r"^import .*;\n", "", text, flags=re.M)
    return re.sub(r"^export ", "", text, flags=re.M)
