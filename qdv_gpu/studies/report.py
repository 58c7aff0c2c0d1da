"""One page of what runs found: maps that are linked, charts, tables, pictures, and words, in a file of its own."""

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qdv_gpu.data.images import Images
from qdv_gpu.errors import InputError, as_path, check_count, listed
from qdv_gpu.files import explained, remove_leftovers, text_of, write_text
from qdv_gpu.machine import command_line
from qdv_gpu.report.folder import RunFolder
from qdv_gpu.report.linked import linked, panel_titles
from qdv_gpu.report.page import Page, Picture, Section
from qdv_gpu.report.sections import (
    about_section,
    classes_section,
    comparison_section,
    said_of,
    scores_section,
    seeds_of,
    training_section,
)
from qdv_gpu.report.swept import candidates_of, sweep_section
from qdv_gpu.report.thumbnails import decoded, encoded, sheets_of, small
from qdv_gpu.results.checks import check_thumbnails
from qdv_gpu.results.run import checked, damage_said, read_about, rows_of
from qdv_gpu.results.stages import thumbnails_key
from qdv_gpu.results.store import DAMAGES, Store
from qdv_gpu.results.view import RunView, thumbnails_of, view_run
from qdv_gpu.sealed import read_sealed

logger = logging.getLogger(__name__)
REPORT = "report.html"
THUMBNAILS = 10_000  # pictures in a page by default
PICTURE = 105  # bytes of one of so many at most
LARGE = 1600  # pixels of a Deconvnet picture's side at most


def write_report(
    runs: str | Path | Sequence[str | Path], out: str | Path | None = None, *, thumbnails: int | None = THUMBNAILS
) -> Path:
    """Write a page about runs, which opens from disk and needs nothing else.

    Parameters
    ----------
    runs : str or Path, or sequence of them
        Folders of `analyze`, of the same images, whose maps are linked; of `compare`, `sweep`, `picture` (the
        command deconv) and `finetune`.
    out : str or Path, optional
        The file; default report.html in the first folder.
    thumbnails : int or None
        Pictures at most; of more images evenly spread ones. None for no pictures.

    Returns
    -------
    Path

    Raises
    ------
    InputError
        If a folder is of none of these, or damaged; if the runs are of other images.

    Examples
    --------
    >>> from qdv_gpu import analyze
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> result = analyze(network, "digits", tmp_path / "run", layers="2", samples=100, perplexity=8, seeds=1)
    >>> write_report(result.out).name
    'report.html'
    """
    several = [runs] if isinstance(runs, str | Path) else listed("runs", runs, what="run folders")
    folders = [as_path("run", one) for one in several]
    if not folders:
        raise InputError("at least one run folder is required")
    if thumbnails is not None:
        check_count("thumbnails", thumbnails)
    target = folders[0] / REPORT if out is None else as_path("out", out)
    if target.is_dir():
        target = target / REPORT
    _check_replaceable(target)
    page = _page(list(dict.fromkeys(folders)), thumbnails)
    with damage_said(*folders):  # as of names that are none
        text = page.html()
    with explained(target):
        write_text(target, text)
    remove_leftovers(target.parent, below=False)
    return target


def _check_replaceable(target: Path) -> None:
    """InputError if there is a file that is no page, as a run's record."""
    if target.is_file():
        with suppress(OSError), target.open("rb") as file:
            if file.read(9).lower() not in (b"", b"<!doctype"):
                raise InputError(f"{target} is there and is no page: choose another --out")


def keep_thumbnails(folder: RunFolder, images: Images, store: Store) -> str:
    """Write small pictures of images to a run folder, made once for a store; returns their stage's digest."""
    key = thumbnails_key(images)
    record = store.read(key, check_thumbnails)
    if record is None:
        sheets = encoded(sheets_of(small(images)))
        arrays = {f"{number:03}": np.frombuffer(sheet, np.uint8) for number, sheet in enumerate(sheets)}
        store.write(key, arrays=arrays)
    else:
        arrays = record.arrays
    for name, sheet in arrays.items():
        folder.bytes(f"thumbnails/{name}.webp", sheet.tobytes())
    return key.digest


