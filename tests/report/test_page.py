"""The page's Python side: packing, sections against the folders' numbers, names as text, colours, bad input."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_run import HOSTILE, made_run, pictures
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from PIL import Image

from qdv_gpu import cli, load_images, write_report
from qdv_gpu.data.geometry import Geometry
from qdv_gpu.data.images import Images
from qdv_gpu.data.readers import FileReader
from qdv_gpu.errors import InputError
from qdv_gpu.report import thumbnails
from qdv_gpu.report.charts import Series, line_chart, shade
from qdv_gpu.report.linked import DARK, colours, scored
from qdv_gpu.report.packed import Packed
from qdv_gpu.report.page import SCRIPTS, Page, _script
from qdv_gpu.report.sections import SCORES, comparison_section
from qdv_gpu.report.swept import sweep_section
from qdv_gpu.report.thumbnails import pictures_of
from qdv_gpu.studies import report as report_study

LABELLED = ("nh", "standard_error", "nh_feature_space", "standard_error_feature_space", "chance")
PAGE = Path(__file__).parents[1] / "page"


class Parsed(HTMLParser):
    """Tags with their attributes, tables as texts, and all text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.tables, self.texts, self.cell = [], [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = tag

    def handle_endtag(self, tag):
        self.cell = None if tag == self.cell else self.cell

    def handle_data(self, data):
        self.texts.append(data)
        if self.cell:
            self.tables[-1][-1][-1] += data


def data_of(html):
    """What the page's scripts read: what is said, and arrays."""
    text = re.search(r'<script id="data" type="text/plain">(.*?)</script>', html)[1]
    whole = zlib.decompress(base64.b64decode(text))
    length = int.from_bytes(whole[:4], "little")
    about = json.loads(whole[4 : 4 + length])
    kinds = {"u1": np.uint8, "u2": np.uint16, "f4": np.float32}
    return about, [np.frombuffer(whole, kinds[k], n, 4 + length + at) for k, at, n in about["arrays"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def html(run):
    return write_report(run).read_text()


def test_scripts_in_node():
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    done = subprocess.run(["node", "--test", f"{PAGE}/"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]


def test_the_script_is_one_module():
    """Imports and exports are taken away line by line, so no name may stand twice."""
    script = _script()
    assert not re.search(r"^(import|export)\b", script, flags=re.M)
    names = re.findall(r"^(?:async )?(?:const|let|function|class) (\w+)", script, flags=re.M)
    assert len(names) == len(set(names)) > 20
    assert "</script" not in script.lower()
    assert "<!--" not in script
    assert len(SCRIPTS) == 7
    if shutil.which("node"):
        command = ["node", "--check", "--input-type=module", "-"]
        assert subprocess.run(command, input=script, text=True, check=False).returncode == 0


def test_packed_arrays_come_back():
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 255, 7).astype(np.uint8), np.empty(0, np.uint16), rng.integers(0, 65535, 3).astype(np.uint16),
        rng.normal(size=5).astype(np.float32), np.arange(4, dtype=">u2"),
    ]  # fmt: skip
    packed = Packed()
    assert [packed.add(array) for array in arrays] == list(range(5))
    about, found = data_of(f'<script id="data" type="text/plain">{packed.text({"name": "猫"})}</script>')
    assert about["name"] == "猫"
    for array, own in zip(arrays, found, strict=True):
        assert np.array_equal(array, own)
    assert all(at % 4 == 0 for _, at, _ in about["arrays"])


def test_the_data_is_that_of_the_folder(run, html):
    about, arrays = data_of(html)
    with (run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert about["files"] == [row["file"] for row in rows]
    assert [about["classes"][c] for c in arrays[about["labels"]]] == [row["label"] for row in rows]
    for one in about["networks"]:
        said = [about["classes"][c] for c in arrays[one["predictions"]]]
        assert said == [row[f"{one['name']} prediction"] for row in rows]
        sure = [float(row[f"{one['name']} probability"]) for row in rows]
        assert arrays[one["probabilities"]] / 65535 == pytest.approx(sure, abs=1e-5)
    assert [(about["networks"][p["network"]]["name"], p["layer"]) for p in about["panels"]] == [
        ("cnn", "conv1"), ("cnn", "conv2"), ("other", "conv1"), ("other", "conv2"),
    ]  # fmt: skip
    for panel in about["panels"]:
        name = about["networks"][panel["network"]]["name"]
        hits = [float(row[f"{name} {panel['layer']}"]) for row in rows]
        assert arrays[panel["hits"]] / about["steps"] == pytest.approx(hits, abs=1e-9)
        Z = np.load(run / "embeddings" / name / f"{panel['layer']}.npz")["Z"]
        assert len(panel["maps"]) == len(Z) == 2
        for (x, y), own in zip(panel["maps"], Z, strict=True):
            drawn = np.stack((arrays[x].astype(float), -arrays[y].astype(float)), axis=1)
            assert np.ptp(drawn, axis=0).max() == 65535
            scale = 65535 / np.ptp(own, axis=0).max()  # one for both axes
            assert np.abs(drawn - drawn[0] - (own - own[0]) * scale).max() < 1.5


def test_the_tables_are_those_of_the_folder(run, html):
    tables = {table[0][0] + str(i): table for i, table in enumerate(Parsed(html).tables)}
    with (run / "table3.csv").open() as file:
        rows = list(csv.DictReader(file))
    scores = tables["network0"]
    assert scores[0] == ["network", "layer", *SCORES.values()]
    for shown, row in zip(scores[1:], rows, strict=True):
        assert shown[:2] == [row["network"], row["layer"]]
        assert shown[2:] == [f"{float(row[column]):.3f}" for column in SCORES]
    with (run / "predictions.csv").open() as file:
        images = list(csv.DictReader(file))
    for network, shown in tables["network1"][1:]:
        right = np.mean([image["label"] == image[f"{network} prediction"] for image in images])
        assert shown == f"{100 * right:.1f} %"
    for shown in tables["class2"][1:]:
        own = [image for image in images if image["label"] == shown[0]]
        for cell, column in zip(shown[1:], tables["class2"][0][1:], strict=True):
            assert float(cell) == pytest.approx(np.mean([float(image[column]) for image in own]), abs=0.0051)
    strangers = tables["class3"]
    names = "abcde"
    for shown in strangers[1:]:
        for cell, column in zip(shown[1:], strangers[0][1:], strict=True):
            network, layer = column.split()
            shares = np.load(run / "embeddings" / network / f"{layer}.npz")["class_neighbors"][names.index(shown[0])]
            shares[names.index(shown[0])] = -1
            assert cell == f"{names[shares.argmax()]} {100 * shares.max():.0f} %"


def test_every_name_is_text(tmp_path):
    files = [f"{HOSTILE[i % len(HOSTILE)]}{i}" for i in range(40)]
    folder = made_run(
        tmp_path / "run", classes=HOSTILE, files=files, networks=tuple(HOSTILE[:3]), layers=tuple(HOSTILE[3:7])
    )
    made_run(tmp_path / b"caf\xe9".decode(errors="surrogateescape"), networks=("x",))
    html = write_report(folder).read_text()
    parsed = Parsed(html)
    assert [tag for tag, _ in parsed.tags].count("script") == 2
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert {tag for tag, _ in parsed.tags} & {"b", "img", "iframe", "object", "embed", "base"} == {"b", "img"}
    assert [a for tag, a in parsed.tags if tag == "img"] == [{"alt": ""}]  # of the dialog
    text = "".join(parsed.texts)
    for name in HOSTILE:
        shown = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
        assert shown in text, shown
    other = write_report([path for path in tmp_path.iterdir() if path != folder]).read_text()
    assert r"caf\xe9" in other
    assert r"\ud800" in Page(title="a\ud800b").html()


def test_one_file_that_asks_for_nothing(html):
    tags = Parsed(html).tags
    for tag, attributes in tags:
        for name in ("src", "href", "action", "data", "srcset"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert "@import" not in html
    assert not re.search(r"url\(", html)
    [policy] = [a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (-0.01, 0.01)])
def test_text_in_coloured_cells_has_contrast(low, high):
    for value in np.linspace(low, high, 201):
        paper, ink = (luminance(one) for one in shade(float(value), low, high))
        assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) >= 4.5


def test_signs_have_the_colours_that_they_have_in_the_figures():
    for value in (-1.0, 1.0):
        page, figure = to_rgb(shade(value, -1.0, 1.0)[0]), colormaps["RdBu_r"]((value + 1) / 2)
        assert (page[0] > page[2]) == (figure[0] > figure[2]) == (value > 0)
    assert shade(1.0, 0.0, 1.0) == shade(-1.0, -1.0, 1.0)


def luminance(colour):
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one, other):
    a, b = sorted((luminance(one), luminance(other)))
    return (b + 0.05) / (a + 0.05)


def test_the_pages_colours_have_contrast():
    style = (Path(__file__).parents[2] / "qdv_gpu" / "report" / "assets" / "style.css").read_text()
    blocks = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)[:2]]
    assert [len(block) for block in blocks] == [12, 12]
    for own in blocks:
        for paper in ("paper", "back"):
            assert min(contrast(own[name], own[paper]) for name in ("ink", "soft", "mark")) >= 4.5
        assert min(contrast(own[f"s{i}"], own["paper"]) for i in range(6)) >= 3  # lines of charts


