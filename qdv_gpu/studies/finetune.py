"""Transfer learning: fine-tune every weight of a network on a data set."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from qdv_gpu.data.images import Images, load_images, prepare, stratified
from qdv_gpu.errors import InputError
from qdv_gpu.files import remove_leftovers, replacing, write_json
from qdv_gpu.machine import Halving
from qdv_gpu.networks.network import Network, load_network
from qdv_gpu.networks.weights import read_weights, write_weights
from qdv_gpu.report.figures import plot_training

Report = Callable[[str], None]
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where the training is, for a display."""

    epoch: int
    epochs: int
    images: int
    total: int
    images_per_second: float
    seconds_left: float


def finetune(
    spec: str,
    data: str | Path,
    out: str | Path,
    *,
    weights: str | Path = "imagenet",
    image_size: int | None = None,
    epochs: int = 10,
    batch_size: int = 16,
    lr: float = 1e-5,
    limit: int | str = "all",
    skip_bad: bool = False,
    seed: int = 0,
    device: str = "auto",
    report: Report = print,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune a network with Adam, as the paper does, and write it to `out`.

    The defaults are those of Wang & Liu (CIKM 2024). On CUDA the forward pass runs in bfloat16. After each
    epoch `out/checkpoint.safetensors` is replaced; the same call after a kill goes on from it and ends, on the
    same device, with the same weights as a run that was not interrupted (on CUDA as far as torch has deterministic
    operators; it warns of others). When CUDA runs out of memory each batch
    is computed in halves, which leaves the gradient as it was (batch norm then sees the halves).

    Parameters
    ----------
    limit : int or "all"
        Number of training images, the same number of each class.
    report : callable
        Called with one line of text for each thing that a user should know.
    progress : callable, optional
        Called after each batch.

    Returns
    -------
    dict
        `history` (one dict an epoch: loss, accuracy on the training images while training, accuracy on up to
        1,000 test images), `test_accuracy` on all test images, and the settings. Also in `out/finetune.json`.

    Raises
    ------
    InputError
        For bad settings, or if `out` holds a run with others.
    """
    if epochs < 1 or batch_size < 1 or not lr > 0:
        raise InputError(
            "epochs and batch size must be at least 1 and lr above 0, "
            f"got epochs={epochs}, batch size={batch_size}, lr={lr}"
        )
    out = Path(out)
    if out.is_dir() and any(out.iterdir()) and not (out / CHECKPOINT).is_file():
        raise InputError(f"{out} is not empty and holds no {CHECKPOINT}: choose another --out")
    train = load_images(data, "train", samples=limit, image_size=image_size, skip_bad=skip_bad)
    test = load_images(data, "test", image_size=image_size, skip_bad=skip_bad)
    if train.classes != test.classes:
        raise InputError(f"{data}: the classes of train and test differ")
    for images in (train, test):
        if images.skipped:
            report(f"skipped {images.skipped} unreadable files")
    network = load_network(spec, weights=weights, num_classes=len(train.classes), seed=seed, device=device)
    network.image_size = image_size or network.image_size
    settings = {
        "network": network.spec,
        "weights": str(weights),
        "data": str(data),
        "fingerprint": train.fingerprint(),
        "image_size": network.image_size,
        "batch_size": batch_size,
        "lr": lr,
        "limit": limit,
        "seed": seed,
    }

    run = _Run(network, settings, out, lr)
    if run.epoch:
        report(f"going on from {run.checkpoint} after epoch {run.epoch}")
    train, test = train.to(network.device), test.to(network.device)
    quick = test.take(stratified(test.labels, test.classes, min(1000, len(test)))) if len(test) > 1000 else test
    with deterministic(network.device):
        while run.epoch < epochs:
            started = time.perf_counter()
            loss, accuracy = run.train(train, batch_size, epochs, report, progress)
            seconds = time.perf_counter() - started
            entry = {
                "loss": loss,
                "accuracy": accuracy,
                "test_accuracy": accuracy_of(network, quick, batch_size, report),
            }
            run.history.append(entry)
            run.save()
            report(
                f"epoch {run.epoch}/{epochs}: loss {loss:.3f}, training accuracy {accuracy:.1%}, "
                f"accuracy on {len(quick)} test images {entry['test_accuracy']:.1%}; "
                f"{len(train) / seconds:.0f} images/s, {(epochs - run.epoch) * seconds:.0f} s left"
            )
    result = {
        "settings": {**settings, "epochs": run.epoch},
        "classes": list(train.classes),
        "history": run.history,
        "test_accuracy": accuracy_of(network, test, batch_size, report),
        "test_images": len(test),
        "training_images": len(train),
        "device": str(network.device),
        "torch": torch.__version__,
    }
    metadata = {key: settings[key] for key in ("network", "image_size", "data")}
    write_weights(out / "weights.safetensors", network.module.state_dict(), metadata)
    write_json(out / "finetune.json", result)
    with replacing(out / "training.png") as temporary:
        plot_training(run.history, f"{network.name} on {data}").savefig(temporary, dpi=130)
    return result


class _Run:
    """A network, its optimizer and how far they have come; `checkpoint.safetensors` holds all of it."""

    def __init__(self, network: Network, settings: dict[str, Any], out: Path, lr: float) -> None:
        self.network, self.settings = network, settings
        self.checkpoint = out / CHECKPOINT
        self.parameters = dict(network.module.named_parameters())
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=lr)
        self.history: list[dict[str, float]] = []
        self.pieces = 1
        self.normalises = any(isinstance(module, _BatchNorm) for module in network.module.modules())
        if self.checkpoint.is_file():
            self._resume()
            remove_leftovers(out)

    @property
    def epoch(self) -> int:
        return len(self.history)

    def _resume(self) -> None:
        tensors, metadata = read_weights(self.checkpoint)
        before = metadata.get("settings", {})
        changed = [key for key, value in self.settings.items() if before.get(key) != value]
        if changed:
            key = changed[0]
            raise InputError(
                f"{self.checkpoint.parent} holds a run with {key}={before.get(key)!r}, not {self.settings[key]!r}: "
                "choose another --out or delete it"
            )
        names = list(self.parameters)
        state: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(names))}
        for name in [name for name in tensors if name.startswith("adam/")]:
            _, key, parameter = name.split("/", 2)
            state[names.index(parameter)][key] = tensors.pop(name)
        self.network.module.load_state_dict(tensors)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.history, self.pieces = metadata["history"], metadata["pieces"]

    def save(self) -> None:
        tensors = dict(self.network.module.state_dict())
        names = list(self.parameters)
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam/{key}/{names[index]}": value for key, value in state.items()}
        write_weights(
            self.checkpoint, tensors, {"settings": self.settings, "history": self.history, "pieces": self.pieces}
        )

    def train(
        self,
        images: Images,
        batch_size: int,
        epochs: int,
        report: Report,
        progress: Callable[[Progress], None] | None,
    ) -> tuple[float, float]:
        """Train one epoch, its order and dropout set by seed and epoch alone; return mean loss and accuracy."""
        network, module = self.network, self.network.module
        generator = torch.Generator().manual_seed(self.settings["seed"] * 10_007 + self.epoch)
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        order = torch.randperm(len(images), generator=generator).split(batch_size)
        loss_sum = torch.zeros((), device=network.device)
        hits = torch.zeros((), dtype=torch.int64, device=network.device)
        started, done = time.perf_counter(), 0
        module.train()
        try:
            for batch, pixels in zip(order, images.batches(order, network.device), strict=True):
                if len(batch) == 1 < batch_size and self.normalises:
                    report("the one image left over in this epoch is not trained on: batch norm needs two")
                    continue
                labels = images.labels[batch].to(network.device)
                loss, correct = self._step(pixels, labels, report)
                loss_sum += loss * len(batch)
                hits += correct
                done += len(batch)
                if progress is not None:
                    rate = done / (time.perf_counter() - started)
                    left = (len(images) * (epochs - self.epoch) - done) / rate
                    progress(Progress(self.epoch + 1, epochs, done, len(images), rate, left))
        finally:
            module.eval()
        mean_loss = loss_sum.item() / done
        if mean_loss != mean_loss:
            raise InputError(f"the loss is not a number after epoch {self.epoch + 1}: lower --lr")
        return mean_loss, hits.item() / done

    def _step(self, pixels: Tensor, labels: Tensor, report: Report) -> tuple[Tensor, Tensor]:
        """One Adam step on a batch, in `self.pieces` pieces; returns its loss and number of hits."""
        while True:
            try:
                self.optimizer.zero_grad(set_to_none=True)
                loss = torch.zeros((), device=labels.device)
                hits = torch.zeros((), dtype=torch.int64, device=labels.device)
                for x, y in zip(pixels.chunk(self.pieces), labels.chunk(self.pieces), strict=True):
                    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
                        logits = logits_of(self.network, x)
                    part = functional.cross_entropy(logits.float(), y, reduction="sum") / len(labels)
                    part.backward()
                    loss += part.detach()
                    hits += (logits.argmax(1) == y).sum()
                self.optimizer.step()
                return loss, hits
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise InputError(
                    "a batch norm behind maps of one pixel cannot train on one image: a larger batch size is required"
                ) from None
            except torch.OutOfMemoryError:
                if self.pieces >= len(labels):
                    raise InputError("CUDA is out of memory even for one image: lower --image-size") from None
                self.pieces *= 2
                report(f"CUDA is out of memory: each batch now runs in {self.pieces} pieces")
            torch.cuda.empty_cache()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Have CUDA operators give the same bits on every run, where torch can."""
    if device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=before[0], warn_only=before[1])


def logits_of(network: Network, pixels: Tensor) -> Tensor:
    """Logits [B, classes] of uint8 images [B, C, H, W] on the network's device."""
    x = prepare(
        pixels,
        size=network.image_size,
        channels=network.channels,
        mean=network.mean,
        std=network.std,
        bgr=network.bgr,
    )
    output = network.module(x)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        raise InputError(f"{network.name} must return a tensor of logits, got {type(output).__name__}")
    return logits


def accuracy_of(network: Network, images: Images, batch_size: int, report: Report = print) -> float:
    """Share of the images whose largest logit is that of their class."""
    order = torch.arange(len(images)).split(max(batch_size, 64))
    hits = 0
    predict = Halving(report)
    with torch.inference_mode():
        for batch, pixels in zip(order, images.batches(order, network.device), strict=True):
            logits = torch.cat(predict(lambda part: logits_of(network, part), pixels))
            hits += int((logits.argmax(1).cpu() == images.labels[batch]).sum())
    return hits / len(images)
