"""Networks by name, with named layers."""

import importlib
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdv_gpu.errors import InputError, unknown
from qdv_gpu.machine import resolve_device
from qdv_gpu.networks.layers import default_layers, head_path
from qdv_gpu.networks.weights import Tensors, read_weights
from qdv_gpu.networks.zoo import CaffeAlexNet, ZFNet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_OWN: dict[str, Callable[[], nn.Module]] = {"caffe_alexnet": CaffeAlexNet, "zfnet": ZFNet}
_AUXILIARY = ("googlenet", "inception_v3")  # have side heads for training, which are left out


@dataclass
class Network:
    """A network in evaluation mode with what is needed to feed it and to name its layers.

    Attributes
    ----------
    spec : str
        What it was loaded by: a name or "package.module:factory".
    source : str
        Where its weights are from: a file, "imagenet" or "none".
    name : str
        Its label in tables and file names.
    module : nn.Module
    layers : dict of str to str
        The default layers: name to dotted module path, in forward order.
    image_size : int
        Side of the square input in pixels that it was made or trained for.
    channels : int
        Input channels.
    mean, std : tuple of float
        Of the channels, for pixels in 0..1.
    bgr : bool
        Whether it takes blue first.
    metadata : dict
        What its checkpoint says of the fine-tuning; empty otherwise.
    """

    spec: str
    source: str
    name: str
    module: nn.Module
    layers: dict[str, str]
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool
    metadata: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its first parameter, and of the images that it takes."""
        return next(self.module.parameters()).dtype

    def has(self, layer: str) -> bool:
        """Whether `layer` is a layer name or a module path of this network."""
        return layer in self.layers or layer in dict(self.module.named_modules())

    def without_call(self, layer: str) -> str:
        """ "relu" for "relu@2", the second call of a module that is used several times."""
        return layer if self.has(layer) else layer.rpartition("@")[0] or layer

    def select(self, layers: Iterable[str] | None = None) -> dict[str, str]:
        """Map layer names (or dotted module paths) to module paths; None selects the default layers.

        Raises
        ------
        InputError
            For a name that the network does not have, with close matches.
        """
        if layers is None:
            return dict(self.layers)
        selected: dict[str, str] = {}
        for layer in layers:
            if not layer or not self.has(layer):
                paths = [path for path, _ in self.module.named_modules() if path]
                raise unknown(f"layer of {self.name}", layer, [*self.layers, *paths])
            selected[layer] = self.layers.get(layer, layer)
        if not selected:
            raise InputError(f"at least one layer of {self.name} is required")
        return selected


def network_names() -> list[str]:
    """Names that `load_network` knows: our own and torchvision's classifiers."""
    import torchvision

    return sorted([*_OWN, *torchvision.models.list_models(module=torchvision.models)])


