"""Variants: networks of which something is changed, with as many of their weights as fit."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qdv_gpu.errors import InputError
from qdv_gpu.machine import seeded
from qdv_gpu.networks.blank import on_meta, run_blank
from qdv_gpu.networks.carry import carried
from qdv_gpu.networks.edits import Draft, apply_edits
from qdv_gpu.networks.fit import head_prefix, replace_head
from qdv_gpu.networks.network import Base, Network
from qdv_gpu.networks.spec import CARRY, Spec, check_carry, flat_edits


@dataclass(frozen=True)
class Variant:
    """A network with edits: wherever a network is taken, so is a variant.

    Attributes
    ----------
    base : str, nn.Module or Network
        A name, `[LABEL=]NAME[(key=value, ...)][=CHECKPOINT]`, or a module of yours, which is not changed.
    edits : dict
        In order: {path: {argument: value}} for the arguments of modules, with "depth" for stages and convolutions; and
        for the whole network "width": factor, "pooling": "avg" or "max", "norm": "batch", "group", "instance" or
        "none", "activation": "relu", "gelu", ..., and "zf": True.
    carry : {"fresh", "crop", "resample"}
        What becomes of a tensor whose shape is another: initialised anew; the common part, kernels from their centre;
        or kernels resampled by the pseudo-inverse (Beyer et al. 2023), channels as with "crop".

    Raises
    ------
    InputError
        If an edit is unknown, or has a value that is no Python literal.

    Examples
    --------
    >>> variant = Variant("alexnet", edits={"features.0": dict(kernel_size=7, stride=2)}, carry="crop")
    >>> str(variant)
    'alexnet[features.0.kernel_size=7, features.0.stride=2, carry=crop]'
    >>> Spec.parse(str(variant)) == variant.spec
    True
    """

    base: str | nn.Module | Network
    edits: Mapping[str, Any] = field(default_factory=dict)
    carry: str = CARRY[0]

    def __post_init__(self) -> None:
        if not isinstance(self.base, str | nn.Module | Network):
            kind = type(self.base).__name__
            raise InputError(f"the base of a variant is a name, an nn.Module or a Network, got {kind}")
        check_carry(self.carry)
        if not self.spec.edits:
            raise InputError("a variant needs at least one edit, as {'features.0': {'stride': 2}}")

    def __str__(self) -> str:
        return str(self.spec)

    @property
    def named(self) -> bool:
        """Whether its base is a name, and not a module in memory."""
        return isinstance(self.base, str)

    @property
    def spec(self) -> Spec:
        """Name, arguments, edits and checkpoint; edits of a base that is a variant come first."""
        base = self.base.spec if isinstance(self.base, Network) else self.base
        known = Spec.parse(base) if isinstance(base, str) else Spec(type(base).__name__)
        edits = flat_edits(self.edits)
        if twice := next((name for name in edits if name in known.edits), None):
            raise InputError(f"edit {twice} is given twice: {known.built} has it")
        return replace(known, edits={**known.edits, **edits}, carry=self.carry)


def edited(
    network: Network, *, edits: dict[str, Any], carry: str, name: str, image_size: int | None, seed: int,
    trained: bool = False,
) -> Network:  # fmt: skip
    """The network with edits; its module is ours to change.

    New tensors are initialised by the constructors of their modules, as torch does it, from the seed.

    Parameters
    ----------
    network : Network
        The base, with its weights.
    edits, carry
        As of `Spec`.
    name : str
        What the variant is called in what is said of it.
    image_size : int, optional
        Of the images that it must take.
    seed : int
    trained : bool
        Whether the weights will be replaced by the variant's own.

    Raises
    ------
    InputError
        If an edit is unknown or changes nothing, or the network cannot run any more.
    """
    module = network.module
    named = _tensors(module)
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    sized = replace(network.at_size(image_size), name=name)
    before, runs = on_meta(module), True
    try:
        run_blank(sized, before)
    except InputError:
        runs = False
    draft = Draft(replace(sized, name=network.spec), {tensor: key for key, tensor in named.items()})
    generator = torch.Generator().manual_seed(seed)  # another seed, or the numbers might be those of the base
    other = int(torch.randint(2**62, (1,), generator=generator, device="cpu"))
    with seeded(other):
        apply_edits(draft, edits)
    origins = _carry(draft, named, carry)
    run_blank(sized, on_meta(module) if runs else module)  # the base may not run without numbers, or at this size
    return replace(network, base=Base(network.spec, before, shapes, {} if trained else origins, trained))


def with_head(network: Network, name: str, num_classes: int) -> Network:
    """The network, whose module is ours to change, with a head for so many classes; and its base with one alike."""
    replace_head(network.module, name, num_classes)
    if network.base is None:
        return network
    with torch.device("meta"):
        replace_head(network.base.module, name, num_classes)
    head = head_prefix(network.module, name)
    kept = {own: other for own, other in network.base.origins.items() if not own.startswith(head)}
    return replace(network, base=replace(network.base, origins=kept))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


def _carry(draft: Draft, named: Mapping[str, Tensor], carry: str) -> dict[str, str]:
    """Put the base's tensors where they fit, and what of them is carried where they do not; where they are from."""
    origins: dict[str, str] = {}
    for path, module in draft.module.named_modules(remove_duplicate=False):  # each name of a module that has several
        for kept in (module._parameters, module._buffers):
            for name, tensor in list(kept.items()):
                source = draft.origins.get(tensor) if tensor is not None else None
                if tensor is None or source is None:
                    continue
                old = named[source]
                if old.shape == tensor.shape and tensor not in draft.copied:
                    kept[name] = old
                elif old.shape == tensor.shape:
                    with torch.no_grad():
                        tensor.copy_(old)
                elif carry == CARRY[0]:
                    continue
                else:
                    spatial = isinstance(module, nn.modules.conv._ConvNd) and name == "weight"
                    with torch.no_grad():
                        tensor.copy_(carried(old, tensor, resample=carry == "resample", spatial=spatial))
                origins[f"{path}.{name}".lstrip(".")] = source
    return origins


def is_named(network: Any) -> bool:
    """Whether a network, or what it is a variant of, is given by its name."""
    return isinstance(network, str) or (isinstance(network, Variant) and network.named)


def home(network: Any) -> str | None:
    """The device that a network is asked for on: "auto" of one by name, and None, where it is, of a module.

    >>> home("alexnet"), home(nn.ReLU())
    ('auto', None)
    """
    return "auto" if is_named(network) else None
