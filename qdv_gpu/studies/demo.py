"""The whole method in a minute, on images that come with scikit-learn."""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from qdv_gpu.data.datasets import load_images
from qdv_gpu.data.images import Images
from qdv_gpu.errors import as_path
from qdv_gpu.results.records import Analysis
from qdv_gpu.studies.analyze import analyze
from qdv_gpu.studies.finetune import finetune

logger = logging.getLogger(__name__)
STORE = ".qdv-store"
SIDE, DIGIT = 28, 16  # pixels of a canvas, and of the digit on it


class SmallCNN(nn.Module):
    """Three stages of `depth` 3 x 3 convolutions and a 2 x 2 max-pool; gray images of 28 x 28 pixels, 10 classes."""

    image_size = SIDE

    def __init__(self, depth: int) -> None:
        super().__init__()
        stages, width = [], 1
        for maps in (16, 32, 64):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [nn.Conv2d(width, maps, 3, padding=1, bias=False), nn.BatchNorm2d(maps), nn.ReLU()]
                width = maps
            stages.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
        self.stage1, self.stage2, self.stage3 = stages
        self.head = nn.Linear(64 * 3 * 3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage3(self.stage2(self.stage1(x))).flatten(1))


def shallow() -> SmallCNN:
    """One convolution a stage."""
    return SmallCNN(1)


def deeper() -> SmallCNN:
    """Three convolutions a stage."""
    return SmallCNN(3)


def scattered_digits(split: str, copies: int = 1) -> Images:
    """The digits somewhere on a larger, noisy canvas: what a network must see through to tell them apart.

    Returns
    -------
    Images
        uint8 [N, 1, 28, 28], each image of `load_images("digits", split)` so many times; the same on every call.

    >>> scattered_digits("test")
    Images('scattered digits', 899 of uint8 [1, 28, 28], 10 classes)
    """
    digits = load_images("digits", split)
    assert digits.pixels is not None
    labels = digits.require_labels("the demo").repeat(copies)
    drawn = functional.interpolate(digits.pixels.float(), (DIGIT, DIGIT), mode="bilinear").repeat(copies, 1, 1, 1)
    random = torch.Generator().manual_seed(0 if split == "train" else 1)
    canvas = torch.rand(len(drawn), 1, SIDE, SIDE, generator=random) * 160
    places = torch.randint(SIDE - DIGIT + 1, (len(drawn), 2), generator=random).tolist()
    for image, digit, (top, left) in zip(canvas, drawn, places, strict=True):
        image[:, top : top + DIGIT, left : left + DIGIT] += digit
    return Images.from_arrays(canvas.clamp(0, 255).to(torch.uint8), labels, name="scattered digits")


def demo(out: str | Path = "qdv-demo", *, device: str = "auto") -> Analysis:
    """Train a shallow and a deeper small network on `scattered_digits`, and analyse both; see `analyze`."""
    out, networks = as_path("out", out), {}
    images = {"train": scattered_digits("train", copies=3), "test": scattered_digits("test")}
    for name in ("shallow", "deeper"):
        spec = f"qdv_gpu.studies.demo:{name}"
        logger.info("training %s", name)
        folder = out / "networks" / name
        finetune(spec, images, folder, epochs=8, batch_size=32, lr=1e-3, device=device, store=out / STORE)
        networks[name] = f"{spec}={folder}"
    return analyze(
        networks, images["test"], out / "analysis", perplexity=30, iterations=750, device=device, store=out / STORE
    )