def lab(colour):
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(xyz / (0.9505, 1, 1.089))
    return np.array((116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])))


def test_classes_are_told_apart_on_a_dark_page():
    places = [lab(colour) for colour in DARK]
    apart = [np.linalg.norm(a - b) for i, a in enumerate(places) for b in places[:i]]
    assert min(apart) >= 25
    assert min(contrast(colour, "#14171c") for colour in DARK) >= 3
    for dark in (False, True):
        for count in (1, 10, 11, 200):
            found = colours(count, dark=dark)
            assert len(set(found)) == len(found) == count
            assert all(re.fullmatch("#[0-9a-f]{6}", one) for one in found)


@pytest.mark.parametrize(("count", "name"), [(1, "c"), (20, "features.denseblock4.denselayer16.conv"), (120, "layer")])
def test_nothing_is_cut_in_a_chart(count, name):
    names = [f"{name}{i}" for i in range(count)]
    svg = str(line_chart([Series("a", [0.5] * count)], names, "NH"))
    left, _, width, height = map(float, re.search(r'viewBox="(.*?)"', svg)[1].split())
    slanted = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="end" transform[^>]*>(.*?)</text>', svg)
    assert bool(slanted) == (count > 1)
    for x, y, text in slanted:
        assert float(x) - 5.5 * len(text) * np.cos(np.pi * 40 / 180) >= left
        assert float(y) + 5.5 * len(text) * np.sin(np.pi * 40 / 180) <= height
        assert float(x) <= left + width
    places = sorted(float(x) for x, _, text in slanted if text)
    assert all(b - a >= 13 for a, b in pairwise(places))


