"""Networks by name: torchvision's, with their weights, and two of the early visualisation papers."""

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from qdv_gpu.errors import InputError, unknown

AUXILIARY = ("googlenet", "inception_v3")  # have side heads for training, which are left out


class CaffeAlexNet(nn.Module):
    """AlexNet as Caffe's `bvlc_alexnet`: 96-256-384-384-256 maps, two groups, local response normalisation.

    Input [B, 3, 227, 227] (any size down to 63 works: the last maps are pooled or repeated to 6 x 6), output
    [B, 1000] logits. Krizhevsky et al. 2012; the network of Wang & Liu (CIKM 2024).
    """

    image_size = 227
    image_mean = (123.0 / 255, 117.0 / 255, 104.0 / 255)  # the means of ILSVRC 2012 that Caffe subtracts
    image_std = (1 / 255, 1 / 255, 1 / 255)
    bgr = True  # Caffe's channel order

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, 11, stride=4),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(96, 256, 5, padding=2, groups=2),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(256, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier: nn.Module = _fully_connected()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class ZFNet(nn.Module):
    """The network of Zeiler & Fergus 2014: AlexNet with a 7 x 7, stride 2 first layer, in one group.

    Input [B, 3, 224, 224] (any size down to 64 works), output [B, 1000] logits.
    """

    image_size = 224

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, 7, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75),
            nn.Conv2d(96, 256, 5, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75),
            nn.Conv2d(256, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier: nn.Module = _fully_connected()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _fully_connected() -> nn.Sequential:
    """fc6, fc7 and fc8 on 256 maps of 6 x 6."""
    return nn.Sequential(
        nn.Linear(9216, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, 1000),
    )


OWN: dict[str, Callable[[], nn.Module]] = {"caffe_alexnet": CaffeAlexNet, "zfnet": ZFNet}


def network_names() -> list[str]:
    """Names that `load_network` knows: our own and torchvision's classifiers."""
    import torchvision

    return sorted([*OWN, *torchvision.models.list_models(module=torchvision.models)])


def build(spec: str, *, imagenet: bool) -> nn.Module:
    """The network of that name, with torchvision's ImageNet weights or with random ones.

    Raises
    ------
    InputError
        If there is none, or its weights are not to be had.
    """
    if spec in OWN:
        if imagenet:
            raise InputError(
                f"{spec} has no ImageNet weights to download: pass --weights FILE"
                + (" (bvlc_alexnet.npy)" if spec == "caffe_alexnet" else "")
                + " or --weights none"
            )
        return OWN[spec]()
    names = network_names()
    if spec not in names:
        raise unknown("network", spec, names)
    import torchvision

    builder = torchvision.models.get_model_builder(spec)
    if not imagenet:
        without_auxiliary = {"aux_logits": False, "init_weights": True} if spec in AUXILIARY else {}
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
