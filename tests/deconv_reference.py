"""What the tests of the Deconvnet share: networks, and the same signals by autograd."""

import torch
from torch import nn
from torch.nn import functional

from qdv_gpu import load_network

NETWORKS = ["alexnet", "caffe_alexnet", "zfnet", "vgg11", "vgg11_bn", "vgg16", "vgg19", "vgg19_bn", "googlenet"]
NETWORKS += ["densenet121", "resnet18", "resnet50", "squeezenet1_1"]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(spec, *, classes=10):
    """A network with random weights, and batch-norm statistics of a noisy batch."""
    loaded = load_network(spec, weights="none", num_classes=classes, device="cpu")
    norms = [m for m in loaded.module.modules() if isinstance(m, nn.BatchNorm2d)]
    if norms:
        loaded.module.train()
        with torch.no_grad():
            loaded.module(normal(4, 3, 64, 64, seed=5))
        loaded.module.eval()
    return loaded


def close(found, truth):
    return (found - truth).norm() <= 1e-5 * truth.norm()


class Rectify(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, guided):
        ctx.active = x > 0 if guided else torch.ones_like(x, dtype=torch.bool)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0) * ctx.active, None


class Skip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *options):
        return TRUE_LRN(x, *options)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None, None, None


TRUE_LRN = functional.local_response_norm


def by_autograd(monkeypatch, net, image, path, *, mode, maps):
    """Reconstructions with torch's functions patched, one backward pass for each map."""
    with monkeypatch.context() as patch:
        if mode != "gradient":
            patch.setattr(functional, "relu", lambda x, inplace=False: Rectify.apply(x, mode == "guided"))
            patch.setattr(functional, "local_response_norm", lambda x, *options: Skip.apply(x, *options))
        seen = []
        handle = net.module.get_submodule(path).register_forward_hook(lambda m, i, o: seen.append(o.clone()))
        x = image[None].clone().requires_grad_()
        net.module(x * 1)
        handle.remove()
        output = seen[0]
        results = []
        for number in maps:
            own = output[0, number]
            seed = torch.zeros_like(output)
            if mode == "deconvnet-map":
                seed[0, number] = own.detach()
            elif mode == "guided":
                seed[0, number] = 1
            else:
                seed[0, number].view(-1)[own.argmax()] = own.max().detach() if mode == "deconvnet" else 1
            results.append(torch.autograd.grad(output, x, seed, retain_graph=True)[0][0])
    return torch.stack(results)
