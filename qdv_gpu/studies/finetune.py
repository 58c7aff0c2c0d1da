"""Transfer learning: fine-tune every weight of a network on a data set."""

import copy
import json
import logging
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from qdv_gpu.data.convert import as_images
from qdv_gpu.data.datasets import load_images, stratified
from qdv_gpu.data.images import Images
from qdv_gpu.errors import InputError, as_path, check_count, check_flag
from qdv_gpu.features.forward import gains_by_channels_last, network_input, shown
from qdv_gpu.files import replacing
from qdv_gpu.machine import Halving, deterministic, on_threads, product_precision, seeded
from qdv_gpu.networks.account import describe_variant
from qdv_gpu.networks.copies import shared_copy
from qdv_gpu.networks.guard import guarded
from qdv_gpu.networks.layers import check_memory
from qdv_gpu.networks.load import Source, load_network
from qdv_gpu.networks.network import Network, check_replaced
from qdv_gpu.networks.variant import home
from qdv_gpu.networks.weights import read_tensors, write_weights
from qdv_gpu.progress import advance
from qdv_gpu.report.curves import plot_training
from qdv_gpu.report.folder import RunFolder, save_figure
from qdv_gpu.results.stages import weights_key
from qdv_gpu.results.store import Key, Record, Store
from qdv_gpu.studies.settings import Training, changed, of_stage

logger = logging.getLogger(__name__)
CHECKPOINT, WEIGHTS = "checkpoint.safetensors", "weights.safetensors"
RESULT, CURVE = "finetune.json", "training.png"