def load_network(
    spec: str | nn.Module,
    *,
    weights: str | Path = "imagenet",
    num_classes: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> Network:
    """Load a network in evaluation mode.

    Parameters
    ----------
    spec : str or nn.Module
        A torchvision classifier ("alexnet", "vgg19", ...), "caffe_alexnet", "zfnet", a module of yours, or
        "package.module:factory", where `factory()` returns an `nn.Module` that takes images [B, C, H, W]; its
        attributes `image_size`, `image_mean`, `image_std` (pixels in 0..1), `bgr` and `named_layers` (a dict of
        name to module path: its default layers) are used where it has them, as are those of a module.
        "SPEC=FILE" names the weights too; FILE may be the output folder of `qdv-gpu finetune`.
    weights : str or Path
        "imagenet" (torchvision's), "none" (random, from `seed`) or a `.safetensors`, `.pt` or (caffe_alexnet)
        `.npy` file. With "imagenet" or "none" a factory's network is left as the factory made it.
    num_classes : int, optional
        Replace the head by a new one for that many classes. AlexNet gets the paper's: one linear layer on
        maxpool5.

    Raises
    ------
    InputError
        For an unknown network, weights that do not fit it, are damaged or cannot be downloaded.
    """
    given = spec if isinstance(spec, nn.Module) else None
    spec, _, checkpoint = (type(spec).__name__ if isinstance(spec, nn.Module) else spec).partition("=")
    source = _weights_file(checkpoint) if checkpoint else weights
    from_file = str(source) not in ("imagenet", "none")
    state, metadata = read_weights(source) if from_file else ({}, {})
    if metadata.get("network", spec) != spec:
        raise InputError(f"checkpoint {source} holds {metadata['network']}, not {spec}")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _build(spec, imagenet=str(source) == "imagenet") if given is None else given
        if from_file:
            _load_state(module, state, spec, source)
        if num_classes is not None and _head_classes(module) != num_classes:
            _replace_head(module, spec, num_classes)
    image_size = int(metadata.get("image_size") or getattr(module, "image_size", None) or 224)
    convolution = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if convolution is None else convolution.in_channels
    gray = channels == 1
    network = Network(
        spec=spec,
        source=str(source),
        name=re.sub(r"[^\w.-]", "_", spec.rpartition(":")[2]),
        module=module.eval().to(resolve_device(device)),
        layers={},
        image_size=image_size,
        channels=channels,
        mean=tuple(getattr(module, "image_mean", (0.5,) if gray else IMAGENET_MEAN)),
        std=tuple(getattr(module, "image_std", (0.5,) if gray else IMAGENET_STD)),
        bgr=bool(getattr(module, "bgr", False)),
        metadata=metadata,
    )
    network.layers = default_layers(network)
    return network


def load_networks(
    networks: Sequence[str | Network], *, weights: str | Path = "imagenet", device: str | torch.device = "auto"
) -> list[Network]:
    """Load several networks, as `load_network`, with names that tell them apart.

    Networks of one name get the folder or file of their weights added, or else a number. A `Network` is taken as it is,
    on `device`.

    Raises
    ------
    InputError
        If there is none, or as `load_network`.
    """
    if not networks:
        raise InputError("at least one network is required")
    target = resolve_device(device)
    loaded = [
        load_network(network, weights=weights, device=target)
        if isinstance(network, str)
        else replace(network, module=network.module.to(target).eval())
        for network in networks
    ]
    names = [network.name for network in loaded]
    for position, network in enumerate(loaded):
        path = Path(network.source)
        stem = path.parent.name if path.name == "weights.safetensors" else path.stem
        if path.suffix and [other.name for other in loaded].count(network.name) > 1:
            names[position] = f"{network.name}-{stem}"
    taken = list(names)
    for position, name in enumerate(names):
        if names.count(name) > 1:
            taken[position] = f"{name}-{names[: position + 1].count(name)}"
    return [replace(network, name=name) for network, name in zip(loaded, taken, strict=True)]


def select_layers(networks: Sequence[Network], layers: Sequence[str] | None) -> list[dict[str, str]]:
    """The layers of each network, of those asked for; each must be in some network, and each network have one."""
    if layers is None or len(networks) == 1:
        return [network.select(layers) for network in networks]
    has = [[layer for layer in layers if network.has(layer)] for network in networks]
    for layer in layers:
        if not any(layer in own for own in has):
            networks[0].select([layer])
    return [network.select(own) for network, own in zip(networks, has, strict=True)]


def _weights_file(checkpoint: str) -> Path:
    path = Path(checkpoint)
    if not path.is_dir():
        return path
    if not (path / "weights.safetensors").is_file():
        raise InputError(f"{path} holds no weights.safetensors: finish `qdv-gpu finetune --out {path}` first")
    return path / "weights.safetensors"


def _build(spec: str, *, imagenet: bool) -> nn.Module:
    if ":" in spec:
        return _from_factory(spec)
    if spec in _OWN:
        if imagenet:
            raise InputError(
                f"{spec} has no ImageNet weights to download: pass --weights FILE"
                + (" (bvlc_alexnet.npy)" if spec == "caffe_alexnet" else "")
                + " or --weights none"
            )
        return _OWN[spec]()
    names = network_names()
    if spec not in names:
        raise unknown("network", spec, names)
    import torchvision

    builder = torchvision.models.get_model_builder(spec)
    if not imagenet:
        without_auxiliary = {"aux_logits": False, "init_weights": True} if spec in _AUXILIARY else {}
        return builder(weights=None, **without_auxiliary)
    weights = torchvision.models.get_model_weights(spec).DEFAULT
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    try:
        _download(weights.url, file)
        with _only_tensors():
            module = builder(weights=weights)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"the ImageNet weights of {spec} could not be downloaded or read ({error}): "
            f"put {file.name} into {file.parent}, or pass --weights none"
        ) from None
    module.image_size = weights.transforms().crop_size[0]
    return module


