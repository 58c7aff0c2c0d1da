"""A run for other programs: what their files hold, and what is neither overwritten nor taken for a run."""

import csv
import io
import json
import logging
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import tiny_networks
import torch
from PIL import Image

from qdv_gpu import analyze, as_images, cli, export
from qdv_gpu.errors import InputError
from qdv_gpu.files import safe_name
from qdv_gpu.report import rows
from qdv_gpu.report.projector import quoted, write_sprite
from qdv_gpu.results.run import embedding_file
from qdv_gpu.sealed import read_sealed, write_sealed

QUICK = {"pca": 5, "perplexity": 5, "iterations": 20, "seeds": 2, "device": "cpu", "layers": "conv2,pool@2"}
NAMES = ['a "b", c', "new\nline", "cr\rx", "tab\tx", "emo😀ji", "caf\udce9", "q'uote"]
CLASSES = ['cat "1", x', "do\tg 😀"]
NETWORK = 'net/😀 "x"'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of gray files of two widths, with names of every kind."""
    top, random = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    for name in CLASSES:
        (top / "data" / name).mkdir(parents=True)
        for i, stem in enumerate([*NAMES, *map(str, range(8))]):
            with (top / "data" / name / f"{stem}.png").open("wb") as file:
                Image.fromarray(random.integers(0, 255, (8, 8 + i % 2), dtype=np.uint8)).save(file, "PNG")
    options = {**QUICK, "image_size": 8, "k": (3, 2), "store": top / "store"}
    return analyze({NETWORK: "tiny_networks:cnn"}, top / "data", top / "run", **options)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    options = {**QUICK, "samples": 60, "k": 5}
    return analyze("tiny_networks:cnn", "digits", tmp_path_factory.mktemp("digits") / "run", **options)


def brute_neighbors(Z, k):
    """By distance, then position."""
    D = ((Z[:, None].astype(np.float64) - Z[None]) ** 2).sum(-1)
    np.fill_diagonal(D, np.inf)
    order = np.argsort(D, axis=1, kind="stable")[:, :k]
    return order, np.sqrt(np.take_along_axis(D, order, 1))


def arrays(run, layer):
    with np.load(run.out / embedding_file(layer.network, layer.layer)) as file:
        return file["Z"], file["labels"]


def test_parquet_of_files(run, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "ROWS", 7)
    paths = export(run.out, tmp_path / "o", to="parquet")
    assert [path.name for path in paths] == ["conv2.parquet", "pool@2.parquet"]
    for path, layer in zip(paths, run.layers, strict=True):
        Z, labels = arrays(run, layer)
        file = pyarrow.parquet.ParquetFile(path)
        assert file.num_row_groups == 5  # of 30 rows
        table = file.read()
        assert table.column_names == [
            "projection_x", "projection_y", "image", "neighbors", "file", "label", "hits_k3", "hits_k2",
        ]  # fmt: skip
        found = table.to_pydict()
        assert table.schema.field("projection_x").type == pyarrow.float32()
        assert np.array_equal(np.array([found["projection_x"], found["projection_y"]], np.float32).T, Z[0])
        ids, distances = brute_neighbors(Z[0], 3)
        assert [one["ids"] for one in found["neighbors"]] == ids.tolist()
        assert np.allclose([one["distances"] for one in found["neighbors"]], distances, rtol=1e-6)
        for k in (3, 2):
            hits = np.mean([(labels[brute_neighbors(z, k)[0]] == labels[:, None]).mean(1) for z in Z], axis=0)
            assert np.allclose(found[f"hits_k{k}"], hits, atol=1e-6)
            assert np.mean(found[f"hits_k{k}"]) == pytest.approx(layer.of(k).nh, abs=1e-6)
        assert found["label"] == [CLASSES[c] for c in labels]
        assert {"caf\\xe9.png", "cr\rx.png", "new\nline.png"} <= {name.rpartition("/")[2] for name in found["file"]}
        for name, image in zip(found["file"], found["image"], strict=True):
            original = run.out.parent / "data" / name.replace("\\xe9", "\udce9")
            with original.open("rb") as source:
                assert np.array_equal(Image.open(io.BytesIO(image["bytes"])).convert("L"), Image.open(source))
            assert image["path"] == name


def test_pandas_reads_it(digits, tmp_path):
    pandas = pytest.importorskip("pandas")
    (path, _) = export(digits.out, tmp_path / "o", to="parquet")
    frame = pandas.read_parquet(path)
    assert frame["projection_x"].dtype == np.float32
    assert len(frame) == 60
    assert Image.open(io.BytesIO(frame["image"][0]["bytes"])).size == (8, 8)


def test_a_data_set_by_name_with_predictions(digits, tmp_path):
    (path, _) = export(digits.out, tmp_path / "o", to="parquet")
    table = pyarrow.parquet.read_table(path)
    said = digits.predictions["cnn"]
    assert table["prediction"].to_pylist() == [str(c) for c in said.classes]
    assert np.allclose(table["probability"], said.probabilities, rtol=1e-5)
    assert json.loads(table.schema.metadata[b"huggingface"])["info"]["features"] == {"image": {"_type": "Image"}}
    first = table["file"][0].as_py()
    assert table["image"][0]["path"].as_py() == f"{first}.png"
    from qdv_gpu import load_images

    pixels = load_images("digits")[int(first)]
    assert np.array_equal(Image.open(io.BytesIO(table["image"][0]["bytes"].as_py())), pixels[0])


def test_csv_has_the_same_columns_but_pictures(run, tmp_path):
    (path, _) = export(run.out, tmp_path / "csv", to="csv")
    (other, _) = export(run.out, tmp_path / "parquet", to="parquet")
    table = pyarrow.parquet.read_table(other).drop_columns(["image", "neighbors"])
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == table.column_names
    for name in table.column_names:
        expected, got = table[name].to_pylist(), [row[name] for row in found]
        if name.startswith("projection"):
            assert [np.float32(text) for text in got] == [np.float32(value) for value in expected]
        elif name.startswith("hits"):
            assert np.allclose(list(map(float, got)), expected, atol=1e-6)
        else:
            assert got == expected


def test_tensorboard(run, tmp_path):
    paths = export(run.out, tmp_path, to="tensorboard")
    text = paths[-1].read_text(encoding="ascii")
    assert paths[-1] == tmp_path / "projector_config.pbtxt"
    assert text.count("embeddings {") == 4  # map and components of two layers
    assert text.count("image_path") == 4
    assert 'tensor_name: "net/\\360\\237\\230\\200 \\"x\\" conv2: map"' in text
    for layer in run.layers:
        (folder,) = (path.parent for path in paths if path.parts[-2:] == (layer.layer, "map.bytes"))
        Z, labels = arrays(run, layer)
        assert np.array_equal(np.fromfile(folder / "map.bytes", "<f4").reshape(30, 3), np.pad(Z[0], ((0, 0), (0, 1))))
        assert np.fromfile(folder / "components.bytes", "<f4").size == 30 * 5
        lines = (folder / "metadata.tsv").read_bytes().decode().split("\n")
        assert lines.pop() == ""
        cells = [line.split("\t") for line in lines]
        assert cells[0] == ["file", "label", "hits_k3", "hits_k2"]
        assert [row[1] for row in cells[1:]] == [CLASSES[c].replace("\t", "\\t") for c in labels]
        assert not any("\r" in line for line in lines)
    with Image.open(tmp_path / "sprite.png") as sprite:
        assert sprite.size == (6 * 9, 6 * 9)  # 30 images of 9 pixels at most
        sheet = np.array(sprite)
    wide = 0
    for number, row in enumerate(cells[1:]):
        if row[0].isascii() and "\\" not in row[0]:
            with Image.open(run.out.parent / "data" / row[0]) as picture:
                pixels = np.array(picture)
            top, left = divmod(number, 6)
            if pixels.shape[1] == 9:  # as it is; smaller ones are enlarged
                wide += 1
                assert np.array_equal(sheet[top * 9 : top * 9 + 8, left * 9 : left * 9 + 9, 1], pixels)
    assert wide > 3


def test_unlabelled_arrays_have_no_pictures(tmp_path, caplog):
    network = tiny_networks.cnn()
    network.named_layers = {"a/b": "conv2"}
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = analyze({"cnn": network}, as_images(images), tmp_path / "run", **{**QUICK, "layers": None}, report=False)
    with caplog.at_level(logging.WARNING, "qdv_gpu"):
        (path,) = export(result.out, to="parquet")
        paths = export(result.out, to="tensorboard")
    said = [message for message in caplog.messages if message.startswith("exported")]
    assert [message.startswith("exported without pictures: there is no folder") for message in said] == [True, True]
    assert path == result.out / "export" / "parquet" / "cnn" / f"{safe_name('a/b')}.parquet"
    assert pyarrow.parquet.read_table(path).column_names == ["projection_x", "projection_y", "neighbors", "file"]
    metadata = (result.out / "export" / "tensorboard" / "cnn" / safe_name("a/b") / "metadata.tsv").read_text()
    assert metadata.splitlines() == [str(i) for i in range(40)]  # one column, so no header
    assert "sprite" not in paths[-1].read_text()
    shutil.rmtree(tmp_path / ".qdv-store")
    export(result.out, to="tensorboard")  # without components, whose older file goes
    left = sorted(p.name for p in paths[0].parent.iterdir())
    assert left == ["map.bytes", "metadata.tsv"]


@pytest.mark.parametrize("change", ["contents", "gone", "folder"])
def test_images_that_are_not_those_of_the_run(run, tmp_path, caplog, change):
    copy = tmp_path / "data"
    shutil.copytree(run.out.parent / "data", copy)
    own = tmp_path / "run"
    shutil.copytree(run.out, own)
    write_sealed(own / "run.json", read_sealed(own / "run.json") | {"data": str(copy)})
    shutil.rmtree(own / "thumbnails")
    if change == "contents":
        Image.new("L", (8, 8)).save(copy / CLASSES[0] / "1.png")
    elif change == "gone":
        (copy / CLASSES[0] / "1.png").unlink()
    else:
        shutil.rmtree(copy)
    with caplog.at_level(logging.WARNING, "qdv_gpu"):
        (path, _) = export(own, tmp_path / "o", to="parquet")
    (message,) = caplog.messages
    said = {
        "contents": f"images of {copy} have changed since the run",
        "gone": f"image {CLASSES[0]}/1.png is not in {copy} any more",
        "folder": f"there is no folder or table {copy} that images can be read from again",
    }
    assert message == f"exported without pictures: {said[change]}"
    assert "image" not in pyarrow.parquet.read_schema(path).names


def test_images_that_are_gone_have_thumbnails(tmp_path):
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.avg_pool2d(images.float(), 8).repeat_interleave(8, 2).repeat_interleave(8, 3).byte()
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.MaxPool2d(8))
    result = analyze({"net": network}, as_images(images), tmp_path / "run", **{**QUICK, "layers": "1"})
    (path,) = export(result.out, to="parquet")
    rows = pyarrow.parquet.read_table(path, columns=["image"]).to_pylist()
    found = [np.array(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows]
    sources = images.permute(0, 2, 3, 1).numpy().astype(int)
    apart = np.array([np.abs(sources - one).mean(axis=(1, 2, 3)) for one in found])
    assert apart.argmin(axis=1).tolist() == list(range(40))
    assert apart.min(axis=1).max() < 5  # WebP is lossy


def test_files_of_others_stay(run, tmp_path):
    (path, _) = export(run.out, tmp_path, to="csv")
    before = path.read_bytes()
    export(run.out, tmp_path, to="csv")  # ours are written again
    export(run.out, tmp_path, to="parquet")  # beside them
    assert path.read_bytes() == before
    (tmp_path / "export.json").unlink()
    with pytest.raises(InputError) as error:
        export(run.out, tmp_path, to="csv")
    assert str(error.value) == f"{path} is there and not of an earlier export: choose another --out"
    other = tmp_path / "other"
    other.mkdir()
    (other / "export.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match=r"export\.json is there and not of an earlier export"):
        export(run.out, other, to="csv")
    assert [p.name for p in other.iterdir()] == ["export.json"]
    with pytest.raises(InputError, match="is no folder: choose another --out"):
        export(run.out, path, to="csv")


def test_a_killed_export_goes_on(run, tmp_path, monkeypatch):
    def killed(path, points):
        rows.write_csv(path, points)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qdv_gpu.studies.export.write_csv", killed)
        with pytest.raises(KeyboardInterrupt):
            export(run.out, tmp_path, to="csv")
    assert len(list(tmp_path.rglob("*.csv"))) == 1
    assert all(path.is_file() for path in export(run.out, tmp_path, to="csv"))


def test_folders_that_are_no_run(run, tmp_path):
    with pytest.raises(InputError) as error:
        export(tmp_path / "absent", to="csv")
    assert str(error.value) == f"there is no run folder {tmp_path / 'absent'}"
    with pytest.raises(InputError) as error:
        export(tmp_path, to="csv")
    assert str(error.value) == f"{tmp_path} is no finished run of qdv-gpu analyze: give the --out of one"
    for name, command in (("comparison.json", "compare"), ("deconv", "deconv"), ("finetune.json", "finetune")):
        folder = tmp_path / command
        (folder / name).mkdir(parents=True)
        with pytest.raises(InputError, match=f"is of qdv-gpu {command}, no finished run of qdv-gpu analyze"):
            export(folder, to="csv")
    for number, (file, contents) in enumerate(
        [("run.json", b"[]"), ("run.json", b"{"), ("predictions.csv", b"file\n"), ("predictions.csv", b"\xff"),
         (embedding_file(NETWORK, "conv2"), b"PK")],
    ):  # fmt: skip
        copy = tmp_path / str(number)
        shutil.copytree(run.out, copy)
        (copy / file).write_bytes(contents)
        with pytest.raises(InputError, match=r"damaged|holds no finished run|not valid JSON"):
            export(copy, tmp_path / "o", to="csv")


def test_the_command(digits, tmp_path, monkeypatch, capsys):
    def qdv(*arguments):
        monkeypatch.setattr("sys.argv", ["qdv-gpu", "export", *map(str, arguments)])
        code = cli.main()
        return code, *capsys.readouterr()

    code, out, _ = qdv(digits.out, "--to", "csv", "--out", tmp_path / "c")
    assert (code, out.splitlines()) == (0, [str(tmp_path / "c" / "cnn" / f"{x}.csv") for x in ("conv2", "pool@2")])
    code, out, _ = qdv(digits.out, "--to", "tensorboard", "--out", tmp_path / "t t")
    assert (code, out) == (0, f"tensorboard --logdir '{tmp_path / 't t'}'\n")
    code, out, err = qdv(digits.out, "--to", "parket")
    assert (code, out) == (2, "")
    assert err == "qdv-gpu: unknown kind of export 'parket': did you mean parquet?\n"
    code, _, err = qdv(digits.out)
    assert (code, err.count("\n")) == (2, 1)
    assert "--to" in err


def test_a_sprite_is_square_and_within_the_limit(tmp_path):
    """10,001 images of 64 pixels are 101 a row, so of 81 pixels at most; of 20,000 there is room for 57."""
    asked = []

    def pictures(which, side):
        asked.append(side)
        return [Image.new("RGB", (side, side // 2), (255, 0, 0)) for _ in which]

    side = write_sprite(tmp_path / "s.png", 20_000, pictures)
    assert (side, set(asked)) == (57, {57})  # 8192 // 142
    with Image.open(tmp_path / "s.png") as sprite:
        assert sprite.size == (142 * 57, 142 * 57)
        assert sprite.getpixel((20, 28)) == (255, 0, 0)  # letters below and above
        assert sprite.getpixel((20, 2)) == (0, 0, 0)
    with pytest.raises(InputError, match=r"a sprite holds 67,108,864 images"):
        write_sprite(tmp_path / "t.png", 8192**2 + 1, pictures)


def test_quoting_survives_a_parser_of_c_escapes():
    text = 'a\\b"c\n\té😀'
    body = quoted(text)[1:-1]
    assert body.isascii()
    assert body.encode().decode("unicode_escape").encode("latin-1").decode() == text
