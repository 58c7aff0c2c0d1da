"""Deconvnet: what in an image made the maps of a layer respond (Zeiler & Fergus 2014)."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdv_gpu.arrays import constants
from qdv_gpu.data.convert import as_images
from qdv_gpu.data.decode import image_tensor, load_image
from qdv_gpu.data.images import Images
from qdv_gpu.deconv.backward import back_to_image
from qdv_gpu.deconv.nodes import shape
from qdv_gpu.deconv.record import Record, record_forward
from qdv_gpu.deconv.windows import Signal, Window, all_of
from qdv_gpu.errors import InputError, check_among, check_count, listed, short
from qdv_gpu.features.forward import ForwardPass, network_input
from qdv_gpu.machine import exact_convolutions, free_memory
from qdv_gpu.networks.layers import LayerName
from qdv_gpu.networks.load import Source, load_network
from qdv_gpu.networks.variant import home

MODES = ("deconvnet", "deconvnet-map", "guided", "gradient")
CPU_MAPS = 32  # in one batch on a CPU: more would not stay in its caches
IMAGES = 16  # of a data set that go back together


@dataclass(frozen=True)
class TopActivations:
    """The images that activate each map of a layer most.

    Attributes
    ----------
    values : Tensor
        float32 [maps, k], falling.
    images : Tensor
        int64 [maps, k]: positions in the data set.
    places : Tensor
        int64 [maps, k, 2]: row and column of the unit.
    fields : Tensor
        int64 [pictured, k, 4]: top, left, bottom and right of the unit's receptive field in the network's input, bottom
        and right excluded; cut at the edges of the image. All of the image where the network does something, such as
        a shuffle of pixels, from which fields are not known.
    patches : Tensor
        uint8 [pictured, k, C, h, w]: the receptive field in the image, red first, 0 beyond the edges; all of the image
        if the field is larger in height or width.
    reconstructions : Tensor
        float32 [pictured, k, C, h, w]: the same part of the reconstruction, in the network's order of channels.
    maps : Tensor
        int64 [pictured]: the maps that fields, patches and reconstructions are of.
    """

    values: Tensor
    images: Tensor
    places: Tensor
    fields: Tensor
    patches: Tensor
    reconstructions: Tensor
    maps: Tensor


@dataclass(frozen=True)
class SanityCheck:
    """How much reconstructions depend on the weights.

    Attributes
    ----------
    modules : list of str
        In the order in which their weights were shuffled, the layer's own first; all stay shuffled.
    similarity : Tensor
        float32 [len(modules), maps]: Pearson correlation of the sizes of the pixels before and after; NaN for a map
        whose reconstruction is 0 on either side.
    """

    modules: list[str]
    similarity: Tensor

    @property
    def mean(self) -> list[float]:
        """The similarity after each step, averaged over the maps."""
        return self.similarity.nanmean(dim=1).tolist()


class Deconvnet:
    """Reconstructions from the maps of a network's layers.

    Parameters
    ----------
    network : str, nn.Module or Network
        As for `load_network`. Any graph of convolutions, ReLUs, max- and average-pooling, batch and
        local response normalisation, sums and concatenations, however it is written; other non-linear functions have no
        rule in a Deconvnet. Nothing of it is changed.
    """

    def __init__(self, network: Source) -> None:
        self.network = load_network(network, device=home(network))

    @exact_convolutions()
    def reconstruct(
        self, image: Tensor, layer: str, *, maps: int | Iterable[int] | None = None, mode: str = "deconvnet"
    ) -> Tensor:
        """Project maps of a layer back to the pixels, all in one batch after one forward pass.

        Parameters
        ----------
        image : array, PIL image or path
            uint8 [C, H, W], resized and normalised as the network wants it, or float [C, H, W] that already is; else
            as for `image_tensor` and `load_image`.
        layer : str
            A layer name or module path; "name@2" for the second call of a module that is used several times.
        maps : int, slice or sequence of int, optional
            Default all.
        mode : {"deconvnet", "deconvnet-map", "guided", "gradient"}
            "deconvnet": from the strongest unit of each map, rectified at each ReLU (Zeiler & Fergus 2014);
            "deconvnet-map": from all of the map; "guided": from ones on all of the map, rectified by gradient and
            activation (Springenberg et al. 2015), as the figures of Wang & Liu (CIKM 2024) are; "gradient": the plain
            gradient of the strongest unit.

        Returns
        -------
        Tensor
            [maps, C, H, W] on the network's device, of its dtype, size and order of channels.

        Raises
        ------
        InputError
            If the layer is unknown or has no maps, a map is out of range, the image has the wrong channels, NaN or
            infinity, or it has an activation without a rule; the message names its
            module. Masks made by comparing (`x * (x > 0)`) cannot be told from constants and are not found.
        """
        check_among("mode", mode, MODES)
        record = record_forward(self.network, self._input(image), layer, mode)
        chosen = self._maps(maps, record.activations.shape[1])
        values, places = record.activations[0, chosen].flatten(1).max(dim=1)
        if mode == "deconvnet-map":
            seeds = record.activations[0, chosen]
        elif mode == "guided":
            seeds = torch.ones_like(record.activations[0, chosen])
        else:
            seeds = (values if mode == "deconvnet" else torch.ones_like(values))[:, None, None]
        strongest = torch.stack((places // record.activations.shape[3], places % record.activations.shape[3]), dim=1)
        start = strongest if seeds.shape[1:] == (1, 1) else None
        result = record.images.new_empty(len(chosen), *record.images.shape[1:])
        which = torch.zeros_like(chosen)
        for block, signal in self._blocks(record, which, chosen, start, seeds, mode=mode):
            result[block] = signal.whole(result.shape[2:])
        return result

    @exact_convolutions()
    def top_activations(
        self,
        images: Any,
        layer: str,
        *,
        k: int = 9,
        maps: int | Iterable[int] | None = None,
        image_size: int | None = None,
    ) -> TopActivations:
        """The k images that activate each map most, with patch and reconstruction (Zeiler & Fergus 2014, figure 2).

        Parameters
        ----------
        images : Images, or anything that `as_images` takes
            One pass over all of them.
        layer : str
        k : int
            Images for each map, each counted once.
        maps : int, slice or sequence of int, optional
            Maps to make patches and reconstructions of; default all.
        image_size : int, optional
            Side in pixels that the images are resized to; default the network's.

        Returns
        -------
        TopActivations
            On the CPU.

        Raises
        ------
        InputError
            As `reconstruct`, or if k is not within 1 and the number of images.
        """
        images = as_images(images)
        k = check_count("k", k, most=len(images))
        first = record_forward(self.network, self._load(images, torch.tensor([0]), image_size), layer, "deconvnet")
        shape = first.activations.shape[1:]
        chosen = self._maps(maps, shape[0])
        values, best, places = self._rank(images, layer, k, image_size, shape)

        found = self._pictures(
            images, layer, image_size, best[chosen].flatten().cpu(), chosen.repeat_interleave(k),
            places[chosen].flatten(0, 1), together=IMAGES if first.batched else 1,
        )  # fmt: skip
        fields, patches, reconstructions = (part.unflatten(0, (-1, k)) for part in found)
        return TopActivations(
            values.cpu(), best.cpu(), places.cpu(), fields, patches, reconstructions, maps=chosen.cpu()
        )

    def _pictures(  # noqa: PLR0917 - of which units of what
        self, images: Images, layer: str, image_size: int | None, owners: Tensor, maps: Tensor, places: Tensor, *,
        together: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Fields [n, 4], patches and reconstructions [n, C, h, w], on the CPU, of n units.

        Parameters
        ----------
        owners, maps : Tensor
            int64 [n]: the image and the map of each unit; `owners` are on the CPU.
        places : Tensor
            int64 [n, 2].
        together : int
            Images that go forward and back in one batch.
        """
        fields: Tensor | None = None
        for group in owners.unique().split(together):
            own = torch.isin(owners, group).nonzero()[:, 0]
            rows, which = (t.to(maps.device) for t in (own, torch.searchsorted(group, owners[own])))
            record = record_forward(self.network, self._load(images, group, image_size), layer, "deconvnet")
            size, pixels = record.images.shape[2:], self._pixels(record.images)
            unit, spots = maps[rows], places[rows]
            seeds = record.activations[which, unit, spots[:, 0], spots[:, 1]][:, None, None]
            for block, signal in self._blocks(record, which, unit, spots, seeds, mode="deconvnet"):
                image = all_of(size, spots[block])
                field = signal.field or image
                shown = field if field.size[0] <= size[0] and field.size[1] <= size[1] else image
                if fields is None:
                    fields = torch.empty(len(owners), 4, dtype=torch.int64)
                    patches = torch.empty(len(owners), pixels.shape[1], *shown.size, dtype=torch.uint8)
                    reconstructions = torch.empty(patches.shape)
                at = own[block]
                ends = torch.minimum(field.end, constants(size, field.start.device))
                fields[at] = torch.cat((field.start.clamp(min=0), ends), dim=1).cpu()
                patches[at] = shown.crop(pixels, which[block]).cpu()
                reconstructions[at] = signal.within(shown).float().cpu()
        assert fields is not None
        return fields, patches, reconstructions

    @exact_convolutions()
    def sanity_check(
        self, image: Tensor, layer: str, *, maps: int | Iterable[int] | None = None, seed: int = 0
    ) -> SanityCheck:
        """Shuffle the weights below a layer, module by module from the layer down, and reconstruct again.

        A picture that stays the same shows the image and not what the network has learnt (Adebayo et al. 2018). The
        units stay those that are strongest before the first step, and their seeds are 1. A module's parameters are
        shuffled each within itself, which keeps their scale.

        Parameters
        ----------
        image, layer, maps
            As for `reconstruct`.
        seed : int
            Of the shuffling.
        """
        pixels, module = self._input(image), self.network.module
        record = record_forward(self.network, pixels, layer, "deconvnet")
        chosen = self._maps(maps, record.activations.shape[1])
        w = record.activations.shape[3]
        places = record.activations[0, chosen].flatten(1).argmax(dim=1)
        start, seeds = torch.stack((places // w, places % w), dim=1), pixels.new_ones(len(chosen), 1, 1)

        def sizes(record: Record) -> Tensor:
            """Of the pixels, centred and of norm 1: [maps, pixels]."""
            which = torch.zeros_like(chosen)
            parts = self._blocks(record, which, chosen, start, seeds, mode="deconvnet")
            found = torch.cat([signal.whole(pixels.shape[2:]) for _, signal in parts]).abs_().flatten(1)
            found -= found.mean(dim=1, keepdim=True)
            return found.div_(found.norm(dim=1, keepdim=True))

        modules = [path for path in record.modules if [*module.get_submodule(path).parameters(recurse=False)]]
        if not modules:
            raise InputError(f"layer {layer} of {self.network.name} has no weights below it to shuffle")
        before, similarity = sizes(record), []
        shuffled = copy.deepcopy(module)
        other = replace(self.network, module=shuffled)
        generator = torch.Generator().manual_seed(check_count("seed", seed, least=0))
        for path in modules:
            for parameter in shuffled.get_submodule(path).parameters(recurse=False):
                order = torch.randperm(parameter.numel(), generator=generator, device="cpu").to(parameter.device)
                parameter.data = parameter.data.flatten()[order].view_as(parameter)
            after = sizes(record_forward(other, pixels, layer, "deconvnet"))
            similarity.append((before * after).sum(dim=1).cpu())
        return SanityCheck(modules, torch.stack(similarity).float())

    def _rank(
        self, images: Images, layer: str, k: int, image_size: int | None, shape: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values [C, k], images [C, k] and places [C, k, 2] of the strongest units of maps of `shape` (C, h, w)."""
        C, h, w = shape
        layers = self.network.select([LayerName.parse(layer).path])
        tiles = ForwardPass(self.network, images, layers, image_size).tiles(layer)
        kept: tuple[Tensor, ...] = ()  # values, images and places so far, each [at most k, C]
        seen = 0
        for rows in tiles:
            values, places = rows.view(len(rows), C, h * w).max(dim=2)
            owners = torch.arange(seen, seen + len(rows), device=rows.device)[:, None].expand_as(places)
            seen += len(rows)
            new = (values, owners, places)
            kept = tuple(torch.cat(pair) for pair in zip(kept, new, strict=True)) if kept else new
            order = kept[0].argsort(dim=0, descending=True, stable=True)[:k]
            kept = tuple(t.gather(0, order) for t in kept)
        values, owners, places = (t.T for t in kept)
        return values, owners, torch.stack((places // w, places % w), dim=2)

    def _input(self, image: Tensor) -> Tensor:
        """An image [C, H, W] as the network's input [1, C, H, W]."""
        channels = self.network.channels
        if isinstance(image, str | Path):
            image = load_image(image)
        elif not isinstance(image, Tensor):
            image = image_tensor(image)
        if image.ndim != 3:
            raise InputError(f"an image must have shape [C, H, W], got {list(image.shape)}")
        if not image.is_floating_point():
            if image.dtype != torch.uint8:
                raise InputError(f"an image must be uint8 or floating point, got {image.dtype}")
            return network_input(self.network, image[None].to(self.network.device))
        if len(image) != channels:
            raise InputError(f"{self.network.name} takes {channels}-channel images, got {len(image)} channels")
        if not image.isfinite().all():
            raise InputError("an image must be finite, got NaN or infinity")
        return image[None].to(self.network.device, self.network.dtype)

    def _load(self, images: Images, positions: Tensor, image_size: int | None) -> Tensor:
        """Images of a data set as the network's input."""
        (pixels,) = images.batches([positions], self.network.device)
        return network_input(self.network, pixels, image_size)

    def _pixels(self, inputs: Tensor) -> Tensor:
        """The network's input [I, C, H, W] as pixels, uint8, red first."""
        mean, std = (
            constants(values, inputs.device, inputs.dtype)[:, None, None]
            for values in (self.network.mean, self.network.std)
        )
        pixels = inputs.flip(1) if self.network.bgr else inputs
        return ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def _maps(self, maps: int | Iterable[int] | None, count: int) -> Tensor:
        """The maps asked for, int64 [M] on the network's device."""
        allowed = f"maps must be some of 0 to {count - 1}"
        chosen: Any = maps.tolist() if hasattr(type(maps), "tolist") else maps  # type: ignore[union-attr]  # an array's
        try:
            if chosen is None or isinstance(chosen, slice):
                numbers: list[Any] = list(range(count)[chosen or slice(None)])
            else:
                numbers = [chosen] if isinstance(chosen, int) else listed("maps", chosen)
        except (TypeError, ValueError):
            raise InputError(f"{allowed}, got {short(maps)}") from None
        for number in numbers:
            whole = hasattr(number, "__index__") and not (isinstance(number, Tensor) and number.is_floating_point())
            if isinstance(number, bool) or not whole or not 0 <= number < count:
                raise InputError(f"{allowed}, got {short(number)}")
        if not numbers:
            raise InputError(f"{allowed}, got none")
        return torch.tensor([int(number) for number in numbers], device=self.network.device)

    def _blocks(
        self, record: Record, which: Tensor, maps: Tensor, start: Tensor | None, seeds: Tensor, *, mode: str
    ) -> Iterator[tuple[slice, Signal]]:
        """Signals at the image of as many maps at a time as memory allows, and which these are.

        Parameters
        ----------
        which : Tensor
            int64 [M]: the image that a map is of.
        maps : Tensor
            int64 [M].
        start : Tensor or None
            int64 [M, 2]: the place of the seed; None if it is all of the map.
        seeds : Tensor
            [M, h, w].
        """
        C = record.activations.shape[1]
        largest = max(math.prod(shape(node)[1:]) for node in record.nodes)
        room = free_memory(record.images.device) // 4
        most = max(1, room // (4 * largest * record.images.element_size() * len(record.images)))
        if record.images.device.type == "cpu":
            most = min(most, CPU_MAPS)
        for low in range(0, len(maps), most):
            block = slice(low, min(low + most, len(maps)))
            data = seeds.new_zeros(block.stop - low, C, *seeds.shape[1:])
            data[torch.arange(len(data), device=data.device), maps[block]] = seeds[block]
            if start is None:
                whole = all_of(data.shape[2:], which[block, None].expand(-1, 2))
                signal = Signal(data, None, whole)
            else:
                window = Window(start[block], (1, 1))
                signal = Signal(data, window, window)
            yield block, back_to_image(record, which[block], signal, mode)
