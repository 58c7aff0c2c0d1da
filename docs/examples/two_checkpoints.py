"""Two checkpoints of one network, from the first epoch and from the last: at which layers did training go on to help?

python docs/examples/two_checkpoints.py
"""

from pathlib import Path

import torch

import qdv_gpu

folder = Path("runs/two_checkpoints")
folder.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
network = torch.nn.Sequential(
    torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
    torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
    torch.nn.Flatten(), torch.nn.Linear(64, 10),
)  # fmt: skip

# A training that saves what it has, as PyTorch, Lightning and timm do.
train = qdv_gpu.load_images("digits", split="train", samples=400)
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
for epoch in range(20):
    for chosen in torch.randperm(len(train)).split(50):
        loss = torch.nn.functional.cross_entropy(network(train.pixels[chosen] / 255), train.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch in (0, 19):
        torch.save({"epoch": epoch, "model": network.state_dict()}, folder / f"epoch{epoch}.ckpt")

test = qdv_gpu.load_images("digits", samples=300)
checkpoints = {
    name: qdv_gpu.load_network(network, weights=folder / f"{name}.ckpt", image_size=8, mean=0.0, std=1.0)
    for name in ("epoch0", "epoch19")
}
options = {"layers": ["2", "5"], "perplexity": 20, "iterations": 400, "seeds": 2}
result = qdv_gpu.analyze(checkpoints, test, folder / "analysis", **options)
for pair in result.comparison.pairs:
    print(f"layer {pair.first.layer}: NH {pair.nh[0]:.3f} after the first epoch, {pair.nh[1]:.3f} after the last")