def test_thumbnails_are_of_their_images(run, tmp_path):
    for most, expected in ((None, None), (10_000, range(60)), (7, np.linspace(0, 59, 7).round().astype(int)), (1, [0])):
        about, arrays = data_of(write_report(run, tmp_path / "x.html", thumbnails=most).read_text())
        if most is None:
            assert about["thumbnails"] is None
            continue
        sheets = [Image.open(io.BytesIO(arrays[i].tobytes())) for i in about["thumbnails"]["sheets"]]
        found = pictures_of(sheets, len(expected)).float()
        assert (found - pictures(60)[list(expected)].float()).abs().mean() < 10
        images = about["thumbnails"]["images"]
        assert (images is None) == (len(expected) == 60)
        if images is not None:
            assert arrays[images].tolist() == list(expected)


def test_what_killed_runs_left_is_not_shown(run, tmp_path):
    folder = made_run(tmp_path / "run")
    (folder / "deconv" / "cnn").mkdir(parents=True)
    for name in ("thumbnails/.qdv-gpu-tmp-a.webp", "deconv/cnn/.qdv-gpu-tmp-a.png"):
        (folder / name).write_bytes(b"half")
    about, arrays = data_of(write_report(folder).read_text())
    _, expected = data_of(write_report(run, tmp_path / "x.html").read_text())
    assert [arrays[i].tobytes() for i in about["thumbnails"]["sheets"]] == [
        expected[i].tobytes() for i in about["thumbnails"]["sheets"]
    ]


def test_hits_are_exact(tmp_path):
    folder = made_run(tmp_path / "run", seeds=3)  # fifteenths
    about, arrays = data_of(write_report(folder).read_text())
    with (folder / "predictions.csv").open() as file:
        hits = [float(row["cnn conv1"]) for row in csv.DictReader(file)]
    assert np.abs(arrays[about["panels"][0]["hits"]] / about["steps"] - hits).max() < 5e-5  # four digits


