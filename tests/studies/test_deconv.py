"""The deconv command writes grids, raw arrays and strongest patches, and says what is wrong in one line."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from qdv_gpu import Deconvnet, load_images, load_network
from qdv_gpu.cli import app
from qdv_gpu.data.geometry import Geometry
from qdv_gpu.errors import InputError
from qdv_gpu.report import pictures as drawn_pictures
from qdv_gpu.studies import deconv as studied
from qdv_gpu.studies.deconv import picture

TINY = ["tiny_networks:cnn", "tiny_networks:other"]


def run(tmp_path, *arguments):
    return CliRunner().invoke(
        app, ["deconv", *arguments, "--weights", "none", "--device", "cpu", "--out", str(tmp_path)]
    )


def test_all_layers_of_two_networks_with_strongest_patches(tmp_path):
    result = run(tmp_path, *TINY, "--data", "digits", "--index", "7", "--top", "4", "--contrast", "layer")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "deconv"
    layers = ("conv2", "pool@1", "pool@2")
    expected = {f"{name}/{layer}{kind}" for name in ("cnn", "other") for layer in layers for kind in ("", "-top")}
    written = {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.png")}
    assert written == expected | {"1-conv2", "2-pool@1", "3-pool@2"}
    with np.load(folder / "cnn" / "pool@2.npz") as arrays:
        digits = load_images("digits")
        assert np.array_equal(arrays["image"], digits.pixels[7])
        net = load_network("tiny_networks:cnn", weights="none", device="cpu")
        assert np.array_equal(arrays["reconstructions"], Deconvnet(net).reconstruct(digits.pixels[7], "pool@2"))
        assert str(arrays["mode"]) == "deconvnet"
    with np.load(folder / "other" / "pool@1-top.npz") as arrays:
        assert arrays["values"].shape == (6, 4)
        assert arrays["patches"].shape[:3] == (6, 4, 1)
        assert (np.diff(arrays["values"]) <= 0).all()


def test_arrays_that_cannot_be_kept_are_said(tmp_path, monkeypatch):
    def full(*_, **__):
        raise InputError("disk full while writing")

    monkeypatch.setattr(studied, "_save", full)
    result = run(tmp_path, TINY[0], "--data", "digits", "--layers", "conv2")
    assert "disk full" in str(result.exception)


def test_an_image_file_for_a_gray_network(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    result = run(tmp_path, TINY[0], "--image", str(tmp_path / "x.png"), "--layers", "conv2,relu@2", "--mode", "guided")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "deconv" / "cnn").glob("*.png")} == {"conv2.png", "relu@2.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digits", "--index", "899"], "index must be within 0 and 898"),
        (["--data", "digits", "--image", "x.png", "--index", "1"], "one of them is required"),
        (["--image", "missing.png"], "there is no image file"),
        (["--top", "9", "--image", "missing.png"], "data is required"),
        ([], "data is required"),
        (["--data", "digits", "--mode", "deconv"], "unknown mode"),
        (["--data", "digits", "--contrast", "maps"], "unknown contrast"),
        (["--data", "digits", "--top", "-1"], "top must be an integer of at least 0"),
        (["--data", "digits", "--image-size", "0"], "must be an integer of at least 1"),
        (["--data", "digits", "--layers", "fc"], "has no maps"),
        (["--data", "digits", "--layers", "conv7"], "unknown layer"),
    ],
)
def test_bad_input_is_refused(arguments, message, tmp_path):
    result = run(tmp_path / "out", TINY[0], *arguments)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_contrast():
    pictures = np.zeros((2, 1, 4, 4), np.float32)
    pictures[0, 0, 0, 0], pictures[1, 0, 0, 0] = 1, -4
    by_map, by_layer = (drawn_pictures._bright_tiles(pictures, 4, axes) for axes in ((1, 2, 3), (0, 1, 2, 3)))
    assert (by_map[:, 0, 0, 0].tolist(), by_layer[:, 0, 0, 0].tolist()) == ([1, 0], [0.625, 0])
    assert by_map[0, 0, 1, 1] == 0.5


def test_networks_of_blue_first_are_drawn_red_first(tmp_path):
    net = load_network("caffe_alexnet", weights="none", num_classes=10, device="cpu")
    net = replace(net, image_size=67)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (67, 67, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    drawn = []
    original = drawn_pictures.plot_reconstructions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            drawn_pictures,
            "plot_reconstructions",
            lambda grids, *a, **k: drawn.append(grids[0]) or original(grids, *a, **k),
        )
        picture([net], tmp_path, image=tmp_path / "x.png", layers=["maxpool1"], device="cpu")
    with np.load(tmp_path / "deconv" / "caffe_alexnet" / "maxpool1.npz") as arrays:
        assert np.array_equal(drawn[0], arrays["reconstructions"][:, ::-1])
    assert torch.from_numpy(drawn[0]).abs().max() > 0


def test_mean_crop_and_formats(tmp_path):
    """Each network gets the image at its own geometry, mean and std; figures in each format."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    (tmp_path / "flat").mkdir()
    Image.fromarray(pixels).save(tmp_path / "flat" / "x.png")
    result = run(
        tmp_path, "gray=tiny_networks:cnn", "--data", str(tmp_path / "flat"), "--layers", "conv2", "--crop",
        "--mean", "0.4", "--std", "0.3", "--format", "png,svg",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "deconv" / "gray").iterdir()} == {"conv2.npz", "conv2.png", "conv2.svg"}
    net = load_network("tiny_networks:cnn", device="cpu", mean=[0.4], std=[0.3])
    images = load_images(tmp_path / "flat")
    seen = images.at(Geometry(8, net.resize))[0]
    with np.load(tmp_path / "deconv" / "gray" / "conv2.npz") as arrays:
        assert np.array_equal(arrays["image"], seen)
        assert np.array_equal(arrays["reconstructions"], Deconvnet(net).reconstruct(seen, "conv2"))
