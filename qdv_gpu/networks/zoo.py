"""Two networks of the early visualisation papers."""

from collections.abc import Callable

from torch import Tensor, nn


class CaffeAlexNet(nn.Module):
    """AlexNet as Caffe's `bvlc_alexnet`: 96-256-384-384-256 maps, two groups, local response normalisation.

    Input [B, 3, 227, 227] (any size down to 67 works: the last maps are pooled or repeated to 6 x 6), output
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
