"""The page in a browser: opened from disk, linked, quiet, legible, and nothing in a name runs."""

import base64
import io
import re
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tiny_sweep
from made_run import HOSTILE, made_run, pictures
from PIL import Image

from qdv_gpu import analyze, cli, compare, write_report
from qdv_gpu.studies.finetune import finetune
from qdv_gpu.studies.sweep import sweep

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
AXE = Path(__file__).parents[1] / "page" / "node_modules" / "axe-core" / "axe.min.js"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
READ = "Multiple readback operations using getImageData"  # which only these tests do
QUICK = {"samples": 60, "pca": 5, "perplexity": 5, "iterations": 20, "seeds": 2, "device": "cpu"}
NETWORKS = ["tiny_networks:cnn", "tiny_networks:other"]


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-webgl", "--disable-3d-apis"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Open a page from disk; whatever it should not do fails the test at its end."""
    wrong, contexts = [], []

    def opened(file, *, address="", width=1280, ready=True, **options):
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: READ in message.text or wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on(
            "request",
            lambda request: (
                request.url.split("#")[0] == file.absolute().as_uri()
                or request.url.startswith(("data:", "blob:"))
                or wrong.append(f"request: {request.url}")
            ),
        )
        page.goto(f"{file.absolute().as_uri()}{address}")
        if ready:
            page.wait_for_selector("body[data-ready=pictures]", timeout=10_000)
            settled(page)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def settled(page):
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a report once: name and options of `made_run`, to the file."""
    top, known = tmp_path_factory.mktemp("made"), {}

    def made(name="plain", **options):
        if name not in known:
            known[name] = write_report(made_run(top / name, **options))
        return known[name]

    return made


LAYERS = tuple(f"features.denseblock{i}.conv" for i in range(20))
VARIANTS = {
    "plain": {},
    "hostile": {
        "classes": HOSTILE[:12], "files": [f"{HOSTILE[i % len(HOSTILE)]}{i}" for i in range(80)],
        "networks": (HOSTILE[0], HOSTILE[9]), "layers": (HOSTILE[2], HOSTILE[9]),
    },
    "two classes, six networks": {"classes": ("cat", "dog"), "networks": [f"network {i}" for i in range(6)]},
    "ten classes, one layer": {"classes": list("0123456789"), "networks": ("one",), "layers": ("only",)},
    "200 classes": {"classes": [f"class number {i}" for i in range(200)], "count": 400},
    "20 layers": {"layers": LAYERS},
    "20 layers, six networks": {"layers": LAYERS, "networks": [f"network {i}" for i in range(6)], "seeds": 1},
    "unlabelled": {"labelled": False},
    "older": {"older": True},
}  # fmt: skip


@pytest.fixture(params=VARIANTS)
def variant(request, made):
    return made(request.param, **VARIANTS[request.param])


def canvas(page, number=0):
    return page.locator(".maps .panel canvas:first-child").nth(number)


def pixels(page, number=0, layer=0):
    """A panel's canvas, uint8 [side, side, 4]."""
    found = page.evaluate(
        """([number, layer]) => {
            const own = document.querySelectorAll(".maps .plot")[number];
            return own.querySelectorAll("canvas")[layer].toDataURL();
        }""",
        [number, layer],
    )
    return np.array(Image.open(io.BytesIO(base64.b64decode(found.split(",")[1]))).convert("RGBA"))


def places(file, panel, side, seed=0, *, networks=("cnn", "other"), layers=("conv1", "conv2")):
    """Where the points of a map are on its canvas of `side` pixels, [N, 2], of the folder's own numbers."""
    network, layer = [(n, one) for n in networks for one in layers][panel]
    Z = np.load(file.parent / "embeddings" / network / f"{layer}.npz")["Z"][seed].astype(float)
    low, high = Z.min(0), Z.max(0)
    centred = (Z - (low + high) / 2) / (high - low).max() * [1, -1] + 0.5
    return 8 + centred * (side - 16)