@pytest.mark.parametrize(
    ("nh", "said"), [(0.999, "0.989 to 1.000"), (0.004, "0.000 to 0.014"), (0.5, "0.490 to 0.510")]
)
def test_intervals_of_nh_are_of_a_share(nh, said):
    layer = SimpleNamespace(scores={"nh": nh, "standard_error": 0.01 / 1.96})
    assert scored(layer) == f"NH {nh:.3f} ({said})"


def test_only_differences_of_classes_that_have_a_p_get_a_star():
    side = {"delta": 0.1, "low": 0.0, "high": 0.2}

    def table(p):
        classes = {"delta": [0.1, 0.3], "error": [0.1, 0.1], "p": p}
        pair = {"first": "x", "second": "x", "in_maps": side, "in_layer": side, "classes": classes}
        said = {"first": "a", "second": "b", "margin": 0.02, "k": 5, "classes": ["u", "v"], "pairs": [pair],
                "cka": [[None]]}  # fmt: skip
        found = comparison_section(said).tables[0]
        return found.caption, [row[1].text for row in found.rows]

    assert table([0.2, 0.01]) == (
        "Difference of NH of each class; * p < 0.05, corrected for the classes of a layer", ["+0.10", "+0.30 *"]
    )  # fmt: skip
    assert table([None, 0.01])[1] == ["+0.10", "+0.30 *"]
    assert table([None, None]) == ("Difference of NH of each class", ["+0.10", "+0.30"])


def test_what_is_not_equal_is_said(tmp_path):
    few = made_run(tmp_path / "few", networks=("cnn",), seeds=1)
    many = made_run(tmp_path / "many", networks=("cnn",), seeds=3)
    html = write_report([few, many]).read_text()
    assert "Mean of 1 to 3 maps of 60 images" in html
    assert "1 of 1 to 3 maps of each layer are here" in html
    assert "seed adds" not in html
    caption = "One map of 60 images; ± is the standard error, without what the map&#39;s seed adds"
    alone = write_report(few).read_text()
    assert caption in alone
    assert re.search(r"cnn is highest at \w+, NH 0\.\d{3} \(0\.\d{3} to [01]\.\d{3}\), where chance gives 0\.", alone)


def test_trainings_in_folders_of_one_name(tmp_path):
    folders = [tmp_path / one / "tuned" for one in "ab"]
    for folder, accuracy in zip(folders, (0.5, 0.75), strict=True):
        folder.mkdir(parents=True)
        history = [{"loss": 1.0, "accuracy": accuracy}]
        said = {"history": history, "test_accuracy": accuracy, "test_images": 4}
        (folder / "finetune.json").write_text(json.dumps(said))
    html = write_report(folders).read_text()
    assert "tuned: test accuracy 50.00%" in html
    assert f"{folders[1]}: test accuracy 75.00%" in html


def test_normalised_images_are_made_small_a_few_at_a_time(monkeypatch):
    sizes, made = [], thumbnails._shown
    monkeypatch.setattr(thumbnails, "_shown", lambda batch: sizes.append(batch.nbytes) or made(batch))
    images = Images.from_arrays(torch.zeros(1).expand(70, 3, 512, 512))
    assert thumbnails.small(images).shape == (70, 3, 32, 32)
    assert max(sizes) <= 2**26


