"""Deeper and shallower: another number of blocks in a stage, or of convolutions in the place of one."""

import copy
from typing import Any

from torch import Tensor, nn

from qdv_gpu.errors import InputError, check_count, reason
from qdv_gpu.networks.rebuild import rebuild


def set_depth(stage: nn.Module, depth: Any, path: str, between: nn.Module) -> tuple[nn.Module, dict[Tensor, Tensor]]:
    """Give a stage so many blocks.

    Of an `nn.Sequential` or `nn.ModuleList` the last blocks are dropped, or copies of the last one are appended, whose
    modules are initialised anew; what has no way to be initialised, such as a scale, keeps the values of the block that
    it is copied from. A convolution becomes a sequence: itself, and further ones of as many maps, with stride 1, that
    keep the size, each behind an activation.

    Parameters
    ----------
    stage : nn.Module
        Changed in place if it is a list of blocks.
    depth : int
        At least 1.
    path : str
    between : nn.Module
        The activation.

    Returns
    -------
    stage : nn.Module
        The same, or what takes its place.
    copied : dict of Tensor to Tensor
        Tensors of the new blocks whose values are those of others.

    Raises
    ------
    InputError
        If there is no block, or its arguments are not kept.

    Examples
    --------
    >>> set_depth(nn.Conv2d(3, 8, 5, stride=2), 2, "conv", nn.ReLU())[0]
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(5, 5), stride=(2, 2))
      (1): ReLU()
      (2): Conv2d(8, 8, kernel_size=(5, 5), stride=(1, 1), padding=same)
    )
    """
    check_count(f"{path}.depth", depth)
    if isinstance(stage, nn.modules.conv._ConvNd):
        return _convolutions(stage, depth, path, between), {}
    assert isinstance(stage, nn.Sequential | nn.ModuleList)
    names = list(stage._modules)
    if not names:
        raise InputError(f"{path} has no block to be repeated")
    for name in names[depth:]:
        del stage._modules[name]
    copied: dict[Tensor, Tensor] = {}
    last = stage._modules[names[min(depth, len(names)) - 1]]
    assert last is not None
    for _ in range(len(names), depth):
        block = copy.deepcopy(last)
        fresh: set[Tensor] = set()
        for module in block.modules():
            reset: Any = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
            if reset is not None:
                try:
                    reset()
                except (Exception, SystemExit) as error:
                    raise InputError(
                        f"{path}.depth: a {type(module).__name__} cannot be initialised anew: {reason(error)}"
                    ) from error
                fresh |= {*module.parameters(recurse=False), *module.buffers(recurse=False)}
        own = [*block.parameters(), *block.buffers()]
        copied |= {a: b for a, b in zip(own, [*last.parameters(), *last.buffers()], strict=True) if a not in fresh}
        stage._modules[_next_name(list(stage._modules))] = block
    return stage, copied


def _convolutions(first: nn.Module, depth: int, path: str, between: nn.Module) -> nn.Module:
    if depth == 1:
        return first
    if "Transpose" in type(first).__name__:
        raise InputError(f"{path}.depth: a transposed convolution is not repeated")
    parts = [first]
    for _ in range(depth - 1):
        same = {"in_channels": first.out_channels, "stride": 1, "padding": "same"}
        parts += [copy.deepcopy(between), rebuild(first, same, path)]
    return nn.Sequential(*parts).train(first.training)


def _next_name(names: list[str]) -> str:
    """A name for one more: the next number, or the last name with it.

    >>> _next_name(["0", "1"]), _next_name(["block1", "block2"])
    ('2', 'block3')
    """
    last = names[-1]
    stem = last.rstrip("0123456789")
    number = int(last[len(stem) :] or 1) + 1
    while f"{stem}{number}" in names:
        number += 1
    return f"{stem}{number}"