def _download(url: str, file: Path) -> None:
    """Fetch `url` unless `file` is there; either way its SHA-256 must begin as its name says (name-HASH.pth)."""
    prefix = file.stem.rpartition("-")[2]
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=prefix, progress=sys.stderr.isatty())
    elif not sha256(file.read_bytes()).hexdigest().startswith(prefix):
        raise RuntimeError(f"{file} is damaged: its hash is not the one in its name")


@contextmanager
def _only_tensors() -> Iterator[None]:
    """Have torch.load unpickle nothing but tensors, also where torchvision calls it."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _from_factory(spec: str) -> nn.Module:
    module_name, _, factory_name = spec.partition(":")
    if "" not in sys.path:
        sys.path.append("")  # the current folder may hold the factory
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, ValueError) as error:
        raise InputError(f"network {spec}: {module_name} cannot be imported ({error})") from None
    except AttributeError:
        raise InputError(f"network {spec}: {module_name} has no {factory_name!r}") from None
    module = factory() if callable(factory) else factory
    if not isinstance(module, nn.Module):
        raise InputError(f"network {spec}: the factory must return an nn.Module, got {type(module).__name__}")
    return module


def _load_state(module: nn.Module, state: Tensors, spec: str, source: str | Path) -> None:
    if spec in _AUXILIARY:
        state = {name: tensor for name, tensor in state.items() if not name.lower().startswith("aux")}
        for name in [name for name in module._modules if name.lower().startswith("aux")]:
            setattr(module, name, None)
        setattr(module, "aux_logits", False)  # noqa: B010 (mypy takes a plain assignment for a submodule)
    head = head_path(module)
    for path in ("classifier", head):  # "classifier" alone is AlexNet's head after fine-tuning
        weight = state.get(f"{path}.weight")
        if weight is not None and weight.shape[0] != _head_classes(module):
            _replace_head(module, spec, weight.shape[0])
    own = module.state_dict()
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misfits = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    for problem, names in (
        ("lacks", missing),
        ("has no place for", surplus),
        ("has another shape of", sorted(misfits)),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"weights {source} do not fit {spec}: the file {problem} {names[0]}{more}")
    module.load_state_dict(state)


def _head_classes(module: nn.Module) -> int:
    head = module.get_submodule(head_path(module))
    return head.out_features if isinstance(head, nn.Linear) else head.out_channels  # type: ignore[return-value]  # one of the two


def _replace_head(module: nn.Module, spec: str, num_classes: int) -> None:
    if spec in ("alexnet", "caffe_alexnet"):
        module.classifier = nn.Linear(9216, num_classes)
        return
    path = head_path(module)
    old = module.get_submodule(path)
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    else:
        assert isinstance(old, nn.Conv2d)
        size, stride, padding = old.kernel_size, old.stride, old.padding
        new = nn.Conv2d(old.in_channels, num_classes, size, stride, padding)  # type: ignore[arg-type]  # pairs
    module.set_submodule(path, new)
