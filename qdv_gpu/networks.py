"""Networks by name, with named layers."""

import importlib
import itertools
import re
import sys
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdv_gpu.architectures import CaffeAlexNet, ZFNet
from qdv_gpu.device import resolve_device
from qdv_gpu.errors import InputError, unknown
from qdv_gpu.weights import Tensors, read_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_OWN: dict[str, Callable[[], nn.Module]] = {"caffe_alexnet": CaffeAlexNet, "zfnet": ZFNet}
# The paper's layers (Wang & Liu, CIKM 2024, Table 3); a conv layer is taken after its ReLU.
_NAMED_LAYERS = {
    "alexnet": {"maxpool1": 2, "maxpool2": 5, "conv3": 7, "conv4": 9, "maxpool5": 12},
    "caffe_alexnet": {"maxpool1": 3, "maxpool2": 7, "conv3": 9, "conv4": 11, "maxpool5": 14},
    "zfnet": {"maxpool1": 2, "maxpool2": 6, "conv3": 9, "conv4": 11, "maxpool5": 14},
}

_KINDS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout)


@dataclass
class Network:
    """A network in evaluation mode with what is needed to feed it and to name its layers.

    Attributes
    ----------
    spec : str
        What it was loaded by: a name or "package.module:factory".
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

    def select(self, layers: Iterable[str] | None = None) -> dict[str, str]:
        """Map layer names (or dotted module paths) to module paths; None selects the default layers.

        Raises
        ------
        InputError
            For a name that the network does not have, with close matches.
        """
        if layers is None:
            return dict(self.layers)
        paths = {path for path, _ in self.module.named_modules() if path}
        selected: dict[str, str] = {}
        for layer in layers:
            if layer not in self.layers and layer not in paths:
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
    spec: str,
    *,
    weights: str | Path = "imagenet",
    num_classes: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> Network:
    """Load a network in evaluation mode.

    Parameters
    ----------
    spec : str
        A torchvision classifier ("alexnet", "vgg19", ...), "caffe_alexnet", "zfnet" or
        "package.module:factory", where `factory()` returns an `nn.Module` that takes images [B, C, H, W]; its
        attributes `image_size`, `image_mean`, `image_std` (pixels in 0..1) and `bgr` are used where it has them.
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
    spec, _, checkpoint = spec.partition("=")
    source = _weights_file(checkpoint) if checkpoint else weights
    from_file = str(source) not in ("imagenet", "none")
    state, metadata = read_weights(source) if from_file else ({}, {})
    if metadata.get("network", spec) != spec:
        raise InputError(f"checkpoint {source} holds {metadata['network']}, not {spec}")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _build(spec, imagenet=str(source) == "imagenet")
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
    network.layers = _default_layers(network)
    return network


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
        without_auxiliary = {"aux_logits": False, "init_weights": True} if spec in ("googlenet", "inception_v3") else {}
        return builder(weights=None, **without_auxiliary)
    weights = torchvision.models.get_model_weights(spec).DEFAULT
    try:
        module = builder(weights=weights, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, EOFError) as error:
        file = weights.url.rpartition("/")[2]
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise InputError(
            f"the ImageNet weights of {spec} could not be downloaded or read ({error}): "
            f"put {file} into {folder}, or pass --weights none"
        ) from None
    module.image_size = weights.transforms().crop_size[0]
    return module


def _from_factory(spec: str) -> nn.Module:
    module_name, _, factory_name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a factory in the current folder, as with `python -m`
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
    head = _head_path(module)
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


def _head_path(module: nn.Module) -> str:
    """Path of the layer that gives the logits: the last linear one, or the last convolution (SqueezeNet)."""
    for kind in (nn.Linear, nn.Conv2d):
        paths = [path for path, child in module.named_modules() if isinstance(child, kind)]
        if paths:
            return paths[-1]
    raise InputError("the network has no linear or convolutional layer to use as its head")


def _head_classes(module: nn.Module) -> int:
    head = module.get_submodule(_head_path(module))
    return head.out_features if isinstance(head, nn.Linear) else head.out_channels  # type: ignore[return-value]


def _replace_head(module: nn.Module, spec: str, num_classes: int) -> None:
    if spec in ("alexnet", "caffe_alexnet"):
        module.classifier = nn.Linear(9216, num_classes)
        return
    path = _head_path(module)
    old = module.get_submodule(path)
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    else:
        assert isinstance(old, nn.Conv2d)
        new = nn.Conv2d(old.in_channels, num_classes, old.kernel_size, old.stride, old.padding)  # type: ignore[arg-type]
    module.set_submodule(path, new)


