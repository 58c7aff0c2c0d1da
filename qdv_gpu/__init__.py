"""qdv_gpu: which layer of an image network represents the classes best, and by how much.

The names below are imported when first used, so that `import qdv_gpu` and `qdv-gpu --help` stay instant. Nothing else
is imported here either: until it is, `qdv-gpu` heeds no signal.
"""

__version__ = "0.2.0"
TYPE_CHECKING = False  # as typing has it, which takes as long to import as all that comes before it

if TYPE_CHECKING:
    from typing import Any

    from qdv_gpu.data.convert import as_images
    from qdv_gpu.data.datasets import load_images
    from qdv_gpu.data.images import Images
    from qdv_gpu.deconv.deconvnet import Deconvnet
    from qdv_gpu.errors import InputError
    from qdv_gpu.features.forward import activations
    from qdv_gpu.networks.account import describe_variant
    from qdv_gpu.networks.load import load_network
    from qdv_gpu.networks.tokens import describe_layers
    from qdv_gpu.networks.variant import Variant
    from qdv_gpu.report.curves import plot_profile, plot_sanity, plot_training
    from qdv_gpu.report.maps import plot_maps
    from qdv_gpu.report.nh import plot_nh
    from qdv_gpu.report.pictures import plot_reconstructions, plot_top
    from qdv_gpu.scores.quality import neighborhood_hit
    from qdv_gpu.studies.analyze import analyze
    from qdv_gpu.studies.compare import compare
    from qdv_gpu.studies.deconv import picture
    from qdv_gpu.studies.export import export
    from qdv_gpu.studies.finetune import finetune
    from qdv_gpu.studies.plot import plot
    from qdv_gpu.studies.profile import profile
    from qdv_gpu.studies.report import write_report
    from qdv_gpu.studies.settings import Settings, Training
    from qdv_gpu.studies.status import status
    from qdv_gpu.studies.sweep import sweep
    from qdv_gpu.tsne.estimator import TSNE

_HOME = {
    "Deconvnet": "deconv.deconvnet",
    "Images": "data.images",
    "InputError": "errors",
    "Settings": "studies.settings",
    "TSNE": "tsne.estimator",
    "Training": "studies.settings",
    "Variant": "networks.variant",
    "activations": "features.forward",
    "analyze": "studies.analyze",
    "as_images": "data.convert",
    "compare": "studies.compare",
    "describe_layers": "networks.tokens",
    "describe_variant": "networks.account",
    "export": "studies.export",
    "finetune": "studies.finetune",
    "load_images": "data.datasets",
    "load_network": "networks.load",
    "neighborhood_hit": "scores.quality",
    "picture": "studies.deconv",
    "plot": "studies.plot",
    "plot_maps": "report.maps",
    "plot_nh": "report.nh",
    "plot_profile": "report.curves",
    "plot_reconstructions": "report.pictures",
    "plot_sanity": "report.curves",
    "plot_top": "report.pictures",
    "plot_training": "report.curves",
    "profile": "studies.profile",
    "status": "studies.status",
    "sweep": "studies.sweep",
    "write_report": "studies.report",
}
__all__ = [
    "TSNE",
    "Deconvnet",
    "Images",
    "InputError",
    "Settings",
    "Training",
    "Variant",
    "activations",
    "analyze",
    "as_images",
    "compare",
    "describe_layers",
    "describe_variant",
    "export",
    "finetune",
    "load_images",
    "load_network",
    "neighborhood_hit",
    "picture",
    "plot",
    "plot_maps",
    "plot_nh",
    "plot_profile",
    "plot_reconstructions",
    "plot_sanity",
    "plot_top",
    "plot_training",
    "profile",
    "status",
    "sweep",
    "write_report",
]


def __getattr__(name: str) -> "Any":
    if name not in _HOME:
        raise AttributeError(f"module 'qdv_gpu' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"qdv_gpu.{_HOME[name]}"), name)
