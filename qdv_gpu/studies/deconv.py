"""Deconvnet pictures of networks' layers, written to a folder."""

import logging
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import qdv_gpu
from qdv_gpu.data.convert import as_images
from qdv_gpu.data.datasets import check_data, load_images
from qdv_gpu.data.decode import load_image
from qdv_gpu.data.images import Images
from qdv_gpu.deconv.deconvnet import MODES, Deconvnet, TopActivations
from qdv_gpu.errors import InputError, unknown
from qdv_gpu.files import replacing, safe_name
from qdv_gpu.machine import resolve_device
from qdv_gpu.networks.layers import LayerName, numbered, trace_calls
from qdv_gpu.networks.load import Source, load_networks, select_layers
from qdv_gpu.networks.network import Network
from qdv_gpu.report import pictures
from qdv_gpu.report.folder import save_figure

logger = logging.getLogger(__name__)
SHOWN = 24  # maps in a figure of strongest patches


@dataclass(frozen=True)
class _Source:
    """The image to reconstruct from, and the images to search for the strongest patches."""

    image: Tensor  # uint8 [C, H, W]
    name: str
    images: Images | None


def picture(
    networks: Source | Sequence[Source],
    out: str | Path,
    *,
    data: Any = None,
    index: int | None = None,
    image: str | Path | None = None,
    layers: Sequence[str] | None = None,
    mode: str = "deconvnet",
    top: int = 0,
    contrast: str = "map",
    weights: str | Path = "imagenet",
    image_size: int | None = None,
    skip_bad: bool = False,
    device: str | torch.device = "auto",
) -> list[Path]:
    """Reconstruct every map of every layer from one image, and write the pictures below `out`/deconv.

    Parameters
    ----------
    networks : str, nn.Module or Network, or sequence of them
        As for `load_network`; those after the first are set beside it, layer by layer in order.
    out : str or Path
        Gets deconv/<network>/<layer>.png, a labelled grid of all maps, and .npz, the raw arrays; with several
        networks deconv/<number>-<layer>.png with all of them side by side; with `top`
        deconv/<network>/<layer>-top.png and -top.npz.
    data : str, Path or anything that `as_images` takes, optional
        A data set's name or folder, whose test split is used, or the images themselves.
    index : int, optional
        Of the image in the test split; default 0.
    image : str or Path, optional
        An image file, instead of `index`.
    layers : sequence of str, optional
        Default each network's own.
    mode : str
        Of `Deconvnet.reconstruct`.
    top : int
        Also show the `top` test images that activate a map most, for 24 maps of each layer, in mode "deconvnet".
    contrast : {"map", "layer"}
        What is shown at full contrast: the largest value of each map's reconstruction, or of all the layer's.
    weights, image_size, skip_bad, device
        As for `load_network`, `activations` and `load_images`.

    Returns
    -------
    list of Path
        The figures.

    Raises
    ------
    InputError
        For an unknown name, an index out of range, an unreadable image, or as `Deconvnet.reconstruct`.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if contrast not in pictures.CONTRASTS:
        raise unknown("contrast", contrast, pictures.CONTRASTS)
    if top < 0:
        raise InputError(f"top must be at least 0, got {top}")
    if image_size is not None and image_size < 1:
        raise InputError(f"image size must be at least 1 pixel, got {image_size}")
    if image is not None and index is not None:
        raise InputError("an image file and an index were given: one of them is required")
    if data is None and (image is None or top):
        raise InputError("data is required, for the image by its index and for the strongest patches")
    if isinstance(data, str | Path):
        check_data(data)
    loaded = load_networks(networks, weights=weights, device=resolve_device(device))
    asked = [LayerName.parse(layer) for layer in layers or []]
    selected = select_layers(loaded, [layer.path for layer in asked] or None)
    source = _source(data, index, image, image_size, skip_bad=skip_bad)
    folder = Path(out) / "deconv"
    written: list[Path] = []
    rows: list[list[Any]] = []  # of a network: reconstructions, layer and title of each
    for network, names in zip(loaded, selected, strict=True):
        sized = network if image_size is None else replace(network, image_size=image_size)
        rows.append([])
        own = [str(layer) for layer in asked if layer.path in names]
        pixels = _gray(source.image) if network.channels == 1 else source.image
        for layer in own or _each_call(sized, names):
            found = Deconvnet(sized).reconstruct(pixels, layer, mode=mode).cpu()
            title = f"{network.name} {layer}: {len(found)} maps from {source.name}, {mode}, contrast per {contrast}"
            rows[-1].append((found if len(loaded) > 1 else None, layer, title))
            about = {"network": network.name, "weights": network.source, "layer": layer, "mode": mode}
            _save(
                folder / safe_name(network.name) / f"{safe_name(layer)}.npz",
                about,
                reconstructions=found.numpy(),
                image=source.image.numpy(),
            )
            written.append(folder / safe_name(network.name) / f"{safe_name(layer)}.png")
            _draw_grids(written[-1], [_rgb(found, network)], [title], source.image, contrast)
            logger.info("%s: %d maps", written[-1], len(found))
            if top and source.images is not None:
                written.append(folder / safe_name(network.name) / f"{safe_name(layer)}-top.png")
                count = len(found)
                maps = np.unique(np.linspace(0, count - 1, min(SHOWN, count)).round().astype(int)).tolist()
                best = Deconvnet(sized).top_activations(source.images, layer, k=top, maps=maps)
                _top(written[-1], best, sized, layer, about | {"mode": "deconvnet"})
                logger.info(
                    "%s: %d of %d maps, %d images of %d each", written[-1], len(maps), count, top, len(source.images)
                )
    if len(loaded) > 1:
        for number, row in enumerate(zip(*rows, strict=False), start=1):
            name = "-".join(dict.fromkeys(layer for _, layer, _ in row))
            written.append(folder / f"{number}-{safe_name(name)}.png")
            grids = [_rgb(found, network) for (found, _, _), network in zip(row, loaded, strict=False)]
            _draw_grids(written[-1], grids, [title for *_, title in row], source.image, contrast)
    return written


def _each_call(network: Network, layers: Mapping[str, str]) -> list[str]:
    """The layers, one that is called several times as "name@1", "name@2", ..."""
    calls = Counter(call.path for call in trace_calls(network))
    return [str(name) for layer, path in layers.items() for name in numbered(layer, calls[path])]


def _gray(image: Tensor) -> Tensor:
    """uint8 [1, H, W] of an image [C, H, W], by the luma of ITU-R BT.601."""
    if len(image) == 1:
        return image
    return (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True).round().to(torch.uint8)


def _source(data: Any, index: int | None, image: str | Path | None, size: int | None, *, skip_bad: bool) -> _Source:
    images = None
    if isinstance(data, str | Path):
        images = load_images(data, "test", image_size=size, skip_bad=skip_bad)
    elif data is not None:
        images = as_images(data, image_size=size)
    if image is not None:
        return _Source(load_image(image), Path(image).name, images)
    assert images is not None
    index = index or 0
    if not 0 <= index < len(images):
        raise InputError(f"index must be within 0 and {len(images) - 1}, the test images of {images.name}, got {index}")
    label = "" if images.labels is None else f" ({images.classes[images.labels[index]]})"
    return _Source(images[index].cpu(), f"test image {index}{label}", images)


def _rgb(pictures: Tensor, network: Network) -> np.ndarray:
    """Reconstructions [M, C, H, W] with red first."""
    return (pictures.flip(1) if network.bgr else pictures).numpy()


def _top(path: Path, best: TopActivations, network: Network, layer: str, about: dict[str, Any]) -> None:
    arrays = {name: getattr(best, name).numpy() for name in TopActivations.__dataclass_fields__}
    _save(path.with_suffix(".npz"), about, **arrays)
    k = best.images.shape[1]
    title = (
        f"{network.name} {layer}: {len(best.maps)} maps, the {k} images that activate each most, contrast per picture"
    )
    found = best.reconstructions.flip(2) if network.bgr else best.reconstructions
    figure, _ = pictures.plot_top(best.patches.numpy(), found.numpy(), best.maps.tolist(), title)
    _draw(path, figure)


def _save(path: Path, about: dict[str, Any], **arrays: np.ndarray) -> None:
    versions = {"qdv_gpu": qdv_gpu.__version__, "torch": torch.__version__}
    settings = {key: np.array(value) for key, value in {**about, **versions}.items()}
    # numpy's own savez_compressed takes three times as long for files a few percent smaller.
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, array in (arrays | settings).items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(array, order="C"))


def _draw_grids(path: Path, grids: list[np.ndarray], titles: list[str], image: Tensor, contrast: str) -> None:
    figure, _ = pictures.plot_reconstructions(grids, titles, images=image.numpy(), contrast=contrast)
    _draw(path, figure)


def _draw(path: Path, figure: Figure) -> None:
    with replacing(path) as temporary:
        save_figure(figure, temporary)
