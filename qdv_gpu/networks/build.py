"""Modules by name: ours, torchvision's and timm's, with the weights that come with them, and those of a factory."""

import difflib
import importlib
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdv_gpu.errors import InputError, MissingPackageError, place, reason, unknown
from qdv_gpu.networks.guard import guarded
from qdv_gpu.networks.zoo import OWN

AUXILIARY = ("googlenet", "inception_v3")  # have side heads for training, which are left out
TIMM = "timm:"
Built = tuple[nn.Module, dict[str, Any]]  # and what is known of its images: image_size, crop, ...


@cache
def network_names() -> list[str]:
    """Names that need no prefix: our own and torchvision's classifiers."""
    import torchvision

    return sorted([*OWN, *torchvision.models.list_models(module=torchvision.models)])


def is_name(name: str) -> bool:
    """Whether a text is the name of a network, or of a factory: "timm:MODEL", "package.module:factory"."""
    module, colon, _ = name.partition(":")
    return name in network_names() or bool(colon and all(part.isidentifier() for part in module.split(".")))


def build(name: str, arguments: Mapping[str, Any], *, pretrained: bool) -> Built:
    """The network of that name, with the ImageNet weights that come with it or with random ones.

    Raises
    ------
    InputError
        If there is none, it cannot be built with these arguments, or its weights are not to be had.
    """
    if name.startswith(TIMM):
        return _from_timm(name.removeprefix(TIMM), arguments, pretrained=pretrained)
    if ":" in name:
        return _from_factory(name, arguments), {}
    if name in OWN:
        if pretrained:
            raise InputError(
                f"{name} has no ImageNet weights to download: pass --weights FILE"
                + (" (bvlc_alexnet.npy)" if name == "caffe_alexnet" else "")
                + " or --weights none"
            )
        if arguments:
            raise InputError(f"{name} takes no arguments, got {', '.join(arguments)}")
        return OWN[name](), {}
    if name not in network_names():
        if os.path.isfile(name):
            raise InputError(f"{name} is a file: say what network its weights belong to, as in resnet18={name}")
        raise unknown("network", name, network_names())
    return _from_torchvision(name, arguments, pretrained=pretrained)


def _from_torchvision(name: str, arguments: Mapping[str, Any], *, pretrained: bool) -> Built:
    import torchvision

    builder = torchvision.models.get_model_builder(name)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    shown = weights.transforms()
    about = {
        "image_size": shown.crop_size[0],
        "crop": shown.crop_size[0] / shown.resize_size[0],
        "interpolation": shown.interpolation.value,
        "image_mean": tuple(shown.mean),
        "image_std": tuple(shown.std),
    }
    if not pretrained:
        without_auxiliary = {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}
        with _building(name):
            return builder(weights=None, **{**without_auxiliary, **arguments}), about
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    try:
        _download(weights.url, file)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"the ImageNet weights of {name} could not be downloaded or read ({error}): "
            f"put {file.name} into {file.parent}, or pass --weights none"
        ) from None
    with _building(name), _only_tensors():
        return builder(weights=weights, **arguments), about


def _from_timm(name: str, arguments: Mapping[str, Any], *, pretrained: bool) -> Built:
    try:
        import timm
    except ImportError as error:
        raise MissingPackageError(f"network {TIMM}{name} needs timm: pip install timm ({error})") from None
    known = name.partition(".")[0]
    if ":" not in name and not timm.is_model(known):
        raise unknown("network of timm", known, timm.list_models())
    with _building(TIMM + name), _only_tensors():
        try:
            return timm.create_model(name, pretrained=pretrained, **arguments), {}
        except (OSError, RuntimeError) as error:
            if not pretrained or "retrained" in str(error):  # a tag or weights that do not exist
                raise
            said = " ".join(str(error).split())
            raise InputError(
                f"the weights of {TIMM}{name} could not be downloaded or read ({said}): "
                f"pass {TIMM}{name}=FILE or --weights none"
            ) from None


def _from_factory(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    module_name, _, factory_name = name.partition(":")
    if module_name.endswith(".py"):
        raise InputError(f"network {name}: write {module_name.removesuffix('.py')}:{factory_name}, without .py")
    if "" not in sys.path:
        sys.path.append("")  # the current folder may hold the factory
    with _kept(), guarded(f"network {name} cannot be built"):
        with guarded(f"network {name}: {module_name} cannot be imported"):
            module = importlib.import_module(module_name)
        if not hasattr(module, factory_name):
            close = difflib.get_close_matches(factory_name, vars(module), n=3)
            hint = f": did you mean {', '.join(close)}?" if close else ""
            raise InputError(f"network {name}: {module_name} has no {factory_name!r}{hint}")
        factory = made = getattr(module, factory_name)
        if callable(factory) and not isinstance(factory, nn.Module):
            try:
                made = factory(**arguments)
            except Exception as error:
                if not place(error):  # as where it is not called as it wants to be
                    raise InputError(f"network {name} cannot be built: {reason(error)}{_defined(factory)}") from error
                raise
    if not isinstance(made, nn.Module):
        kind = type(made).__name__
        raise InputError(f"network {name}: the factory must return an nn.Module, got {kind}{_defined(factory)}")
    return made


def _defined(factory: Any) -> str:
    """Where a function or class is defined, in brackets; "" if that is not known."""
    code = getattr(factory, "__code__", getattr(getattr(factory, "__init__", None), "__code__", None))
    return f" ({code.co_filename}:{code.co_firstlineno})" if code else ""


@contextmanager
def _kept() -> Iterator[None]:
    """Put back what a program of the user's may change that all of this process depends on."""
    argv, dtype = list(sys.argv), torch.get_default_dtype()
    grad, streams = torch.is_grad_enabled(), (sys.stdout, sys.stderr)
    try:
        yield
    finally:
        sys.argv[:] = argv
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        sys.stdout, sys.stderr = streams


@contextmanager
def _building(name: str) -> Iterator[None]:
    """Say in one line what a library raised while a network was built."""
    with guarded(f"network {name} cannot be built"):
        try:
            yield
        except pickle.UnpicklingError as error:  # whose text tells how to run what is in the file
            held = "it holds other things than tensors, which are not loaded"
            raise InputError(f"network {name} cannot be built: {held}") from error


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
    """Have torch.load unpickle nothing but tensors, also where torchvision and timm call it."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