def _page(folders: Sequence[Path], thumbnails: int | None) -> Page:
    views, sections = list[RunView](), list[Section]()
    summary, sheets = list[str](), list[Path]()
    trainings: dict[str, Mapping[str, Any]] = {}
    k = next((_of_json(f / "comparison.json").get("k") for f in folders if (f / "comparison.json").is_file()), None)
    for folder in folders:
        known = len(views) + len(sections) + len(trainings)
        with damage_said(folder):
            if (folder / "sweep.csv").is_file():
                about = read_about(folder)
                rows = _rows(checked(folder, about, "sweep.csv"))
                views += _best(folder, rows)
                sections.append(sweep_section(rows))
                summary += _paragraphs(checked(folder, about, "ranking.md"), 2)
                sheets = sheets or thumbnails_of(folder, about)
            elif (folder / "table3.csv").is_file():
                views.append(view_run(folder, k=views[0].k if views else k))
            if (folder / "comparison.json").is_file():
                compared = _of_json(folder / "comparison.json")
                sections.append(comparison_section(compared))
                own = compared.get("summary")
                summary += _paragraphs(folder / "comparison.md", 1) if own is None else [str(own)]
            if (folder / "finetune.json").is_file():
                name = str(folder) if folder.name in trainings else folder.name
                training_section(own := {name: _of_json(folder / "finetune.json")})
                trainings |= own
            sections += _deconvnet(folder)
        if known == len(views) + len(sections) + len(trainings):
            raise InputError(f"{folder} holds no finished run of qdv-gpu analyze, compare, sweep, deconv or finetune")
    with damage_said(*(view.folder for view in views)):
        _check_same(views)
        trainings = {**_trainings(views), **trainings}
        return _filled(folders, views, sections, summary, sheets, trainings, thumbnails)


def _filled(  # noqa: PLR0917 - what was found
    folders: Sequence[Path], views: Sequence[RunView], sections: Sequence[Section], summary: list[str],
    sheets: Sequence[Path], trainings: Mapping[str, Mapping[str, Any]], thumbnails: int | None,
) -> Page:  # fmt: skip
    """The page of what folders hold."""
    summary = summary or (said_of(views) if views else [])
    data, turns, note = "", 1, ""
    if views:
        own = sheets or next((view.thumbnails for view in views if view.thumbnails), [])
        data, turns = linked(views, _thumbnails(own, len(views[0].files), thumbnails))
        maps = max(len(layer.Z) for view in views for layer in view.layers)
        notes = []
        if turns < maps:
            few = "as many of all, and few enough that the file stays small"
            notes.append(f"{turns} of {seeds_of(views)} maps of each layer are here: {few}.")
        if thumbnails is not None and not own:
            notes.append("There are no pictures: the run is of an older version, and its command adds them.")
        note = " ".join(notes)
        found = [scores_section(views), classes_section(views)]
        sections = [*sections, *(one for one in found if one is not None)]
    if trainings:
        sections = [*sections, training_section(trainings)]
    if views:
        sections = [*sections, about_section(views)]
    named = views[0] if views else None
    return Page(
        title=_title(folders, views), summary=summary, panels=panel_titles(views) if views else [], data=data,
        labelled=named is not None and named.labels is not None, turns=turns, note=note, sections=sections,
        command=(named.about.get("command") if named and folders == [named.folder] else None) or command_line() or "",
    )  # fmt: skip


def _title(folders: Sequence[Path], views: Sequence[RunView]) -> str:
    if not views:
        return ", ".join(text_of(folder.name) for folder in folders)
    names = list(dict.fromkeys(name for view in views for name in view.networks))
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"{shown} on {text_of(Path(str(views[0].about.get('data'))).name)}"


