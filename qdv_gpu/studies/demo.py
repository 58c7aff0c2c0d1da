"""The whole method in a minute, on images that come with scikit-learn."""

import logging
from pathlib import Path

from torch import Tensor, nn

from qdv_gpu.results.records import Analysis
from qdv_gpu.studies.analyze import analyze
from qdv_gpu.studies.finetune import finetune

logger = logging.getLogger(__name__)
STORE = ".qdv-store"


class SmallCNN(nn.Module):
    """Three stages of `depth` 3 x 3 convolutions and a 2 x 2 max-pool; gray images of 16 x 16 pixels, 10 classes."""

    image_size = 16

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
        self.head = nn.Linear(64 * 2 * 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage3(self.stage2(self.stage1(x))).flatten(1))


def shallow() -> SmallCNN:
    """One convolution a stage."""
    return SmallCNN(1)


def deeper() -> SmallCNN:
    """Three convolutions a stage."""
    return SmallCNN(3)


def demo(out: str | Path = "qdv-demo", *, device: str = "auto") -> Analysis:
    """Train a shallow and a deeper small network on `digits`, and analyse both; see `analyze`."""
    out, networks = Path(out), []
    for name in ("shallow", "deeper"):
        spec = f"qdv_gpu.studies.demo:{name}"
        logger.info("training %s", name)
        folder = out / "networks" / name
        finetune(spec, "digits", folder, epochs=4, batch_size=32, lr=1e-3, device=device, store=out / STORE)
        networks.append(f"{spec}={folder}")
    return analyze(
        networks, "digits", out / "analysis", perplexity=30, iterations=750, device=device, store=out / STORE
    )
