"""Deconvnet pictures of networks' layers, written to a folder."""

import logging
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import qdv_gpu
from qdv_gpu.data.convert import as_images
from qdv_gpu.data.datasets import check_data, load_images
from qdv_gpu.data.decode import load_image
from qdv_gpu.data.images import Images
from qdv_gpu.deconv.deconvnet import MODES, Deconvnet, TopActivations
from qdv_gpu.errors import InputError, as_path, check_among, check_count, check_flag, check_side, check_whole
from qdv_gpu.features.forward import shown
from qdv_gpu.files import replacing, safe_name
from qdv_gpu.machine import resolve_device
from qdv_gpu.networks.layers import output_names, read_layers
from qdv_gpu.networks.load import Sources, load_networks, select_layers
from qdv_gpu.networks.network import Network
from qdv_gpu.report import pictures
from qdv_gpu.report.folder import only_writer, read_formats, write_figure

logger = logging.getLogger(__name__)
SHOWN = 24  # maps in a figure of strongest patches


@dataclass(frozen=True)
class _Source:
    """The image to reconstruct from, and the images to search for the strongest patches."""

    image: Images
    name: str
    images: Images | None


def picture(
    networks: Sources,
    out: str | Path,
    *,
    data: Any = None,
    split: str | None = None,
    index: int | None = None,
    image: str | Path | None = None,
    layers: str | Sequence[str] | None = None,
    mode: str = "deconvnet",
    top: int = 0,
    contrast: str = "map",
    weights: str | Path = "imagenet",
    image_size: int | None = None,
    crop: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    formats: Sequence[str] = ("png",),
    skip_bad: bool = False,
    device: str | torch.device = "auto",
) -> list[Path]:
    """Reconstruct every map of every layer from one image, and write the pictures below `out`/deconv.

    Parameters
    ----------
    networks : str, nn.Module or Network, or sequence or dict of them
        As for `load_networks`; those after the first are set beside it, layer by layer in order.
    out : str or Path
        Gets deconv/<network>/<layer>.png, a labelled grid of all maps, and .npz, the raw arrays; with several
        networks deconv/<number>-<layer>.png with all of them side by side; with `top`
        deconv/<network>/<layer>-top.png and -top.npz.
    data : str, Path or anything that `as_images` takes, optional
        What `load_images` takes, or the images themselves.
    split : str, optional
        As for `load_images`.
    index : int, optional
        Of the image in the data; default 0.
    image : str or Path, optional
        An image file, instead of `index`.
    layers : str or sequence of str, optional
        Default each network's own.
    mode : str
        Of `Deconvnet.reconstruct`.
    top : int
        Also show the `top` images of the data that activate a map most, for 24 maps of each layer, in mode "deconvnet".
    contrast : {"map", "layer"}
        What is shown at full contrast: the largest value of each map's reconstruction, or of all the layer's.
    crop : bool
        Resize the shorter side of the images and cut out the centre, as each network was tested.
    mean, std : sequence of float, optional
        Of each channel, for pixels in 0..1, instead of each network's own.
    formats : sequence of str
        Of the figures: "png", "pdf", "svg".
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

    Examples
    --------
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> [path.name for path in picture(network, tmp_path, data="digits", layers=["1", "2"])]
    ['1.png', '2.png']
    """
    check_among("mode", mode, MODES)
    check_among("contrast", contrast, pictures.CONTRASTS)
    formats = read_formats(formats)
    check_count("top", top, least=0)
    out = as_path("out", out)
    check_flag("crop", crop)
    check_flag("skip_bad", skip_bad)
    if image_size is not None:
        check_side(image_size)
    if index is not None:
        check_whole("index", index)
    if image is not None and index is not None:
        raise InputError("an image file and an index were given: one of them is required")
    if data is None and (image is None or top):
        raise InputError("data is required, for the image by its index and for the strongest patches")
    if isinstance(data, str | Path):
        check_data(data)
    loaded = load_networks(
        networks, weights=weights, image_size=image_size, mean=mean, std=std, device=resolve_device(device)
    )
    loaded = [network.at_size(image_size) for network in loaded]
    asked = read_layers(layers) or []
    selected = select_layers(loaded, asked or None)
    source = _source(data, split, index, image, skip_bad=skip_bad)
    if source.images is not None and top > len(source.images):
        raise InputError(f"top must be at most {len(source.images)}, the images of {source.images.name}, got {top}")
    folder = out / "deconv"
    written: list[Path] = []
    with only_writer(folder), ThreadPoolExecutor(1) as writer:
        rows: list[list[Any]] = []  # of a network: reconstructions, input and title of each layer
        for network, names in zip(loaded, selected, strict=True):
            rows.append([])
            seen = shown(source.image, network, crop=crop)[0].cpu()
            searched = shown(source.images, network, crop=crop) if top and source.images is not None else None
            for layer in [str(one) for one in asked if one.path in names] or output_names(network, names):
                found = Deconvnet(network).reconstruct(seen, layer, mode=mode).float().cpu()
                title = f"{network.name} {layer}: {len(found)} maps from {source.name}, {mode}, contrast per {contrast}"
                about = {"network": network.name, "weights": network.source, "layer": layer, "mode": mode}
                path = folder / safe_name(network.name) / safe_name(layer)
                saving = writer.submit(_save, path, about, reconstructions=found.numpy(), image=seen.numpy())
                figure, _ = pictures.plot_reconstructions(
                    [_rgb(found, network)], [title], images=seen.numpy(), contrast=contrast
                )
                written += write_figure(path, figure, formats)
                saving.result()
                rows[-1].append((layer, _rgb(found, network), seen.numpy(), title) if len(loaded) > 1 else None)
                logger.info("%s: %d maps", written[-1], len(found))
                if searched is not None:
                    written += _top(path, network, layer, searched, len(found), top, formats)
        if len(loaded) > 1:
            for number, row in enumerate(zip(*rows, strict=False), start=1):
                own, grids, inputs, titles = (list(column) for column in zip(*row, strict=True))
                figure, _ = pictures.plot_reconstructions(grids, titles, images=inputs, contrast=contrast)
                written += write_figure(folder / f"{number}-{safe_name('-'.join(dict.fromkeys(own)))}", figure, formats)
    return written


