"""Another rule for a Deconvnet: lead signals through the branches of a ResNet's blocks, and not through their skips.

The rules are a table, `qdv_gpu.deconv.rules.RULES`, of autograd's operations to functions. The table is not public yet:
its names may change in any version. It can be given another rule for an operation that it knows; operations without a
rule (GELU, SiLU, ...) are refused before the table is asked, so for them change the network: NAME[activation=relu].

python docs/examples/deconvnet_rule.py
"""

from dataclasses import replace
from unittest import mock

import torch

import qdv_gpu
from qdv_gpu.deconv.rules import RULES, Step
from qdv_gpu.deconv.windows import Signal


def branch_only(step: Step) -> list[Signal | None]:
    """Of `branch + skip` all to the branch; a Signal's data is [maps, C, h, w]."""
    return [step.signal, replace(step.signal, data=torch.zeros_like(step.signal.data))]


deconvnet = qdv_gpu.Deconvnet("resnet18=none")
image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
both = deconvnet.reconstruct(image, "layer2", maps=range(8))  # [8, 3, 64, 64]
with mock.patch.dict(RULES, {"Add": branch_only}):
    branches = deconvnet.reconstruct(image, "layer2", maps=range(8))
for number, (one, other) in enumerate(zip(both, branches, strict=True)):
    share = other.abs().sum() / one.abs().sum()
    print(f"map {number}: without skips the picture has {share:.2f} times the contrast")