def finetune(
    network: Source,
    data: Any,
    out: str | Path,
    *,
    settings: Training | None = None,
    weights: str | Path = "imagenet",
    device: str | torch.device = "auto",
    store: str | Path | None = None,
    skip_bad: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Fine-tune a network with Adam, as the paper does, and write it to `out`.

    The defaults are those of Wang & Liu (CIKM 2024). On CUDA the forward pass runs in bfloat16. After each
    epoch `out/checkpoint.safetensors` is replaced; the same call after a kill goes on from it and ends, on the
    same device, with the same weights as a run that was not interrupted (on CUDA as far as torch has deterministic
    operators, on a CPU with the same number of threads). When CUDA runs out of memory each batch is computed in halves,
    which leaves the gradient as it was (batch norm then sees the halves).

    Parameters
    ----------
    network : str, nn.Module, Network or Variant
        As for `load_network`; a module is not changed. What a variant changes is said before it is trained.
    data : str, Path or dict
        As for `load_images`, or {"train": ..., "test": ...} of what `as_images` takes, with labels.
    out : str or Path
        Gets weights.safetensors, finetune.json and training.png.
    settings : Training, optional
    weights, device
        As for `load_network`.
    store : str or Path, optional
        Where the weights are kept; see `Store.beside`. What is there already is not trained again.
    skip_bad : bool
        As for `load_images`.
    **changes
        Settings by name, e.g. `epochs=3`.

    Returns
    -------
    dict
        `history` (one dict an epoch: loss, accuracy on the training images while training, accuracy on up to
        1,000 test images), `test_accuracy` on all test images, and the settings. Also in `out/finetune.json`.

    Raises
    ------
    InputError
        For bad settings, or if `out` holds a run with others, or another one is writing to it. One of the same
        settings is waited for, and not trained again.
    """
    if settings is not None and not isinstance(settings, Training):
        raise InputError(f"settings must be Training, got {type(settings).__name__}")
    settings, out = changed(Training() if settings is None else settings, changes), as_path("out", out)
    check_flag("skip_bad", skip_bad)
    folder = RunFolder(out, "finetune")
    folder.check()
    prepared = Prepared.of(network, data, settings, weights=weights, device=device, skip_bad=skip_bad)
    loaded, train, about, key = prepared.network, prepared.train, prepared.about, prepared.key
    if loaded.base is not None:
        for line in describe_variant(loaded).lines():
            logger.info("%s", line)
    kept = Store.beside(out, store)
    kept.check(out)
    with kept.used(), kept.computing(key), folder.locked({"training": about}):
        run = _Run(loaded, about, out, settings, len(train.classes))
        metadata = {name: about[name] for name in ("network", "image_size", "data")}
        metadata |= {"image_mean": loaded.mean, "image_std": loaded.std, "crop": settings.crop}
        record = kept.read(key, partial(_check_result, module=loaded.module))
        if record is None:
            if run.epoch > settings.epochs:
                raise InputError(
                    f"{out} holds a run of {run.epoch} epochs, not {settings.epochs}: choose another --out or delete it"
                )
            result = _trained(run, train, prepared.test, settings)
            result["settings"] = {name: value for name, value in about.items() if name != "images"}
            result["settings"]["epochs"] = run.epoch
            tensors = loaded.module.state_dict()
        else:
            logger.info("%s was trained before: its weights are in %s", loaded.name, record.folder)
            result = record.about
            tensors, _ = read_tensors(record.folder / WEIGHTS)
        folder.claim(WEIGHTS, RESULT, CURVE)
        (out / RESULT).unlink(missing_ok=True)  # it may be of other weights
        write_weights(out / WEIGHTS, tensors, metadata)  # which may have been called otherwise
        if record is None:
            kept.write(key, about=result, files={WEIGHTS: out / WEIGHTS})
        folder.json(RESULT, result)
        with replacing(out / CURVE) as temporary:
            figure, _ = plot_training(result["history"], f"{loaded.name} on {train.name}")
            save_figure(figure, temporary)
        folder.finish({"stages": [key.digest]})
        kept.refer(out)
    return result


def _check_result(record: Record, *, module: nn.Module) -> None:
    """ValueError unless a stage holds a training of the module, and its weights."""
    said = record.about
    check_history(said["history"])
    if not isinstance(said["test_accuracy"], int | float) or not isinstance(said["classes"], list):
        raise ValueError("it says no accuracy or no classes")
    check_like(read_tensors(record.folder / WEIGHTS)[0], module.state_dict())


def check_history(history: Any) -> None:
    """ValueError unless it is a history of a training: numbers of each epoch."""
    named = {"loss", "accuracy", "test_accuracy"}
    if not isinstance(history, list) or not all(isinstance(one, dict) and one.keys() == named for one in history):
        raise ValueError("it holds no history of epochs")
    if not all(isinstance(value, int | float) and math.isfinite(value) for one in history for value in one.values()):
        raise ValueError("its history holds what is no number")


def check_like(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """ValueError unless tensors have the names, shapes and types of a module's own, and hold finite numbers."""
    if tensors.keys() != own.keys():
        raise ValueError(f"it has other tensors: {min(tensors.keys() ^ own.keys())}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
            kind = f"{list(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"{name} is {kind}, not {list(own[name].shape)} of {own[name].dtype}")
        if not (tensor.isfinite() | ~own[name].isfinite().cpu()).all():  # a mask may hold infinities from the start
            raise ValueError(f"{name} holds NaN or infinity")


@dataclass(frozen=True)
class Prepared:
    """A training before it starts.

    Attributes
    ----------
    network : Network
        With the weights that it starts from, and a head for the images' classes.
    train, test : Images
        As the network is shown them.
    about : dict
        What a checkpoint must have been made with, to be gone on from.
    key : Key
        Under which the store keeps what comes of it.
    """

    network: Network
    train: Images
    test: Images
    about: dict[str, Any]
    key: Key

    @classmethod
    def of(
        cls, network: Source, data: Any, settings: Training, *, weights: str | Path, device: str | torch.device,
        skip_bad: bool,
    ) -> "Prepared":  # fmt: skip
        """Load images and network; arguments and errors as for `finetune`."""
        train, test = _images(data, settings, skip_bad=skip_bad)
        loaded = load_network(
            network, weights=weights, num_classes=len(train.classes), image_size=settings.image_size,
            mean=settings.mean, std=settings.std, seed=settings.seed, device=device,
        )  # fmt: skip
        if home(network) is None:  # its weights are somebody else's
            loaded = replace(loaded, module=copy.deepcopy(loaded.module))
        loaded = loaded.at_size(settings.image_size)
        check_memory(
            loaded, loaded.image_size, 1 if loaded.device.type == "cuda" else min(settings.batch_size, len(train))
        )
        train, test = (shown(images, loaded, crop=settings.crop) for images in (train, test))
        about = {
            "network": loaded.spec,
            "weights": loaded.source,
            "data": train.name,
            **{key: value for key, value in asdict(settings).items() if key != "epochs"},
            "image_size": loaded.image_size,
            "mean": loaded.mean,
            "std": loaded.std,
            "images": {"train": [train.digest, train.labels_digest], "test": [test.digest, test.labels_digest]},
        }
        stage = {**of_stage(settings, "weights"), "image_size": loaded.image_size}
        return cls(loaded, train, test, about, weights_key(loaded, train, test, stage))


def _images(data: Any, settings: Training, *, skip_bad: bool) -> tuple[Images, Images]:
    """The training images and the test images."""
    side = None if settings.crop else settings.image_size
    if not isinstance(data, str | Path):
        if not isinstance(data, dict):
            kind = type(data).__name__
            raise InputError(f'data must be a name, a folder or {{"train": ..., "test": ...}}, got {kind}')
        if set(data) != {"train", "test"}:
            raise InputError(
                f'data must be a name, a folder or {{"train": ..., "test": ...}}, got the keys {list(data)}'
            )
        train, test = (as_images(data[split], image_size=side) for split in ("train", "test"))
        labels, classes = train.require_labels("fine-tuning"), train.classes
        train = train.take(stratified(labels, classes, settings.samples))
    else:
        train = load_images(data, "train", samples=settings.samples, image_size=side, skip_bad=skip_bad)
        test = load_images(data, settings.split or "test", image_size=side, skip_bad=skip_bad)
    test.require_labels("fine-tuning")
    if train.classes != test.classes:
        raise InputError(f"{train.name}: the classes of train and test differ")
    return train, test


def _trained(run: "_Run", train: Images, test: Images, settings: Training) -> dict[str, Any]:
    """Train to the last epoch, and what came of it."""
    network, batch_size = run.network, settings.batch_size
    if run.epoch:
        logger.info("going on from %s after epoch %d", run.checkpoint, run.epoch)
    train, test = train.to(network.device), test.to(network.device)
    labels = test.require_labels("fine-tuning")
    quick = test.take(stratified(labels, test.classes, min(1000, len(test)))) if len(test) > 1000 else test
    ordered = deterministic() if network.device.type == "cuda" else nullcontext()
    with seeded(settings.seed), ordered, on_threads(settings.threads):
        while run.epoch < settings.epochs:
            started = time.perf_counter()
            loss, accuracy = run.train(train)
            seconds = time.perf_counter() - started
            entry = {"loss": loss, "accuracy": accuracy, "test_accuracy": accuracy_of(network, quick, batch_size)}
            run.history.append(entry)
            run.save()
            logger.info(
                "epoch %d/%d: loss %.3f, training accuracy %.1f%%, accuracy on %d test images %.1f%%; %.0f images/s, "
                "%.0f s left",
                run.epoch, settings.epochs, loss, 100 * accuracy, len(quick), 100 * entry["test_accuracy"],
                len(train) / seconds, (settings.epochs - run.epoch) * seconds,
            )  # fmt: skip
        test_accuracy = accuracy_of(network, test, batch_size)
    return {
        "classes": list(train.classes),
        "history": run.history,
        "test_accuracy": test_accuracy,
        "test_images": len(test),
        "training_images": len(train),
        "device": str(network.device),
        "torch": torch.__version__,
    }


class _OtherRunError(InputError):
    """A checkpoint is whole, and of a run with other settings."""


class _Run:
    """A network, its optimizer and how far they have come; `checkpoint.safetensors` holds all of it."""

    def __init__(self, network: Network, about: dict[str, Any], out: Path, settings: Training, classes: int) -> None:
        self.network, self.about, self.settings = network, json.loads(json.dumps(about)), settings
        self.checkpoint, self.classes = out / CHECKPOINT, classes
        self.parameters = dict(network.module.named_parameters())
        gains = gains_by_channels_last(network)
        self._lay_out(torch.channels_last if gains else torch.contiguous_format)
        if gains and not self._goes_back():
            self._lay_out(torch.contiguous_format)
        # Of float16, whose second moments are soon 0, the loss becomes infinite without it, which is refused.
        kinds = {parameter.dtype for parameter in self.parameters.values()}
        fused = all(kind.is_floating_point and kind != torch.float16 for kind in kinds)
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=settings.lr, fused=fused)
        self.history: list[dict[str, float]] = []
        self.tiles = 1
        self.normalises = any(isinstance(module, _BatchNorm) for module in network.module.modules())
        if self.checkpoint.is_file():
            self._resume()

    @property
    def epoch(self) -> int:
        return len(self.history)

    def _lay_out(self, layout: torch.memory_format) -> None:
        """Put weights of convolutions, which these follow, in that layout, and others in torch's default.

        Fused Adam takes parameters as they lie in memory, where there must be nothing between their numbers.
        """
        for parameter in self.parameters.values():
            own = layout if parameter.ndim == 4 else torch.contiguous_format
            parameter.data = parameter.data.contiguous(memory_format=own)

    def _goes_back(self) -> bool:
        """Whether two images go forward and back through a copy of the network; one that takes views may refuse."""
        network = replace(self.network, module=shared_copy(self.network.module).train())
        two = torch.zeros(2, network.channels, network.image_size, network.image_size, device=network.device)
        try:
            with seeded(self.settings.seed), guarded(f"{network.name} cannot be trained"):
                with torch.autocast(two.device.type, torch.bfloat16, enabled=two.is_cuda):
                    logits = logits_of(network, two)
                logits.sum().backward()
        except (InputError, torch.OutOfMemoryError):
            return False
        return True

    def _resume(self) -> None:
        try:
            tensors, metadata = read_tensors(self.checkpoint)
            if not metadata:
                raise _OtherRunError(f"{self.checkpoint} is of another program: choose another --out")
            before = metadata["settings"]
            for name, value in self.about.items():
                if before.get(name) != value:
                    raise _OtherRunError(
                        f"{self.checkpoint.parent} holds a run with {name}={before.get(name)!r}, not {value!r}: "
                        "choose another --out or delete it"
                    )
            history, tiles = metadata["history"], metadata["tiles"]
            check_history(history)
            check_count("tiles", tiles)
            adam = {name: tensors.pop(name) for name in list(tensors) if name.startswith("adam/")}
            check_like(tensors, self.network.module.state_dict())
            self._check_adam(adam)
        except _OtherRunError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            said = " ".join(str(error).split())
            logger.warning("%s is damaged (%s): training starts from its first epoch", self.checkpoint, said)
            return
        names = list(self.parameters)
        state: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(names))}
        for name, tensor in adam.items():
            _, key, parameter = name.split("/", 2)
            if key != "step":  # in the parameter's layout: fused Adam takes both as they lie in memory
                tensor = torch.empty_like(self.parameters[parameter]).copy_(tensor)
            state[names.index(parameter)][key] = tensor
        self.network.module.load_state_dict(tensors)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.history, self.tiles = history, tiles

    def _check_adam(self, tensors: Mapping[str, Tensor]) -> None:
        """ValueError unless these are what Adam keeps, of parameters that have been trained."""
        trained = {name.split("/", 2)[-1] for name in tensors}
        step = torch.zeros((), dtype=torch.float32 if self.optimizer.defaults["fused"] else torch.get_default_dtype())
        if not trained:
            raise ValueError("it holds no state of the optimizer")
        own = {
            f"adam/{key}/{name}": like
            for name, parameter in self.parameters.items()
            if name in trained
            for key, like in {"step": step, "exp_avg": parameter, "exp_avg_sq": parameter}.items()
        }
        check_like(tensors, own)

    def save(self) -> None:
        tensors = dict(self.network.module.state_dict())
        names = list(self.parameters)
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam/{key}/{names[index]}": value for key, value in state.items()}
        write_weights(self.checkpoint, tensors, {"settings": self.about, "history": self.history, "tiles": self.tiles})

    def train(self, images: Images) -> tuple[float, float]:
        """Train one epoch, its order and dropout set by seed and epoch alone; return mean loss and accuracy."""
        network, module = self.network, self.network.module
        generator = torch.Generator().manual_seed(self.settings.seed * 10_007 + self.epoch)
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device="cpu")))
        order = torch.randperm(len(images), generator=generator, device="cpu").split(self.settings.batch_size)
        loss_sum = torch.zeros((), device=network.device)
        hits = torch.zeros((), dtype=torch.int64, device=network.device)
        labels = images.require_labels("fine-tuning")[torch.cat(order)].to(network.device)
        done, stage = 0, f"epoch {self.epoch + 1} of {self.settings.epochs}"
        module.train()
        try:
            targets = labels.split(self.settings.batch_size)
            for batch, y, pixels in zip(order, targets, images.batches(order, network.device), strict=True):
                if len(batch) == 1 < self.settings.batch_size and self.normalises:
                    logger.info("the one image left over in this epoch is not trained on: batch norm needs two")
                    continue
                loss, correct = self._step(pixels, y)
                loss_sum += loss * len(batch)
                hits += correct
                done += len(batch)
                advance(stage, done, len(images))
        finally:
            module.eval()
        if not done:
            raise InputError(f"batch norm needs two images, {images.name} has one: more samples are required")
        mean_loss = loss_sum.item() / done
        if not math.isfinite(mean_loss):
            raise InputError(f"the loss is not a number, or infinite, after epoch {self.epoch + 1}: lower --lr")
        return mean_loss, hits.item() / done

    def _check_logits(self, logits: Tensor) -> None:
        if logits.shape[1] < self.classes:
            got = f"got {logits.shape[1]}"
            raise InputError(f"{self.network.name} must return a logit for each of {self.classes} classes, {got}")
        if not logits.requires_grad:
            raise InputError(
                f"{self.network.name} must return logits that depend on its weights: they cannot be trained"
            )

    def _step(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One Adam step on a batch, in `self.tiles` tiles; returns its loss and number of hits."""
        while True:
            try:
                self.optimizer.zero_grad(set_to_none=True)
                loss = torch.zeros((), device=labels.device)
                hits = torch.zeros((), dtype=torch.int64, device=labels.device)
                for x, y in zip(pixels.chunk(self.tiles), labels.chunk(self.tiles), strict=True):
                    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
                        logits = logits_of(self.network, x)
                    self._check_logits(logits)
                    share = functional.cross_entropy(logits.float(), y, reduction="sum") / len(labels)
                    with guarded(f"{self.network.name} cannot be trained: its gradient fails"):
                        share.backward()
                    loss += share.detach()
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
                if self.tiles >= len(labels):
                    raise InputError("CUDA is out of memory even for one image: lower --image-size") from None
                self.tiles *= 2
                logger.warning("CUDA is out of memory: each batch now runs in %d tiles", self.tiles)
            torch.cuda.empty_cache()


def logits_of(network: Network, pixels: Tensor) -> Tensor:
    """Logits [B, classes] of images [B, C, H, W] on the network's device."""
    before = dict(network.module.named_modules())
    output = network(network_input(network, pixels))
    check_replaced(network.name, before, network.module)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise InputError(f"{network.name} must return a tensor of logits, got {type(output).__name__}")
    if logits.ndim != 2 or len(logits) != len(pixels) or not logits.is_floating_point():
        got = f"{list(logits.shape)} of {str(logits.dtype).removeprefix('torch.')}"
        raise InputError(f"{network.name} must return logits [{len(pixels)}, classes], floating point, got {got}")
    return logits


def accuracy_of(network: Network, images: Images, batch_size: int) -> float:
    """Share of the images whose largest logit is that of their class."""
    order = torch.arange(len(images)).split(max(batch_size, 64))
    labels = images.require_labels("an accuracy").to(network.device).split(max(batch_size, 64))
    hits = torch.zeros((), dtype=torch.int64, device=network.device)
    predict = Halving()
    with torch.inference_mode(), product_precision("ieee"):  # as an analysis predicts
        for y, pixels in zip(labels, images.batches(order, network.device), strict=True):
            logits = torch.cat(predict(lambda tile: logits_of(network, tile), pixels))
            hits += (logits.argmax(1) == y).sum()
    return int(hits) / len(images)
