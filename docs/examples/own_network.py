"""Two networks of one's own on the images of a DataLoader: which keeps the classes apart, and at which layer?

python docs/examples/own_network.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qdv_gpu


class Mine(nn.Module):
    """What the library asks of a network: images in, one row for each out. The attribute says what images it wants."""

    image_size = 8

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(2 * width * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x)).flatten(1))


def train(network: nn.Module, loader: DataLoader, epochs: int = 5) -> nn.Module:
    """Any training: nothing of it needs to be known to the library."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(epochs):
        for images, labels in loader:
            loss = nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


torch.manual_seed(0)
digits = load_digits()
pixels = torch.from_numpy(digits.images).float()[:, None] / 16  # [1797, 1, 8, 8], as the networks want them
data = TensorDataset(pixels, torch.from_numpy(digits.target))
training, test = torch.utils.data.Subset(data, range(1400)), torch.utils.data.Subset(data, range(1400, 1797))
loader = DataLoader(training, batch_size=50, shuffle=True)
networks = {"narrow": train(Mine(2), loader), "wide": train(Mine(16), loader)}

result = qdv_gpu.analyze(
    networks, DataLoader(test, batch_size=100), "runs/own_network", layers=["first", "second"], perplexity=20,
    iterations=400, seeds=2,
)  # fmt: skip
for pair in result.comparison.pairs:
    difference = pair.in_maps
    print(f"{pair.first.layer}: NH {pair.nh[0]:.3f} and {pair.nh[1]:.3f}: wide is {difference.verdict}", end=" ")
    print(f"by {difference.delta:.3f} ({difference.low:.3f} to {difference.high:.3f})")