def drag(page, number, corners):
    canvas(page, number).scroll_into_view_if_needed()
    box = canvas(page, number).bounding_box()
    page.mouse.move(box["x"] + corners[0][0], box["y"] + corners[0][1])
    page.mouse.down()
    for x, y in corners[1:]:
        page.mouse.move(box["x"] + x, box["y"] + y, steps=4)
    page.mouse.up()
    settled(page)


def names(page):
    """The file names that are listed."""
    page.evaluate("document.getElementById('list').open = true")
    page.wait_for_timeout(50)
    return page.input_value("#names").split("\n")


# ---- all kinds of pages: quiet, accessible, legible ----


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(opened, variant, scheme):
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: npm ci in tests/page")
    page = opened(variant, color_scheme=scheme)
    page.evaluate("document.getElementById('list').open = true")
    page.locator(".maps canvas:first-child").first.focus()
    page.keyboard.press("ArrowRight")
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run().then((result) => result.violations)")
    assert [f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found if one["impact"] != "minor"] == []


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overlaps_or_reaches_out_of_the_page(opened, variant, width):
    page = opened(variant, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate(
        """() => [".maps .panel", ".bar > *", "#classes button", "#gallery button", "main > section", ".charts > div"]
            .map((kind) => [...document.querySelectorAll(kind)].map((one) => one.getBoundingClientRect())
                .filter((box) => box.width).map((box) => [box.left, box.top, box.right, box.bottom]))"""
    )
    for kind in boxes:
        for a, b in combinations(kind[:150], 2):
            assert a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 1 or b[3] <= a[1] + 1
    cut = page.evaluate(
        """() => [...document.querySelectorAll("svg")].flatMap((svg) => {
            const own = svg.getBoundingClientRect();
            return [...svg.querySelectorAll("text")].filter((text) => {
                const box = text.getBoundingClientRect();
                const out = box.left < own.left - 1 || box.right > own.right + 1 || box.bottom > own.bottom + 1;
                return box.width && out;
            }).map((text) => text.textContent);
        })"""
    )
    assert cut == []
    thin = page.evaluate(
        """() => [...document.querySelectorAll("th span, td span")].filter((one) => {
            const box = one.getBoundingClientRect();
            return one.textContent.length > 4 && Math.min(box.width, box.height) && box.width < 11
                && getComputedStyle(one).writingMode === "horizontal-tb";
        }).map((one) => one.textContent)"""
    )
    assert thin == []  # no table squeezed letter by letter


def test_hostile_names_are_text(opened, made):
    file = made("hostile", **VARIANTS["hostile"])
    page = opened(file, address="#text=<img src=x onerror=alert(1)>&show=<script>alert(1)</script>&classes=1,99,x")
    assert page.input_value("#search") == "<img src=x onerror=alert(1)>"
    page.keyboard.press("Escape")
    shown = page.locator("#classes button span").all_text_contents()
    plain = [name.encode(errors="surrogateescape").decode(errors="backslashreplace") for name in HOSTILE]
    assert shown == plain[:12]
    assert names(page)[:8] == [f"{name}{i}" for i, name in enumerate(plain[:8])]
    for button in page.locator("#gallery button").all()[:20]:
        button.click()
        assert page.locator("#card").is_visible()
    texts = page.locator("#card dd").first.text_content()
    assert texts == f"{plain[19]}19"
    assert page.evaluate("document.querySelectorAll('script').length") == 2


def test_right_to_left_names_leave_their_sentence_alone(opened, made):
    page = opened(made("hostile", **VARIANTS["hostile"]))
    said = page.locator("#gallery button").evaluate_all("all => all.map((one) => one.title)")
    backward = [text for text in said if re.search(r"\u202eright to left", text)]
    assert backward
    assert any("\u2068\u202eright to left\u2069 (" in text for text in backward)


def test_without_scripts_the_tables_are_there(opened, made):
    page = opened(made(), ready=False, java_script_enabled=False)
    assert page.locator("noscript p").is_visible()
    assert page.locator("table").first.is_visible()


def test_a_long_name_leaves_the_layer_above_its_map(opened, made):
    page = opened(made("long", networks=("a network of a name that is too long for a panel", "b")))
    cut = (
        page.locator(".panel b").first.locator("i").evaluate_all("all => all.map((i) => i.scrollWidth > i.clientWidth)")
    )
    assert cut == [True, False]
    assert page.locator(".panel b").first.text_content().split()[-2:] == ["·", "conv1"]
    short = (
        page.locator(".panel b")
        .last.locator("i")
        .first.evaluate("""(i) => {
        const text = document.createRange();
        text.selectNodeContents(i);
        return i.getBoundingClientRect().width - text.getBoundingClientRect().width;
    }""")
    )
    assert abs(short) < 1


# ---- maps ----


def test_the_maps_are_drawn_where_the_points_are(opened, made):
    file = made()
    page = opened(file)
    colours = [(0, 114, 178), (230, 159, 0), (204, 51, 17), (0, 95, 86), (136, 204, 238)]
    for panel in range(4):
        drawn = pixels(page, panel)
        where = places(file, panel, len(drawn)).round().astype(int)
        labels = np.arange(60) % 5
        alone = [i for i in range(60) if (np.abs(where - where[i]).max(1) > 8).sum() == 59]
        assert len(alone) > 10
        for i in alone:
            assert tuple(drawn[where[i][1], where[i][0], :3]) == colours[labels[i]]


def test_a_box_selects_the_same_images_in_all_maps(opened, made):
    file = made()
    page = opened(file)
    side = len(pixels(page, 1))
    where = places(file, 1, side)
    left, top, right, bottom = 0.2 * side, 0.3 * side, 0.8 * side, 0.7 * side
    drag(page, 1, [(left, top), (right, bottom)])
    within = (where > [left, top]).all(1) & (where < [right, bottom]).all(1)
    assert 5 < within.sum() < 55
    assert names(page) == [f"{i:03}.png" for i in np.flatnonzero(within)]
    assert page.text_content("#count") == f"{within.sum()} of 60 images selected"
    for panel in range(4):
        drawn, own = pixels(page, panel), places(file, panel, side).round().astype(int)
        alone = [i for i in range(60) if (np.abs(own - own[i]).max(1) > 8).sum() == 59]
        for i in alone:  # faint are those that are not selected
            colour = drawn[own[i][1], own[i][0], :3].astype(int)
            assert (colour.min() > 200) == (not within[i])
    again = opened(file, address=page.evaluate("location.hash"))
    assert names(again) == names(page)
    if page.locator("#map").count():  # the same images in the other maps
        before = names(page)
        page.locator("#map").fill("2")
        settled(page)
        assert names(page) == before
        assert not pixels(page, 1, 1).any()  # whose outline is of the first map
    page.keyboard.press("Escape")
    assert page.text_content("#count") == "all 60 images"


def test_a_lasso(opened, made):
    file = made()
    page = opened(file)
    side = len(pixels(page, 0))
    where = places(file, 0, side)
    corners = [(0.1 * side, 0.1 * side), (0.9 * side, 0.1 * side), (0.1 * side, 0.9 * side)]
    page.get_by_label("lasso").check()
    drag(page, 0, [*corners, corners[0]])
    edge = where.sum(1) - side
    within = (where > 0.1 * side).all(1) & (edge < 0)
    sure = (np.abs(edge) > 3) & (np.abs(where - 0.1 * side).min(1) > 3)
    found = {int(name[:3]) for name in names(page)}
    assert {i for i in found if sure[i]} == set(np.flatnonzero(within & sure))
    page.get_by_label("box").check()
    page.keyboard.press("Escape")
    page.keyboard.down("Shift")
    drag(page, 0, [*corners, corners[0]])
    page.keyboard.up("Shift")
    assert {int(name[:3]) for name in names(page)} == found


def alone(file, panel, side):
    """A point that is far from the others."""
    where = places(file, panel, side)
    far = np.linalg.norm(where[:, None] - where[None], axis=2)
    np.fill_diagonal(far, np.inf)
    middle = (where > 0.2 * side).all(1) & (where < 0.8 * side).all(1)
    return int(np.where(middle, far.min(1), 0).argmax()), where


def test_hover_shows_the_image_and_its_neighbours_everywhere(opened, made):
    file = made()
    page = opened(file)
    side = len(pixels(page, 2))
    i, where = alone(file, 2, side)
    canvas(page, 2).scroll_into_view_if_needed()
    box = canvas(page, 2).bounding_box()
    page.mouse.move(box["x"] + where[i][0], box["y"] + where[i][1])
    settled(page)
    words, values = (page.locator(f"#card {kind}").all_text_contents() for kind in ("dt", "dd"))
    card = dict(zip(words, values, strict=True))
    with (file.parent / "predictions.csv").open() as lines:
        header, row = lines.readline().strip().split(","), lines.readlines()[i].strip().split(",")
    said = dict(zip(header, row, strict=True))
    assert card["image"] == said["file"] == f"{i:03}.png"
    assert card["label"] == said["label"]
    for network in ("cnn", "other"):
        sure = f"{said[f'{network} prediction']} ({100 * float(said[f'{network} probability']):.0f} %)"
        wrong = "" if said[f"{network} prediction"] == said["label"] else " ✗"
        assert card[f"{network} says"] == sure + wrong
        hits = " · ".join(f"{100 * float(said[f'{network} conv{n}']):.0f}" for n in (1, 2))
        assert card[f"hits, {network}"] == f"{hits} %"
    shown = page.evaluate("[...document.getElementById('picture').getContext('2d').getImageData(0, 0, 32, 32).data]")
    shown = np.array(shown).reshape(32, 32, 4)[:, :, :3]
    source = pictures(60).permute(0, 2, 3, 1).numpy().astype(int)
    off = np.abs(source - shown).mean((1, 2, 3))
    assert off.argmin() == i
    assert off[i] < 15 < np.sort(off)[1]
    for panel in range(4):
        over, own = pixels(page, panel, 1), places(file, panel, side)
        far = np.linalg.norm(own - own[i], axis=1)
        for neighbor in np.argsort(far, kind="stable")[1:6]:  # lines, beyond the ring
            x, y = (own[i] + (own[neighbor] - own[i]) * max(0.6, 8 / far[neighbor])).round().astype(int)
            if far[neighbor] > 14:
                assert over[y - 1 : y + 2, x - 1 : x + 2, 3].max() > 60
        x, y = own[i]
        for dx, dy in ((6, 0), (-6, 0), (0, 6), (0, -6)):
            r, c = round(y + dy), round(x + dx)
            assert over[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2, 3].max() > 60
    page.mouse.move(box["x"] + 1, box["y"] - 60)
    settled(page)
    assert page.locator("#card").is_hidden()
    assert not pixels(page, 0, 1).any()


def test_the_right_picture_for_every_image_of_the_gallery(opened, made):
    page = opened(made())
    shown = page.locator("#gallery canvas").evaluate_all(
        "all => all.map((one) => [...one.getContext('2d').getImageData(0, 0, 32, 32).data])"
    )
    shown = np.array(shown).reshape(-1, 32, 32, 4)[..., :3].astype(int)
    source = pictures(60).permute(0, 2, 3, 1).numpy().astype(int)
    assert len(shown) == 60
    assert [int(np.abs(source - one).mean((1, 2, 3)).argmin()) for one in shown] == list(range(60))


def test_filters(opened, made):
    file = made()
    page = opened(file)
    with (file.parent / "predictions.csv").open() as lines:
        header, *rows = (line.strip().split(",") for line in lines)
    rows = [dict(zip(header, row, strict=True)) for row in rows]

    def check(test):
        settled(page)
        assert names(page) == [row["file"] for row in rows if test(row)]

    page.locator("#classes button").nth(1).click()
    check(lambda row: row["label"] == "b")
    page.keyboard.press("3")
    check(lambda row: row["label"] in "bc")
    page.keyboard.press("Escape")
    page.locator("#show").select_option(label="wrong in other")
    check(lambda row: row["label"] != row["other prediction"])
    page.locator("#show").select_option(label="right in cnn, wrong in other")
    check(lambda row: row["cnn prediction"] == row["label"] != row["other prediction"])
    page.locator("#show").select_option(label="hit rises from cnn to other")
    check(lambda row: float(row["other conv2"]) - float(row["cnn conv2"]) >= 0.4 - 1e-9)
    page.get_by_role("button", name="Clear").click()
    page.locator("#layer").select_option(label="other conv1")
    page.locator("#below").fill("0.3")
    check(lambda row: float(row["other conv1"]) < 0.3 - 1e-9)
    page.keyboard.press("Escape")  # also from within a control
    assert page.text_content("#count") == "all 60 images"
    page.locator("#search").fill("01")
    check(lambda row: "01" in row["file"])
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as CSV").click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert lines[0].startswith("file,label,cnn prediction,cnn probability,other prediction")
    assert [line.split(",")[0] for line in lines[1:]] == names(page)
    page.get_by_role("button", name="Copy file names").click()
    assert page.evaluate("document.getSelection().toString() || names.value.length") != 0


def test_keyboard(opened, made):
    file = made()
    page = opened(file)
    reached = set()
    for _ in range(150):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached >= {"show", "layer", "below", "search", "map", "reset", "save", "copy", "CANVAS", "DIV", "INPUT"}
    canvas(page, 1).focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#card").is_visible()
    where = places(file, 1, len(pixels(page, 1)))
    now = int(page.evaluate("location.hash").split("image=")[1])
    page.keyboard.press("ArrowRight")
    after = int(page.evaluate("location.hash").split("image=")[1])
    ways = where - where[now]
    ahead = (ways[:, 0] > 0) & (np.abs(ways[:, 1]) <= ways[:, 0] + 0.1)
    far = np.where(ahead, np.linalg.norm(ways, axis=1), np.inf)
    assert far[after] <= far.min() + 0.2
    assert f"{after:03}.png" in page.text_content("#said")
    before = pixels(page, 1)
    page.keyboard.press("+")
    settled(page)
    assert (pixels(page, 1) != before).any()
    page.keyboard.press("-")
    settled(page)
    page.keyboard.press("Escape")
    assert page.locator("#card").is_hidden()
    page.locator("#classes button").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#classes=1"


def test_zoom_and_pan(opened, made):
    page = opened(made())
    first = pixels(page, 0)
    box = canvas(page, 0).bounding_box()
    page.get_by_label("pan and zoom").check()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.wheel(0, -300)
    settled(page)
    page.wait_for_timeout(100)
    grown = pixels(page, 0)
    assert (grown != first).any()
    drag(page, 0, [(100, 100), (130, 120)])
    moved = pixels(page, 0)
    assert np.mean(moved[30:, 40:] != grown[10:-20, 10:-30]) < 0.02
    assert page.text_content("#count") == "all 60 images"
    canvas(page, 0).dblclick()
    settled(page)
    assert np.array_equal(pixels(page, 0), first)


def test_the_other_maps(opened, made):
    file = made()
    page = opened(file)
    page.locator("#map").fill("2")
    settled(page)
    assert page.text_content("#seed") == "map 2 of 2"
    drawn = pixels(page, 3)
    for x, y in places(file, 3, len(drawn), seed=1).round().astype(int):
        assert drawn[y, x, 3] == 255


def test_the_card_stays_with_its_point(opened, made):
    page = opened(made(), width=390)
    canvas(page, 0).focus()
    page.keyboard.press("ArrowRight")
    before = [page.locator(kind).first.bounding_box()["y"] for kind in ("#card", ".maps canvas")]
    page.evaluate("scrollBy(0, 200)")
    after = [page.locator(kind).first.bounding_box()["y"] for kind in ("#card", ".maps canvas")]
    assert before[0] - after[0] == before[1] - after[1] > 0


def test_touch(opened, made):
    file = made()
    page = opened(file, width=390, has_touch=True, is_mobile=True)
    side = canvas(page, 0).bounding_box()["width"]
    i, where = alone(file, 0, side)
    canvas(page, 0).scroll_into_view_if_needed()
    box = canvas(page, 0).bounding_box()
    page.touchscreen.tap(box["x"] + where[i][0], box["y"] + where[i][1])
    settled(page)
    assert page.locator("#card").is_visible()
    assert page.locator("#card dd").first.text_content() == f"{i:03}.png"


def test_a_damaged_sheet_leaves_the_maps(opened, made, tmp_path):
    html = made("plain").read_text()
    (tmp_path / "report.html").write_text(html.replace("createImageBitmap(", "Promise.reject("))
    text = (tmp_path / "report.html").read_text()
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)  # which does not know this script
    (tmp_path / "report.html").write_text(text)
    page = opened(tmp_path / "report.html")
    assert page.locator("#gallery button").count() == 0
    assert pixels(page, 0).any()


