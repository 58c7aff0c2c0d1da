"""Deconvnet pictures of networks' layers, written to a folder."""

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
from qdv_gpu.data.images import Images, check_data, load_image, load_images
from qdv_gpu.deconv.deconvnet import MODES, Deconvnet, TopActivations
from qdv_gpu.errors import InputError, unknown
from qdv_gpu.features.forward import Report
from qdv_gpu.files import replacing
from qdv_gpu.machine import resolve_device
from qdv_gpu.networks.layers import trace_calls
from qdv_gpu.networks.network import Network, load_networks, select_layers
from qdv_gpu.report import figures

SHOWN = 24  # maps in a figure of strongest patches


@dataclass(frozen=True)
class _Source:
    """The image to reconstruct from, and the images to search for the strongest patches."""

    image: Tensor  # uint8 [C, H, W]
    name: str
    images: Images | None


def picture(
    networks: Sequence[str | Network],
    out: str | Path,
    *,
    data: str | Path | None = None,
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
    report: Report = print,
) -> list[Path]:
    """Reconstruct every map of every layer from one image, and write the pictures below `out`/deconv.

    Parameters
    ----------
    networks : sequence of str or Network
        As for `load_network`; those after the first are set beside it, layer by layer in order.
    out : str or Path
        Gets deconv/<network>/<layer>.png, a labelled grid of all maps, and .npz, the raw arrays; with several
        networks deconv/<number>-<layer>.png with all of them side by side; with `top`
        deconv/<network>/<layer>-top.png and -top.npz.
    data : str or Path, optional
        As for `load_images`; its test split.
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
    if contrast not in figures.CONTRASTS:
        raise unknown("contrast", contrast, figures.CONTRASTS)
    if top < 0:
        raise InputError(f"top must be at least 0, got {top}")
    if image_size is not None and image_size < 1:
        raise InputError(f"image size must be at least 1 pixel, got {image_size}")
    if image is not None and index is not None:
        raise InputError("an image file and an index were given: one of them is required")
    if data is None and (image is None or top):
        raise InputError("data is required, for the image by its index and for the strongest patches")
    if data is not None:
        check_data(data)
    loaded = load_networks(networks, weights=weights, device=resolve_device(device))
    plain = (
        None
        if layers is None
        else [
            layer if any(network.has(layer) for network in loaded) else loaded[0].without_call(layer)
            for layer in layers
        ]
    )
    selected = select_layers(loaded, plain)
    source = _source(data, index, image, image_size, skip_bad=skip_bad)
    folder = Path(out) / "deconv"
    written: list[Path] = []
    rows: list[list[Any]] = []  # of a network: reconstructions, layer and title of each
    for network, names in zip(loaded, selected, strict=True):
        sized = network if image_size is None else replace(network, image_size=image_size)
        rows.append([])
        asked = [layer for layer, name in zip(layers or [], plain or [], strict=True) if name in names]
        pixels = _gray(source.image) if network.channels == 1 else source.image
        for layer in asked or _each_call(sized, names):
            found = Deconvnet(sized).reconstruct(pixels, layer, mode=mode).cpu()
            title = f"{network.name} {layer}: {len(found)} maps from {source.name}, {mode}, contrast per {contrast}"
            rows[-1].append((found if len(loaded) > 1 else None, layer, title))
            about = {"network": network.name, "weights": network.source, "layer": layer, "mode": mode}
            _save(
                folder / network.name / f"{layer}.npz", about, reconstructions=found.numpy(), image=source.image.numpy()
            )
            written.append(folder / network.name / f"{layer}.png")
            _draw(written[-1], figures.plot_reconstructions([_rgb(found, network)], [title], contrast=contrast))
            report(f"{written[-1]}: {len(found)} maps")
            if top and source.images is not None:
                written.append(folder / network.name / f"{layer}-top.png")
                count = len(found)
                maps = np.unique(np.linspace(0, count - 1, min(SHOWN, count)).round().astype(int)).tolist()
                best = Deconvnet(sized).top_activations(source.images, layer, k=top, maps=maps)
                _top(written[-1], best, sized, layer, about | {"mode": "deconvnet"})
                report(f"{written[-1]}: {len(maps)} of {count} maps, {top} images of {len(source.images):,} each")
    if len(loaded) > 1:
        for number, row in enumerate(zip(*rows, strict=False), start=1):
            name = "-".join(dict.fromkeys(layer for _, layer, _ in row))
            written.append(folder / f"{number}-{name}.png")
            grids = [_rgb(found, network) for (found, _, _), network in zip(row, loaded, strict=False)]
            _draw(written[-1], figures.plot_reconstructions(grids, [title for *_, title in row], contrast=contrast))
    return written


def _each_call(network: Network, layers: Mapping[str, str]) -> list[str]:
    """The layers, one that is called several times as "name@1", "name@2", ..."""
    calls = Counter(call.path for call in trace_calls(network))
    return [
        f"{layer}@{number}" if calls[path] > 1 else layer
        for layer, path in layers.items()
        for number in range(1, calls[path] + 1)
    ]


def _gray(image: Tensor) -> Tensor:
    """uint8 [1, H, W] of an image [C, H, W], by the luma of ITU-R BT.601."""
    if len(image) == 1:
        return image
    return (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True).round().to(torch.uint8)


def _source(
    data: str | Path | None, index: int | None, image: str | Path | None, size: int | None, *, skip_bad: bool
) -> _Source:
    images = None if data is None else load_images(data, "test", image_size=size, skip_bad=skip_bad)
    if image is not None:
        return _Source(load_image(image), Path(image).name, images)
    assert images is not None
    index = index or 0
    if not 0 <= index < len(images):
        raise InputError(f"index must be within 0 and {len(images) - 1}, the test images of {images.name}, got {index}")
    (pixels,) = images.batches([torch.tensor([index])], torch.device("cpu"))
    return _Source(pixels[0], f"test image {index} ({images.classes[images.labels[index]]})", images)


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
    pictures = best.reconstructions.flip(2) if network.bgr else best.reconstructions
    _draw(path, figures.plot_top(best.patches.numpy(), pictures.numpy(), best.maps.tolist(), title))


def _save(path: Path, about: dict[str, Any], **arrays: np.ndarray) -> None:
    versions = {"qdv_gpu": qdv_gpu.__version__, "torch": torch.__version__}
    settings = {key: np.array(value) for key, value in {**about, **versions}.items()}
    # numpy's own savez_compressed takes three times as long for files a few percent smaller.
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, array in (arrays | settings).items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(array, order="C"))


def _draw(path: Path, figure: Figure) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary)