def _check_same(views: Sequence[RunView]) -> None:
    """Raise InputError unless runs are of the same images."""
    for view in views[1:]:
        first = views[0]
        contents = {one.about.get("images", {}).get("contents") for one in (first, view)} - {None}
        own = [None if one.labels is None else one.labels.tolist() for one in (first, view)]
        same = view.files == first.files and view.classes == first.classes and view.k == first.k
        if not same or len(contents) > 1 or own[0] != own[1]:
            raise InputError(
                f"{first.folder} and {view.folder} are of other images or labels: a page is of the same images"
            )


def _best(folder: Path, rows: Sequence[Mapping[str, str]]) -> list[RunView]:
    """The first runs of a sweep's baseline, and of the candidate with the highest NH."""
    ranked = candidates_of(rows)
    if not ranked:
        return []
    own = [row for row in rows if row["rung"] == ranked[0]["rung"]]  # a rung's first is the baseline
    chosen = dict.fromkeys([own[0]["candidate"], ranked[0]["candidate"]])
    done = [row for row in own if row["state"] == "done"]
    points = [next((row["point"] for row in done if row["candidate"] == name), None) for name in chosen]
    return [view_run(folder / "points" / point / "analysis") for point in points if point is not None]


def _trainings(views: Sequence[RunView]) -> dict[str, Mapping[str, Any]]:
    """What is known of the fine-tuning of networks whose weights are in a folder of it."""
    found: dict[str, Mapping[str, Any]] = {}
    for view in views:
        for name, said in view.about["networks"].items():
            weights = Path(str(said.get("weights")))
            file = weights.parent / "finetune.json"
            if weights.is_file() and file.is_file():
                with damage_said(file):
                    training_section(own := {name: _of_json(file)})
                    found |= own
    return found


def _thumbnails(files: Sequence[Path], count: int, most: int | None) -> tuple[list[bytes], np.ndarray | None]:
    """Sheets for the page, and which images they show: None for all."""
    if most is None or not files:
        return [], None
    chosen = None if count <= most else np.linspace(0, count - 1, most).round().astype(int)
    room = PICTURE * max(THUMBNAILS, count if chosen is None else most)
    with damage_said(files[0].parent):
        kept = [file.read_bytes() for file in files]
        pictures = decoded(kept, count)
    if chosen is None and sum(map(len, kept)) <= room:
        return kept, None
    return encoded(sheets_of(pictures if chosen is None else pictures[chosen]), room), chosen


def _deconvnet(folder: Path) -> list[Section]:
    """Pictures of the feature maps of each network."""
    found = []
    for own in sorted((folder / "deconv").glob("*/")) if (folder / "deconv").is_dir() else []:
        files = sorted(own.glob("[!.]*.png"), key=lambda file: (file.stat().st_mtime, file.name))
        if files:
            pictures = [Picture(f"{text_of(own.name)} {text_of(file.stem)}", _source(file)) for file in files]
            found.append(Section(f"Deconvnet: {text_of(own.name)}", pictures=pictures))
    return found


def _source(file: Path) -> str:
    """A picture as WebP in a data URL."""
    try:
        with Image.open(file) as picture:
            shown = picture.convert("RGB")
            shown.thumbnail((LARGE, LARGE))
    except DAMAGES as error:  # a SyntaxError among them, of a broken PNG
        raise InputError(f"{file} cannot be read ({' '.join(str(error).split())})") from None
    contents = io.BytesIO()
    shown.save(contents, "WEBP", quality=70)
    return f"data:image/webp;base64,{base64.b64encode(contents.getvalue()).decode()}"


def _rows(file: Path) -> list[dict[str, str]]:
    rows = rows_of(file)
    if not rows or not rows[0].keys() >= {"candidate", "point", "rung", "state"}:
        raise InputError(f"{file} is damaged: run qdv-gpu sweep again")
    return rows


def _paragraphs(file: Path, count: int) -> list[str]:
    """The first paragraphs behind the title of a file in Markdown."""
    if not file.is_file():
        return []
    _, *rest = file.read_text(encoding="utf-8").split("\n\n")
    return rest[:count]


def _of_json(file: Path) -> Mapping[str, Any]:
    try:
        return read_sealed(file)
    except InputError as error:
        raise InputError(f"{error}: run its command again") from None
