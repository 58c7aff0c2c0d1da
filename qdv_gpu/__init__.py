"""qdv_gpu: which layer of an image network represents the classes best, and by how much.

The names below are imported when first used, so that `import qdv_gpu` and `qdv-gpu --help` stay instant.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qdv_gpu.analysis import Settings, analyze
    from qdv_gpu.data import load_images
    from qdv_gpu.deconvnet import Deconvnet
    from qdv_gpu.forward import activations
    from qdv_gpu.networks import load_network
    from qdv_gpu.quality import neighborhood_hit
    from qdv_gpu.tsne import TSNE

_HOME = {
    "load_network": "networks",
    "load_images": "data",
    "activations": "forward",
    "TSNE": "tsne",
    "neighborhood_hit": "quality",
    "Deconvnet": "deconvnet",
    "analyze": "analysis",
    "Settings": "analysis",
}
__all__ = ["TSNE", "Deconvnet", "Settings", "activations", "analyze", "load_images", "load_network", "neighborhood_hit"]

# In a source checkout the kernels lie beside this folder; installed, they lie in it (pyproject.toml maps them).
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qdv_gpu' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qdv_gpu.{_HOME[name]}"), name)
