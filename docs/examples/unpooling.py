"""Unpooling alone, as an operator of torch: with a gradient, in torch.compile and vmap, on a CPU or a GPU.

`torch.nn.MaxUnpool2d` lets windows that overlap overwrite each other. Here they add, which makes unpooling the exact
adjoint of max-pooling: <max_pool(x), y> = <x, unpool(y)>.

python docs/examples/unpooling.py
"""

import torch
from torch import nn

from qdv_gpu.deconv.unpool import max_pool, unpool

torch.manual_seed(0)
window = {"kernel_size": 3, "stride": 2}  # overlapping, as AlexNet's
x = torch.randn(2, 8, 27, 27, dtype=torch.float64)
pooled, switches = max_pool(x, **window)  # [2, 8, 13, 13], and where in its window each winner was, uint8
y = torch.randn_like(pooled)

ours = unpool(y, switches, x.shape[2:], **window)
_, indices = nn.functional.max_pool2d(x, **window, return_indices=True)
theirs = nn.functional.max_unpool2d(y, indices, **window, output_size=x.shape[2:])
wanted = (pooled * y).sum()
print(f"<max_pool(x), y> {wanted:.6f}, <x, unpool(y)> {(x * ours).sum():.6f}, MaxUnpool2d {(x * theirs).sum():.6f}")
torch.testing.assert_close((x * ours).sum(), wanted)

y.requires_grad_()
unpool(y, switches, x.shape[2:], **window).square().sum().backward()
print("gradient", tuple(y.grad.shape))