def test_another_script_does_not_run(chromium, made, tmp_path):
    html = made("plain").read_text()
    added = "<main><script>alert(1)</script><img src=x onerror=alert(2)>"
    (tmp_path / "x.html").write_text(html.replace("<main>", added))
    page = chromium.new_page()
    said = []
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.goto((tmp_path / "x.html").as_uri())
    page.wait_for_selector("body[data-ready=pictures]")
    assert said == []
    page.close()


def test_print(opened, made):
    page = opened(made(), color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".bar").is_hidden()
    assert page.locator("#selection").is_hidden()
    assert page.locator("#classes").is_visible()  # what the colours are
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    drawn = pixels(page, 0)
    assert {tuple(colour) for colour in drawn[drawn[..., 3] > 0][:, :3]} >= {(0, 114, 178), (0, 95, 86)}
    assert page.pdf().startswith(b"%PDF")
    page.emulate_media(media="screen", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert (88, 168, 234) in {tuple(colour) for colour in pixels(page, 0).reshape(-1, 4)[:, :3]}


# ---- reports of the other commands ----


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


def test_compare_of_networks_and_of_run_folders(opened, top):
    compare(*NETWORKS, "digits", top / "networks", **QUICK)
    page = opened(top / "networks" / "report.html")
    assert page.get_by_role("heading", name="other against cnn").is_visible()
    assert page.get_by_text("Debiased linear CKA").first.is_visible()
    assert page.locator(".maps .panel").count() >= 4
    assert page.locator("#gallery canvas").count() == 60
    for network in ("cnn", "other"):
        run = top / network
        analyze(f"tiny_networks:{network}", "digits", run, store=top / ".qdv-store", **QUICK)
    compare(top / "cnn", top / "other", out=top / "folders")
    page = opened(top / "folders" / "report.html")
    assert page.get_by_role("heading", name="other against cnn").is_visible()
    assert page.locator(".maps .panel").count() >= 4


def test_sweep(opened, top):
    table = tiny_sweep.changed(grid={"lr": [1e-2], "runs": 1}, run={"iterations": 20})
    sweep(table, top / "sweep")
    page = opened(top / "sweep" / "report.html")
    assert page.get_by_role("heading", name="Sweep").is_visible()
    assert page.get_by_role("heading", name=re.compile("NH against cost")).is_visible()
    assert page.get_by_role("heading", name=re.compile("Accuracy on test images")).is_visible()
    assert page.locator(".maps .panel").count() >= 2
    assert page.locator("table").filter(has_text="Candidates, the highest NH first").locator("tbody tr").count() == 2


def test_deconvnet_beside_maps_and_pictures_that_grow(opened, top, monkeypatch):
    made_run(top / "seen")
    words = f"qdv-gpu deconv {NETWORKS[0]} --data digits --weights none --device cpu --out"
    monkeypatch.setattr("sys.argv", [*words.split(), str(top / "seen")])
    assert cli.main() == 0
    page = opened(write_report(top / "seen"))
    assert page.get_by_role("heading", name="Deconvnet: cnn").is_visible()
    assert pixels(page, 0).any()
    page.locator("button.picture").first.click()
    assert page.locator("dialog[open] img").is_visible()
    assert page.evaluate("document.querySelector('dialog img').naturalWidth") > 50
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    page.locator("button.picture").first.click()
    page.get_by_role("button", name="Close").click()
    assert page.locator("dialog[open]").count() == 0


def test_finetune(opened, top):
    finetune(NETWORKS[0], "digits", top / "trained", epochs=2, batch_size=50, samples=200, device="cpu")
    page = opened(write_report(top / "trained"), ready=False)
    assert page.get_by_role("heading", name="Loss on training images, by epoch").is_visible()
    assert page.get_by_text("test accuracy").is_visible()
    assert page.locator("canvas").count() == 0
