"""Layers and activations of networks that people have, against hooks and preprocessing written by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from qdv_gpu import activations, load_images, load_network
from qdv_gpu.features.forward import tile_images
from qdv_gpu.machine import on_threads
from qdv_gpu.networks.tokens import describe_layers

NETWORKS = [
    "resnet50", "vgg19", "convnext_tiny", "swin_t", "vit_b_16", "efficientnet_b0", "timm:resnet18",
    "timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224", "timm:convnext_atto", "timm:pvt_v2_b0",
]  # fmt: skip
SIZES = [(300, 260), (231, 400), (224, 224)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs of mixed sizes, without labels."""
    top = tmp_path_factory.mktemp("photos")
    for i, (width, height) in enumerate(SIZES):
        coarse = np.random.default_rng(i).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(top / f"{i}.png")
    return top


def own_preprocessing(name, module):
    """What the network's library does to a picture."""
    if name.startswith("timm:"):
        import timm

        return timm.data.create_transform(**timm.data.resolve_model_data_config(module), is_training=False)
    import torchvision

    return torchvision.models.get_model_weights(name).DEFAULT.transforms()


@pytest.mark.parametrize("name", NETWORKS)
def test_default_layers_and_their_activations(name, folder):
    """In forward order with growing stride or depth, and as a hook sees them behind the network's own preprocessing."""
    network = load_network(name, weights="none", device="cpu")
    rows = describe_layers(network)
    assert 4 <= len(rows) <= 6
    if rows[0].tokens:  # a transformer's blocks
        depths = [
            int("".join(c for c in row.path.rpartition("_")[2].rpartition(".")[2] if c.isdigit())) for row in rows
        ]
        assert depths == sorted(set(depths))
        assert depths[-1] == 11
        assert {row.features for row in rows} == {rows[0].shape[-1]}
    else:
        sides = [next(side for side in row.shape if row.shape.count(side) >= 2) for row in rows]
        assert sides == sorted(sides, reverse=True)
        assert len(set(sides)) == len(sides)
        assert all(row.features < 4_000_000 for row in rows)

    found = activations(network, load_images(folder), crop=True)
    transform, seen = own_preprocessing(name, network.module), {row.layer: [] for row in rows}
    inputs = torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())])
    handles = [
        network.module.get_submodule(row.path).register_forward_hook(
            lambda _module, _inputs, output, layer=row.layer: seen[layer].append(output)
        )
        for row in rows
    ]
    with torch.inference_mode(), on_threads(1):
        for tile in inputs.split(tile_images(network.device, network.image_size)):  # on which the rounding depends
            network.module(tile.contiguous(memory_format=torch.channels_last))  # and on that
    for handle in handles:
        handle.remove()
    for row in rows:
        output = torch.cat(seen[row.layer])
        expected = (output[:, 0] if row.tokens == "cls" else output).flatten(1)
        error = (found[row.layer] - expected).abs().max() / expected.abs().max()
        assert error < 1e-6, f"{row.layer}: {error:.1e}"