def test_images_that_are_small_already_are_not_read_again(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    for name, one in zip("ab", pixels, strict=True):
        Image.fromarray(one).save(tmp_path / f"{name}.png")
    images = load_images(tmp_path)
    cropped = images.at(Geometry(32, resize=64))
    assert torch.equal(thumbnails.small(cropped), images.pixels)
    monkeypatch.delattr(FileReader, "__getitem__")
    assert torch.equal(thumbnails.small(images), images.pixels)


@pytest.mark.parametrize("count", [60, 61])
def test_candidates_that_are_left_out_are_said(count):
    row = {"point": "p", "run": "1", "rung": "1", "state": "done", "gmac": "", "accuracy": ""}
    rows = [{**row, "candidate": f"c{i}", "candidate nh": str(i / 100)} for i in range(count)]
    section = sweep_section(rows)
    assert len(section.tables[0].rows) == 60
    said = "Of 61 candidates the 60 with the highest NH are here; sweep.csv has all."
    assert (said in section.words) == (count > 60)


def test_a_rung_shows_its_baseline_and_its_best(monkeypatch):
    shown = []
    monkeypatch.setattr(report_study, "view_run", lambda folder: shown.append(folder.parent.name))
    row = {"state": "done", "gmac": "", "accuracy": ""}
    rows = [
        {**row, "point": f"{name}-{rung}-{run}", "candidate": f"{name} of {rung}", "candidate nh": nh,
         "rung": rung, "run": run}
        for rung in "12" for name, nh in (("base", "0.5"), ("worse", "0.4"), ("best", "0.6")) for run in "12"
    ]  # fmt: skip
    rows[6]["state"] = "failed"
    report_study._best(Path("swept"), rows)
    assert shown == ["base-2-2", "best-2-1"]
    said = "Rankings are of all runs; maps and scores by layer of the first one that was finished."
    assert said in sweep_section(rows).words
    assert said not in sweep_section([one for one in rows if one["run"] == "1"]).words


def test_older_folders_and_those_without_labels(tmp_path):
    html = write_report(made_run(tmp_path / "older", older=True)).read_text()
    assert Parsed(html).tables[0][0] == ["network", "layer", *list(SCORES.values())[: len(LABELLED) + 1]]
    assert "There are no pictures: the run is of an older version" in html
    assert "Which other class" not in html
    html = write_report(made_run(tmp_path / "unlabelled", labelled=False)).read_text()
    assert Parsed(html).tables[0][0] == ["network", "layer", *list(SCORES.values())[len(LABELLED) :]]
    assert "trustworthiness 0.900" in html
    assert "Neighborhood hit of each class" not in html
    about, _ = data_of(html)
    assert about["labels"] is None
    assert about["classes"] == []


def test_networks_of_several_runs_are_told_apart(tmp_path):
    folders = [made_run(tmp_path / name, networks=("cnn",), seed=0) for name in ("before", "after")]
    about, _ = data_of(write_report(folders, tmp_path / "new" / "page.html").read_text())
    assert [one["name"] for one in about["networks"]] == ["cnn (before)", "cnn (after)"]
    about, _ = data_of(write_report([folders[0], folders[0]]).read_text())
    assert len(about["networks"]) == 1
    (tmp_path / "place").mkdir()
    assert write_report(folders[0], tmp_path / "place") == tmp_path / "place" / "report.html"


@pytest.fixture
def report(monkeypatch, capsys):
    """Run `qdv-gpu report ARGUMENTS`; gives its exit code and what it says."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qdv-gpu", "report", *map(str, arguments)])
        code = cli.main()
        captured = capsys.readouterr()
        return code, (captured.out + captured.err).rstrip("\n")

    return run


@pytest.mark.parametrize("most", [1, 300_000, 400_000, 450_000, 600_000, None])
def test_thumbnails_have_the_best_quality_that_is_small_enough(most):
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 256, (2500, 3, 8, 8)).astype(np.uint8))  # 25 rows: a sample tells which
    sheets = thumbnails.sheets_of(coarse.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3))
    tried = [list(thumbnails._webp(sheets, quality)) for quality in thumbnails.QUALITIES]
    fitting = [found for found in tried if most is None or sum(map(len, found)) <= most]
    assert thumbnails.encoded(sheets, most) == (fitting or tried[-1:])[0]


@pytest.mark.parametrize("value", ["0", "-1", "x", " ", "1.5", "²", "None", "1e3"])
def test_wrong_thumbnails(report, run, value):
    code, output = report(run, f"--thumbnails={value}")
    assert code == 2
    assert output == f"qdv-gpu: --thumbnails must be a positive number or none, got {value!r}"


def test_the_command(report, run, tmp_path):
    assert report(run, "--out", tmp_path / "a.html", "--thumbnails", "none") == (0, str(tmp_path / "a.html"))
    assert report()[0] == 2


def test_wrong_arguments():
    with pytest.raises(InputError, match=r"^at least one run folder is required$"):
        write_report([])
    with pytest.raises(InputError, match=r"^thumbnails must be an integer of at least 1, got 0$"):
        write_report("x", thumbnails=0)
    with pytest.raises(InputError, match=r"^run must be a path, got 3$"):
        write_report([3])


def test_folders_of_other_kinds(report, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("missing", "empty", "file"):
        code, output = report(tmp_path / name)
        assert (code, output.count("\n")) == (2, 0)
        assert output.endswith(
            f"{tmp_path / name} holds no finished run of qdv-gpu analyze, compare, sweep, deconv or finetune"
        )


def test_runs_of_other_images(report, run, tmp_path):
    for change in ({"count": 50}, {"classes": tuple("vwxyz")}, {"labelled": False}, {"k": 3}, {"seed": 1}):
        other = made_run(tmp_path / str(change), **change)
        code, output = report(run, other)
        assert code == 2
        expected = f"{run} and {other} are of other images or labels: a page is of the same images"
        if "k" in change:
            expected = f"{other} has scores for k = 3, not 5: run its command with --k 3,5"
        assert output == f"qdv-gpu: {expected}"


def changed(file, text):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


def no_column(file, name):
    with file.open() as lines:
        rows = [{k: v for k, v in row.items() if k != name} for row in csv.DictReader(lines)]
    with file.open("w") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        writer.writerows(rows)


DAMAGES = {
    "no run.json": lambda run: (run / "run.json").unlink(),
    "run.json cut": lambda run: changed(run / "run.json", (run / "run.json").read_bytes()[:100]),
    "run.json a list": lambda run: changed(run / "run.json", "[]"),
    "run.json not UTF-8": lambda run: changed(run / "run.json", b"\xff{}"),
    "settings no dict": lambda run: changed(
        run / "run.json", json.dumps(json.loads((run / "run.json").read_text()) | {"settings": 3})
    ),
    "no predictions": lambda run: (run / "predictions.csv").unlink(),
    "predictions empty": lambda run: changed(run / "predictions.csv", ""),
    "predictions cut": lambda run: changed(run / "predictions.csv", (run / "predictions.csv").read_bytes()[:300]),
    "predictions not UTF-8": lambda run: changed(run / "predictions.csv", b"file\n\xff\n"),
    "a class that is not": lambda run: changed(
        run / "run.json", json.dumps(json.loads((run / "run.json").read_text()) | {"classes": ["q"]})
    ),
    "no files": lambda run: no_column(run / "predictions.csv", "file"),
    "table3 empty": lambda run: changed(run / "table3.csv", ""),
    "table3 without k": lambda run: no_column(run / "table3.csv", "k"),
    "table3 without chance": lambda run: no_column(run / "table3.csv", "chance"),
    "table3 of words": lambda run: changed(run / "table3.csv", (run / "table3.csv").read_text().replace("0.9", "x")),
    "no map": lambda run: next((run / "embeddings").rglob("*.npz")).unlink(),
    "map cut": lambda run: changed(
        run / "embeddings/cnn/conv1.npz", (run / "embeddings/cnn/conv1.npz").read_bytes()[:500]
    ),
    "map no archive": lambda run: changed(run / "embeddings/cnn/conv1.npz", "x"),
    "timings a list": lambda run: changed(run / "timings.json", "[]"),
    "timings without seconds": lambda run: changed(run / "timings.json", '{"cnn/conv1": {"tsne": {}}}'),
    "thumbnail cut": lambda run: changed(run / "thumbnails/000.webp", (run / "thumbnails/000.webp").read_bytes()[:99]),
    "thumbnails too few": lambda run: Image.new("RGB", (320, 32)).save(run / "thumbnails/000.webp"),
    "finetune": lambda run: changed(run / "finetune.json", "{}"),
    "finetune a list": lambda run: changed(run / "finetune.json", "[1]"),
    "comparison": lambda run: changed(run / "comparison.json", '{"pairs": []}'),
    "comparison words": lambda run: changed(run / "comparison.json", '{"pairs": "x", "margin": "y"}'),
    "sweep": lambda run: changed(run / "sweep.csv", "a,b\n1,2\n"),
    "sweep rung": lambda run: changed(run / "sweep.csv", "candidate,point,rung,state\na,b,x,done\n"),
    "sweep not UTF-8": lambda run: changed(run / "sweep.csv", b"\xff\xfe"),
    "picture": lambda run: ((run / "deconv/x").mkdir(parents=True), changed(run / "deconv/x/a.png", "x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line(report, tmp_path, damage):
    run = made_run(tmp_path / "run", count=20)
    DAMAGES[damage](run)
    code, output = report(run)
    assert code == 2, output
    assert output.startswith("qdv-gpu: ")
    assert "\n" not in output
    assert str(run) in output
    assert not (run / "report.html").exists()


def test_a_place_that_cannot_be_written(report, run, tmp_path):
    (tmp_path / "file").write_text("x")
    code, output = report(run, "--out", tmp_path / "file" / "a.html")
    assert code == 2
    assert output.startswith(f"qdv-gpu: cannot write {tmp_path / 'file' / 'a.html'}: ")
