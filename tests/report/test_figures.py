"""Nothing in a figure overlaps or is cut, whatever the names are; text is drawn as it is; colours are far apart."""

import warnings
import xml.etree.ElementTree as ElementTree
from itertools import product

import numpy as np
import pytest
import tiny_analysis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from measured_figures import long, problems, short

from qdv_gpu.errors import InputError
from qdv_gpu.report import figures
from qdv_gpu.report.curves import plot_profile, plot_sanity, plot_training
from qdv_gpu.report.drawing import COLOURS, MARKERS, plain, shortened_apart, text_width, wrapped
from qdv_gpu.report.folder import FORMATS, RunFolder
from qdv_gpu.report.maps import NAMED, plot_maps
from qdv_gpu.report.nh import plot_nh
from qdv_gpu.report.pictures import plot_reconstructions, plot_top
from qdv_gpu.scores.statistics import standard_error

ODD = [
    "a$b", "$x$", "$\\frac{$", "x_1^2", "\\alpha", "<b>&amp;", "new\nline", "tab\t", "nul\0", "caf\udce9", "\ud800",
    "_hidden", "猫", "\u202eright", "--", "]]>", " ", "", "%s", "é…√",
]  # fmt: skip


def maps_of(C, L, networks, name, N=60):
    rng = np.random.default_rng(0)
    count = L * networks
    return plot_maps(
        rng.normal(size=(count, N, 2)),
        np.arange(N) % C,
        [name("class", c) for c in range(C)],
        titles=[name("layer", i % L) for i in range(count)],
        subtitles=["NH 0.123"] * count,
        groups=[name("network", i // L) for i in range(count)],
    )


def nh_of(L, networks, name, *, level=0.5, differences=True):
    names = [name("network", i) for i in range(networks)]
    rng = np.random.default_rng(0)
    values = {network: level + 0.3 * rng.random(L) for network in names}
    layers = {network: [name("layer", i) for i in range(L)] for network in names}
    pair = {f"{names[-1]} − {names[0]}": rng.normal(size=L)} if differences else None
    return plot_nh(
        values, {network: np.full(L, 0.02) for network in names}, layers=layers, space=values, chance=0.01,
        differences=pair, difference_errors=pair and {key: np.full(L, 0.02) for key in pair},
    )  # fmt: skip


CASES = [
    pytest.param(
        C, L, networks, name, marks=[pytest.mark.slow] if L * networks > 32 and (C, name) != (100, long) else []
    )
    for C, L, networks, name in product((2, 10, 100), (1, 5, 16), (1, 2, 6), (long, short))
]


@pytest.mark.parametrize(("C", "L", "networks", "name"), CASES)
def test_no_overlap_in_maps(C, L, networks, name):
    figure, axes = maps_of(C, L, networks, name)
    assert problems(figure) == []
    assert len(axes) == L * networks == len(figure.axes)
    assert {round(ax.get_window_extent().width / ax.get_window_extent().height, 3) for ax in axes} == {1}
    rows = [round(ax.get_position().y0, 6) for ax in axes]
    assert max(rows.count(row) for row in rows) <= 5
    assert len(set(rows)) == networks * -(-L // 5)


@pytest.mark.parametrize("name", [long, short])
@pytest.mark.parametrize("networks", [1, 2, 6])
@pytest.mark.parametrize("L", [1, 5, 16])
def test_no_overlap_in_nh(L, networks, name):
    figure, axes = nh_of(L, networks, name)
    assert problems(figure) == []
    assert len(axes) == 2
    labels = [label.get_text() for label in axes[1].get_xticklabels()]
    assert len(set(labels)) == len(labels)  # shortened, but not to the same


@pytest.mark.parametrize("name", [long, short])
@pytest.mark.parametrize("count", [1, 6, 200])
def test_no_overlap_in_other_figures(count, name):
    names = [name("module", i) for i in range(count)]
    title = " ".join(names[:9])
    rng = np.random.default_rng(0)
    epochs = [{"loss": 1 / (i + 1), "accuracy": 0.5, "test_accuracy": 0.4} for i in range(count)]
    profile = {
        batch: [(one, share, "memory") for one, share in zip(names, rng.random(count), strict=True)]
        for batch in (1, 8, 64)
    }
    grid, patches = (
        rng.normal(size=(count, 3, 6, 6)).astype(np.float32),
        np.zeros((min(count, 24), 4, 3, 6, 6), np.uint8),
    )
    image = np.zeros((3, 40, 60), np.uint8)
    made = [
        plot_training(epochs, title),
        plot_profile(profile, title),
        plot_sanity(names, rng.random((count, 8)), title),
        plot_reconstructions([grid], [title], images=image),
        plot_reconstructions([grid[:2], grid, grid[:9]], [title, names[0], names[-1]], images=image),
        plot_reconstructions([grid[:2], grid], [title] * 2, images=[image, image / 255]),
        plot_top(patches, patches.astype(np.float32), range(len(patches)), title),
    ]
    for figure, _ in made:
        assert problems(figure) == []


def test_no_overlap_in_nh_of_many_layers():
    figure, _ = nh_of(150, 2, long)
    assert problems(figure) == []


def test_the_measurement_finds_what_is_wrong():
    figure, axes = maps_of(3, 2, 1, short)
    assert problems(figure) == []
    figure.text(0.5, 0.5, "wide " * 60)
    axes[0].set_title("a title over the next panel's title " * 2)
    found = problems(figure)
    assert {problem.split(":")[0] for problem in found} == {"cut", "texts", "Axes"}
    figure, axes = maps_of(3, 2, 1, short)
    figure.text(0.5, 0.05, "a long text on the legend", ha="center")
    axes[0].set_position((0, 0, 0.5, 0.5))
    assert {problem.split(":")[0] for problem in problems(figure)} >= {"Legend", "texts", "legend on a panel"}
    figure = Figure(figsize=(3, 3))
    ax = figure.add_axes((0.3, 0.4, 0.6, 0.5))
    ax.set_xticks(range(20), ["slanted"] * 20, rotation=45, ha="right", rotation_mode="anchor")
    assert any(problem.startswith("texts") for problem in problems(figure))
    ax.set_xlim(0, 3)
    ax.set_xticks(range(4), ["slanted"] * 4, rotation=45, ha="right", rotation_mode="anchor")
    assert problems(figure) == []


@pytest.mark.parametrize("suffix", FORMATS)
def test_text_is_drawn_as_it_is(tmp_path, suffix):
    def figures_of():
        count, rng = len(ODD), np.random.default_rng(0)
        Z, labels = rng.normal(size=(count, 40, 2)), np.arange(40) % count
        values = dict.fromkeys(ODD, [0.5] * count)
        yield plot_maps(Z, labels, ODD, titles=ODD, subtitles=ODD, groups=ODD)
        yield plot_nh(values, values, layers=dict.fromkeys(ODD, ODD), differences=values)
        for text in ("".join(ODD), "$\\frac{$"):
            yield plot_training([{"loss": 1, "accuracy": 0.5, "test_accuracy": 0.4}], text)
        yield plot_profile({1: [(text, 0.1, "memory") for text in ODD]}, "".join(ODD))
        yield plot_sanity(ODD, np.ones((count, 3)), "".join(ODD))
        yield plot_reconstructions([np.zeros((2, 3, 4, 4), np.float32)] * 12, ODD[:12])
        yield plot_top(np.zeros((2, 3, 1, 4, 4), np.uint8), np.zeros((2, 3, 1, 4, 4), np.float32), [0, 1], ODD[0])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, (figure, _) in enumerate(figures_of()):
            assert problems(figure) == []
            assert not any(text.get_parse_math() for text in figure.findobj(Text) if set(text.get_text()) & {"$", "\\"})
            (path,) = RunFolder(tmp_path).figure(str(number), figure, [suffix])
            assert path == tmp_path / f"{number}.{suffix}"
            if suffix == "svg":
                ElementTree.parse(path)
    figure, _ = next(figures_of())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [plain(text) for text in ODD]


def test_escapes():
    shown = [plain(text) for text in ("$x_1$ <\\", "new\nline", "caf\udce9", "\ud800", "\u202e", "\0", "é")]
    assert shown == ["$x_1$ <\\", "new\\nline", "caf\\xe9", "\\ud800", "\\u202e", "\\x00", "é"]
    assert plain("猫") != plain("犬")


def test_files_are_the_same_each_time(tmp_path):
    for part in ("a", "b"):
        figure, _ = maps_of(12, 2, 1, short)
        paths = RunFolder(tmp_path / part).figure("figures/maps", figure, FORMATS)
        assert [path.name for path in paths] == ["maps.png", "maps.pdf", "maps.svg"]
    for suffix in FORMATS:
        first, second = (tmp_path / part / "figures" / f"maps.{suffix}" for part in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()
    assert b"<image" in (tmp_path / "a" / "figures" / "maps.svg").read_bytes()  # the points, as pixels
    with pytest.raises(InputError, match="unknown figure format 'bmp': allowed are pdf, png, svg"):
        RunFolder(tmp_path / "c").figure("maps", figure, ["png", "bmp"])
    assert not (tmp_path / "c").exists()


def test_unlabelled_maps():
    figure, (ax,) = plot_maps(np.random.default_rng(0).normal(size=(1, 50, 2)))
    assert not figure.legends
    assert len(ax.collections[0].get_facecolors()) == 1
    assert problems(figure) == []
    low, high = ax.get_xlim()
    bottom, top = ax.get_ylim()
    assert high - low == pytest.approx(top - bottom)


def test_more_classes_than_colours():
    labels = np.repeat(np.arange(30), np.arange(1, 31))
    maps = np.random.default_rng(0).normal(size=(1, len(labels), 2))
    shown = [text.get_text() for text in plot_maps(maps, labels)[0].legends[0].get_texts()]
    assert shown == [*(str(c) for c in range(29, 9, -1)), "10 other classes"]
    difficulty = np.where(np.arange(30) < 20, np.arange(30) / 30, np.nan)
    figure, (ax,) = plot_maps(maps, labels, difficulty=difficulty)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *(str(c) for c in range(19, -1, -1)),
        "10 other classes",
    ]
    assert legend.get_title().get_text() == "20 most difficult of 30 classes"
    styles = {(mark.get_color(), mark.get_marker()) for mark in legend.findobj(Line2D)}
    assert len(styles) == NAMED + 1
    colours = ax.collections[0].get_facecolors()
    gray = (colours[:, 0] == colours[:, 1]) & (colours[:, 0] == colours[:, 2]) & (colours[:, 0] > 0.5)
    assert gray.sum() == (labels >= 20).sum()
    assert gray[: gray.sum()].all()  # below the others


def test_colours_are_far_apart():
    deuteranopia = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    protanopia = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    for sight, least in ((np.eye(3), 35), (deuteranopia, 25), (protanopia, 25)):  # Machado et al. 2009
        colours = lab(np.array([to_rgb(colour) for colour in COLOURS]), np.array(sight))
        apart = np.linalg.norm(colours[:, None] - colours, axis=2)[np.triu_indices(len(colours), 1)]
        assert apart.min() > least
    assert len(set(MARKERS)) == len(COLOURS) == 10


def lab(rgb, sight):
    """CIE Lab [n, 3], white D65, of sRGB colours [n, 3] in 0..1, as someone sees them."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ sight.T, 0, 1)
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    xyz /= (0.9505, 1, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack((116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])), axis=1)


def test_nh_leaves_no_empty_space():
    far, (ax, _) = nh_of(5, 2, short, level=0.6)
    assert ax.get_ylim()[0] > 0.4
    assert [text.get_text() for text in ax.texts] == ["chance 0.010 ↓"]
    near, (ax,) = nh_of(5, 2, short, level=0.02, differences=False)
    assert ax.get_ylim()[0] < 0.01 < ax.get_ylim()[1]
    assert [text.get_text() for text in ax.texts] == ["chance 0.010"]
    assert problems(far) == problems(near) == []
    names = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in (far, near)]
    assert names[1] == ["n0", "n1", "95 % interval", "in the layer's own space"]
    assert "n1 − n0" in names[0]
    bars = [container.lines[0].get_xdata() for container in ax.containers]
    assert (bars[0] < bars[1]).all()  # side by side


def test_texts_that_fit():
    assert wrapped("a" * 300, 1, 8, lines=3).count("\n") == 2
    assert max(text_width(line, 8) for line in wrapped("W" * 300, 1, 8, lines=3).split("\n")) <= 1
    names = [f"{'x' * 50}{i}{'y' * 50}" for i in range(9)]
    assert len(set(shortened_apart(names, 1, 8))) == 9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"maps": []}, "at least one map"),
        ({"maps": np.zeros((1, 5, 3))}, r"\[N, 2\]"),
        ({"maps": np.full((1, 5, 2), np.nan)}, "finite"),
        ({"maps": np.zeros((1, 3, 2)), "labels": [0, 1, 2], "classes": ["a", "b"]}, "within 0 and 1"),
        ({"maps": np.zeros((1, 3, 2)), "labels": [0.0, 1, 2]}, "integers"),
        ({"maps": np.zeros((2, 3, 2)), "titles": ["a"]}, "titles must be one for each of the 2 maps, got 1"),
    ],
)
def test_what_cannot_be_drawn(given, message):
    with pytest.raises(InputError, match=message):
        plot_maps(**given)


def test_input_image():
    grid = np.zeros((4, 3, 8, 8), np.float32)
    image = np.zeros((3, 8, 16), np.uint8)
    image[0] = 255
    figure, axes = plot_reconstructions([grid, grid], ["a", "b"], images=image)
    assert (len(axes), len(figure.axes)) == (2, 3)
    assert figure.axes[0].images[0].get_array()[0, 0].tolist() == [1, 0, 0]
    figure, _ = plot_reconstructions([grid, grid], ["a", "b"], images=[image, image[:1] / 255])
    assert [ax.get_title() for ax in figure.axes] == ["input", "", "input", ""]
    with pytest.raises(InputError, match="one for each of the 2 grids, got 1"):
        plot_reconstructions([grid, grid], ["a", "b"], images=[image])


def test_figures_of_an_analysis(tmp_path):
    analysis = tiny_analysis.run(tmp_path / "out")
    layers = analysis.layers
    labels = np.load(next((tmp_path / "out" / "embeddings").rglob("*.npz")))["labels"]
    figure = figures.nh_figure(layers, labels, 3)
    assert problems(figure) == problems(figures.maps_figure(layers, labels, list("0123456789"))) == []
    half = len(layers) // 2
    (bars,) = figure.axes[1].containers
    for i, (x, y) in enumerate(bars.lines[0].get_xydata()):
        a, b = layers[i].scores[1], layers[half + i].scores[1]
        error = standard_error(
            b.spread - a.spread,
            labels,
            seed_values=[two.nh - one.nh for one, two in zip(a.maps, b.maps, strict=True)],
        )
        assert (x, y) == (i + 1, pytest.approx(b.mean.nh - a.mean.nh))
        (low, high) = bars.lines[2][0].get_segments()[i][:, 1]
        assert high - low == pytest.approx(2 * 1.96 * error)