@dataclass(frozen=True)
class Call:
    """A call of a submodule in a forward pass: its path, and the shapes of input and output without batch."""

    path: str
    input: tuple[int, ...] | None
    output: tuple[int, ...] | None


def trace_calls(network: Network, image_size: int | None = None) -> list[Call]:
    """Run one blank image through the network and list the calls of all submodules, inner ones first.

    Raises
    ------
    InputError
        If the network cannot take images of that size.
    """
    size = image_size or network.image_size
    image = torch.zeros(1, network.channels, size, size, device=network.device)
    calls: list[Call] = []

    def shape(value: Any) -> tuple[int, ...] | None:
        return tuple(value.shape[1:]) if isinstance(value, Tensor) else None

    def record(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls.append(Call(path, shape(inputs[0]) if inputs else None, shape(output)))

        return hook

    handles = [m.register_forward_hook(record(path)) for path, m in network.module.named_modules() if path]
    try:
        with torch.inference_mode():
            network.module(image)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{network.name} cannot take images of {size} x {size} pixels: {error}") from None
    finally:
        for handle in handles:
            handle.remove()
    return calls


def describe_layers(network: Network, image_size: int | None = None) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, module path and output shape (without batch) of the network's default layers."""
    shapes = {call.path: call.output or () for call in trace_calls(network, image_size)}
    return [(name, path, shapes[path]) for name, path in network.layers.items()]


def _default_layers(network: Network) -> dict[str, str]:
    if network.spec in _NAMED_LAYERS:
        return {name: f"features.{position}" for name, position in _NAMED_LAYERS[network.spec].items()}
    paths = {kind: [p for p, m in network.module.named_modules() if isinstance(m, kind)] for kind in _KINDS}
    if network.spec.startswith("vgg") and ":" not in network.spec:
        return {f"maxpool{number}": path for number, path in enumerate(paths[nn.MaxPool2d], start=1)}
    head = _head_path(network.module)
    calls = itertools.takewhile(lambda call: call.path != head, trace_calls(network))
    averages = {*paths[nn.AvgPool2d], *paths[nn.AdaptiveAvgPool2d]}
    stages = _stages([call for call in calls if call.path not in paths[nn.Dropout]], averages)
    if len(stages) < 2:  # no pyramid: a transformer's blocks
        blocks = max(
            (m for m in network.module.modules() if isinstance(m, nn.Sequential | nn.ModuleList)),
            key=len,
            default=None,
        )
        inside = {id(child) for child in (blocks or [])}
        stages = [path for path, m in network.module.named_modules() if id(m) in inside] or stages
    if not stages:
        raise InputError(f"{network.name} has no layer with feature maps")
    return {path: path for path in stages}


def _area(shape: tuple[int, ...] | None) -> int:
    """Units of a feature map, 0 for what is no map."""
    return shape[1] * shape[2] if shape is not None and len(shape) == 3 else 0


def _stages(calls: Sequence[Call], pools: Container[str]) -> list[str]:
    """The last module before each down-sampling, and the last before global average pooling.

    The network is read as a chain of its outermost modules that hold at most one down-sampling each. Down-sampling
    more than halves the area of the maps; less is the rim that a convolution without padding loses. In a stage, a
    module that is called once is preferred to one that is called again elsewhere.
    """
    candidates = []
    for call in calls:
        before, after = _area(call.input), _area(call.output)
        inner = {_area(other.output) for other in calls if other.path.startswith(call.path + ".")}
        if before and after and not any(after < between < before for between in inner):
            candidates.append(call)
    paths = [call.path for call in candidates]
    outermost = [call for call in candidates if not any(call.path.startswith(path + ".") for path in paths)]

    stages: list[list[str]] = [[]]
    size = full = _area(calls[0].input) if calls else 0
    for call in outermost:
        after = _area(call.output)
        if after == 1 and call.path in pools:
            break
        if after < size / 2:
            stages.append([])
        if after <= size:
            stages[-1].append(call.path)
            size = after
    if size == full:
        return []
    return [next((path for path in reversed(stage) if paths.count(path) == 1), stage[-1]) for stage in stages[1:]]
