"""Images to measure on: Fashion-MNIST, or where it is absent, made ones of as many classes and as large."""

from pathlib import Path

import torch
from torch.nn import functional

from qdv_gpu import load_images
from qdv_gpu.data.images import Images

PLACES = ("/usr/share/datasets/fashion-mnist", "~/.cache/qdv_gpu/fashion-mnist/FashionMNIST/raw")
MADE = "made images"


def fashion(split: str = "test") -> Images:
    """Fashion-MNIST's 60,000 or 10,000 images; it is not downloaded, since a machine may reach nothing."""
    if any(Path(place).expanduser().is_dir() for place in PLACES):
        return load_images("fashion-mnist", split)
    return made(60_000 if split == "train" else 10_000, seed=int(split == "train"))


def made(N: int, seed: int = 0) -> Images:
    """N images uint8 [N, 1, 28, 28] in ten classes of three smooth patterns each, under patterns of none and noise."""
    patterns = torch.randn(50, 1, 5, 5, generator=torch.Generator().manual_seed(222))
    patterns = functional.interpolate(patterns, size=28, mode="bicubic", align_corners=False)
    own = torch.Generator().manual_seed(seed)
    kinds = torch.arange(N) % 30
    values = patterns[kinds] * (torch.rand(N, 1, 1, 1, generator=own) + 0.5)
    values += (0.15 * torch.randn(N, 20, generator=own) @ patterns[30:].flatten(1)).view_as(values)
    values += 0.2 * torch.randn(values.shape, generator=own)
    return Images.from_arrays((values * 40 + 128).clamp(0, 255).to(torch.uint8), labels=kinds % 10, name=MADE)