def _source(data: Any, split: str | None, index: int | None, image: str | Path | None, *, skip_bad: bool) -> _Source:
    images = None
    if isinstance(data, str | Path):
        images = load_images(data, split, skip_bad=skip_bad)
    elif data is not None:
        images = as_images(data)
    if image is not None:
        return _Source(Images.from_arrays(load_image(image)[None]), Path(image).name, images)
    assert images is not None
    index = index or 0
    if not 0 <= index < len(images):
        raise InputError(f"index must be within 0 and {len(images) - 1}, the images of {images.name}, got {index}")
    label = "" if images.labels is None else f" ({images.classes[images.labels[index]]})"
    return _Source(images[index : index + 1], f"image {index}{label}", images)


def _rgb(pictures: Tensor, network: Network) -> np.ndarray:
    """Reconstructions [M, C, H, W] with red first."""
    return (pictures.flip(1) if network.bgr else pictures).numpy()


def _top(  # noqa: PLR0917 - what there is to draw
    path: Path, network: Network, layer: str, images: Images, count: int, top: int, formats: Sequence[str]
) -> list[Path]:
    """The figure and the arrays of the images that activate some of the `count` maps most."""
    maps = np.unique(np.linspace(0, count - 1, min(SHOWN, count)).round().astype(int)).tolist()
    best = Deconvnet(network).top_activations(images, layer, k=top, maps=maps)
    arrays = {name: getattr(best, name).numpy() for name in TopActivations.__dataclass_fields__}
    path = path.with_name(f"{path.name}-top")
    about = {"network": network.name, "weights": network.source, "layer": layer, "mode": "deconvnet"}
    _save(path, about, **arrays)
    k = best.images.shape[1]
    title = f"{network.name} {layer}: {len(maps)} maps, the {k} images that activate each most, contrast per picture"
    found = best.reconstructions.flip(2) if network.bgr else best.reconstructions
    figure, _ = pictures.plot_top(best.patches.numpy(), found.numpy(), maps, title)
    written = write_figure(path, figure, formats)
    logger.info("%s: %d of %d maps, %d images of %d each", written[0], len(maps), count, k, len(images))
    return written


def _save(path: Path, about: dict[str, Any], **arrays: np.ndarray) -> None:
    versions = {"qdv_gpu": qdv_gpu.__version__, "torch": torch.__version__}
    settings = {key: np.array(value) for key, value in {**about, **versions}.items()}
    # numpy's own savez_compressed takes three times as long for files a few percent smaller.
    path = path.with_name(f"{path.name}.npz")
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, array in (arrays | settings).items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(array, order="C"))
