"""qdv_gpu: which layer of an image network represents the classes best, and by how much.

The names below are imported when first used, so that `import qdv_gpu` and `qdv-gpu --help` stay instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qdv_gpu.data.images import load_images
    from qdv_gpu.deconv.deconvnet import Deconvnet
    from qdv_gpu.features.forward import activations
    from qdv_gpu.networks.network import load_network
    from qdv_gpu.scores.quality import neighborhood_hit
    from qdv_gpu.studies.analyze import Settings, analyze
    from qdv_gpu.tsne.estimator import TSNE

_HOME = {
    "load_network": "networks.network",
    "load_images": "data.images",
    "activations": "features.forward",
    "TSNE": "tsne.estimator",
    "neighborhood_hit": "scores.quality",
    "Deconvnet": "deconv.deconvnet",
    "analyze": "studies.analyze",
    "Settings": "studies.analyze",
}
__all__ = ["TSNE", "Deconvnet", "Settings", "activations", "analyze", "load_images", "load_network", "neighborhood_hit"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qdv_gpu' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qdv_gpu.{_HOME[name]}"), name)
