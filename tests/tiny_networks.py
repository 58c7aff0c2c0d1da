"""Networks of a few thousand weights, for the tests to load as tiny_networks:NAME."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Tiny(nn.Module):
    """Two stages on gray images of 8 x 8 pixels, with an in-place ReLU and a module that is called twice."""

    image_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(8 * 2 * 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        return self.fc(self.dropout(x.flatten(1)))


def cnn() -> nn.Module:
    """A plain network with fixed weights."""
    torch.manual_seed(0)
    return Tiny()


class Viewing(Tiny):
    """Flattens its maps by a view, which no map has that lies in memory with its channels last."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        return self.fc(x.view(-1, 8 * 2 * 2))


def viewing() -> nn.Module:
    """The weights of `cnn`."""
    torch.manual_seed(0)
    return Viewing()


def seeded(seed: int, kernel: int = 3) -> nn.Module:
    """The same with other weights, and another second convolution."""
    torch.manual_seed(seed)
    network = Tiny()
    network.conv2 = nn.Conv2d(6, 8, kernel, padding=kernel // 2)
    return network


def normalised() -> nn.Module:
    """With batch norm of its maps."""
    network = cnn()
    network.conv2 = nn.Sequential(network.conv2, nn.BatchNorm2d(8))
    return network


def normalised_head() -> nn.Module:
    """With batch norm of its features, one number of each a sample."""
    network = cnn()
    network.fc = nn.Sequential(nn.Linear(8 * 2 * 2, 10), nn.BatchNorm1d(10))
    return network


def other() -> nn.Module:
    """A network of another shape."""
    network = cnn()
    network.conv2 = nn.Conv2d(6, 8, 5, padding=2)
    return network


class Functional(nn.Module):
    """A residual block written with functions: overlapping pooling, ReLUs in place, a concatenation, a side branch."""

    image_size = 33
    named_layers = {"a": "a", "c": "c", "d": "d"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm2d(8)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.c = nn.Conv2d(8, 4, 3, padding=2, dilation=2)
        self.d = nn.Conv2d(12, 10, 3, stride=2)
        self.side = nn.Conv2d(1, 2, 1)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        constant = self.side(torch.ones(len(x), 1, 4, 4, dtype=x.dtype, device=x.device))
        x = functional.max_pool2d(functional.relu(self.norm(self.stem(x))), 3, 2, padding=1)
        y = self.b(torch.relu(self.a(x)))
        x = (y + x).relu_()
        x = torch.cat([x, self.c(x).clamp(min=0)], dim=1)
        x = functional.relu(self.d(functional.avg_pool2d(x, 2, stride=1)), inplace=True)
        return self.fc(x.mean((2, 3))) + constant.mean()


def written_with_functions() -> nn.Module:
    """The same weights each time, with batch-norm statistics that do something."""
    torch.manual_seed(1)
    network = Functional()
    nn.init.uniform_(network.norm.running_var, 0.5, 2.0)
    nn.init.uniform_(network.norm.weight, -1.0, 1.0)
    return network


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class _TwoOutputs(nn.Module):
    image_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.conv2 = nn.Conv2d(4, 4, 2, stride=2)
        self.pair = _Pair()
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pair(self.conv2(self.conv(x)))[0].flatten(1))


def pair() -> nn.Module:
    """A network with a submodule that returns two tensors."""
    return _TwoOutputs()


class _Poisoned(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.conv1(x), 2)
        x = self.stage(x / (x.abs() > 1e9))  # 1 / 0
        return self.fc(functional.max_pool2d(self.conv2(x), 2).flatten(1))


def poisoned() -> nn.Module:
    """A network whose layer `stage` gives infinities and NaN."""
    return _Poisoned()


class _Overflowing(nn.Module):
    """Gives logits between which float32 has no difference."""

    image_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, 10, 8)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x).flatten(1)
        return logits.sign() * 3e38 + logits


def overflowing() -> nn.Module:
    """A network whose loss is infinite."""
    return _Overflowing()


class _Moody(nn.Module):
    """Gives fewer features for the last, smaller batch."""

    image_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.crop = nn.Identity()
        self.fc = nn.Linear(9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(self.crop(x[:, : min(4, len(x))]).flatten(2)).sum(1)


def moody() -> nn.Module:
    """A network with a layer `crop` whose size depends on the batch."""
    return _Moody()


class _Attentive(nn.Module):
    image_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mix = nn.Parameter(torch.eye(4))
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.conv(self.stem(x)), 2)  # [B, 4, 4, 4]
        tokens = self.conv(x).flatten(2).transpose(1, 2) @ self.mix  # [B, 16, 4]
        tokens, _ = self.attention(tokens, tokens, value=tokens, need_weights=False)
        return self.fc(tokens.mean(1))


def attentive() -> nn.Module:
    """A convolution called at two sizes, a product outside of any module, and attention."""
    return _Attentive()


def not_a_module() -> int:
    """Not a network."""
    return 1


def wide(maps: int = 4) -> nn.Module:
    """As wide as it is asked to be."""
    return nn.Sequential(nn.Conv2d(1, maps, 3), nn.ReLU(), nn.MaxPool2d(2))


def raising() -> nn.Module:
    """A factory that fails."""
    raise RuntimeError("no\nluck")


def exiting() -> nn.Module:
    """A factory of a program that ends itself."""
    raise SystemExit(3)
