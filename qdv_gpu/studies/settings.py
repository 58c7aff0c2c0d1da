"""What can be set, each thing once: its default, the stage that depends on it, what it is, and what it may be.

The command line's options with their help, the keys of the store, and the checks follow from these tables.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from qdv_gpu.errors import InputError, unknown
from qdv_gpu.files import parse_bytes

if TYPE_CHECKING:
    from qdv_gpu.data.images import Images  # torch is not needed to show the command line's help

T = TypeVar("T", bound="Settings | Training")
Stage = Literal["images", "layers", "components", "map", "scores", "machine", "weights"]


def setting(
    default: Any,
    help: str,
    *,
    stage: Stage,
    least: float | None = None,
    among: Sequence[str] | None = None,
    read: Callable[[str], Any] | None = None,
) -> Any:
    """A field of a table of settings.

    Parameters
    ----------
    default : object
    help : str
        One line, for the command line.
    stage : str
        The stage whose key holds the value: "machine" for what changes no result, "images" and "layers" for what only
        chooses.
    least : float, optional
        The smallest number allowed.
    among : sequence of str, optional
        The texts allowed.
    read : callable, optional
        The value of a text from the command line, where the annotation does not say.
    """
    about = {"help": help, "stage": stage, "least": least, "among": among, "read": read}
    return dataclasses.field(default=default, metadata=about)


def changed(base: T, changes: Mapping[str, Any]) -> T:
    """A table `base`, but for `changes`, by name.

    Raises
    ------
    InputError
        For a name that is no setting, or a value that is not allowed.

    >>> changed(Settings(), {"perplexity": 30}).perplexity
    30
    """
    names = [field.name for field in dataclasses.fields(base)]
    for name in changes:
        if name not in names:
            raise unknown("setting", name, names)
    return dataclasses.replace(base, **changes)


def of_stage(table: Any, stage: Stage) -> dict[str, Any]:
    """The settings of a table that a stage depends on."""
    return {f.name: getattr(table, f.name) for f in dataclasses.fields(table) if f.metadata["stage"] == stage}


def _check_all(table: Any) -> None:
    for field in dataclasses.fields(table):
        _check(field, getattr(table, field.name))


def _check(field: Any, value: Any) -> None:
    name, least, among = field.name.replace("_", " "), field.metadata["least"], field.metadata["among"]
    if value == field.default and type(value) is type(field.default):
        return
    if among is not None and value not in among:
        raise unknown(f"value of {name}", str(value), among)
    if least is None:
        return
    number = value if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    whole = field.type in (int, int | None)
    if not least <= number < math.inf or (whole and not isinstance(value, numbers.Integral)):
        kind = "an integer of" if whole else "a number of"
        raise InputError(f"{name} must be {kind} at least {least:g}, got {value!r}")


def read_samples(text: str | int) -> int | str:
    """A number of images, or "all"."""
    if text == "all" or (isinstance(text, int) and not isinstance(text, bool)):
        return text
    if isinstance(text, str) and text.isascii() and text.isdigit():
        return int(text)
    raise InputError(f"samples must be a number or all, got {text!r}")


def read_list(text: str) -> tuple[str, ...]:
    """Texts separated by commas."""
    return tuple(part.strip() for part in text.split(","))


def read_integers(text: str) -> tuple[int, ...]:
    """Integers separated by commas."""
    try:
        return tuple(int(part) for part in read_list(text))
    except ValueError:
        raise InputError(f"integers separated by commas are required, got {text!r}") from None


def read_rate(text: str) -> float | str:
    """A number, or "auto"."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise InputError(f"learning rate must be a number or auto, got {text!r}") from None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an analysis computes; `preset("paper")` gives the values of Wang & Liu (CIKM 2024).

    Attributes
    ----------
    samples : int or "all"
        Test images, the same number of each class.
    image_size : int, optional
        Side in pixels that images are resized to; None takes the size that each network was trained at.
    layers : sequence of str, optional
        Layer names or module paths, of which each network has at least one; None takes its default layers.
    normalise : {"minmax", "l2", "standard", "none"}
    pca : int
        Components before t-SNE; 0 for none.
    perplexity : float
    iterations : int
    learning_rate : float or "auto"
    seeds : int
        Number of t-SNE maps of each layer, from seeds 0, 1, ...
    k : int or sequence of int
        Numbers of neighbours that the neighborhood hit is computed for; kept as a tuple.
    engine : {"auto", "exact", "cuml"}
        Of t-SNE.
    precision : {"fp32", "tf32", "bf16"}
        Of the forward pass: float32, on CUDA with products in TF32, or automatic mixed precision with bfloat16.
    memory : int, optional
        Bytes to stay within, weights and images included; None for four fifths of what is free.

    Raises
    ------
    InputError
        For a value that no data can make valid.

    Examples
    --------
    >>> Settings(perplexity=30, k=3).k
    (3,)
    """

    samples: int | str = setting(
        "all", "Test images, as many of each class, or all.", stage="images", read=read_samples
    )
    image_size: int | None = setting(
        None, "Side in pixels that images are resized to; by default each network's own.", stage="components", least=1
    )
    layers: Sequence[str] | None = setting(
        None, "Names or module paths, separated by commas; by default the outputs of the stages.", stage="layers",
        read=read_list,
    )  # fmt: skip
    normalise: str = setting(
        "minmax", "minmax, l2, standard or none.", stage="components", among=("minmax", "l2", "standard", "none")
    )
    pca: int = setting(50, "Principal components before t-SNE; 0 for none.", stage="components", least=0)
    perplexity: float = setting(40.0, "Of t-SNE.", stage="map", least=1)
    iterations: int = setting(1000, "Of t-SNE.", stage="map", least=1)
    learning_rate: float | str = setting("auto", "Of t-SNE: a number or auto.", stage="map", read=read_rate)
    seeds: int = setting(5, "t-SNE maps of each layer.", stage="layers", least=1)
    k: int | Sequence[int] = setting(
        (5,), "Neighbours of the neighborhood hit, e.g. 1,5,10.", stage="scores", read=read_integers
    )
    engine: str = setting("auto", "Of t-SNE: auto, exact or cuml.", stage="map", among=("auto", "exact", "cuml"))
    precision: str = setting(
        "fp32", "Of the forward pass: fp32, tf32 or bf16.", stage="components", among=("fp32", "tf32", "bf16")
    )
    memory: int | None = setting(
        None, "To stay within, e.g. 4GB; by default most of what is free.", stage="machine", least=1, read=parse_bytes
    )

    def __post_init__(self) -> None:
        _check_all(self)
        read_samples(self.samples)
        layers = self.layers
        k: Any = (self.k,) if isinstance(self.k, numbers.Integral) else self.k
        if layers is not None:
            object.__setattr__(self, "layers", (layers,) if isinstance(layers, str) else tuple(layers))
        if isinstance(k, str) or not all(isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in k):
            raise InputError(f"k must be integers, got {self.k!r}")
        object.__setattr__(self, "k", tuple(int(n) for n in k))
        if not self.neighbors or min(self.neighbors) < 1 or len(set(self.neighbors)) < len(self.neighbors):
            raise InputError(f"k must be one or more different positive numbers, got {list(self.neighbors)}")
        rate = self.learning_rate
        if rate != "auto" and not (isinstance(rate, numbers.Real) and 0 < float(rate) < math.inf):
            raise InputError(f"learning rate must be auto or a positive number, got {rate!r}")

    @property
    def neighbors(self) -> tuple[int, ...]:
        """`k` as a tuple."""
        assert isinstance(self.k, tuple)
        return self.k

    def check_images(self, images: "Images") -> None:
        """Raise InputError for a value that does not fit these images."""
        N = len(images)
        if not 1 <= self.perplexity < (N - 1) / 3:
            raise InputError(
                f"perplexity must be at least 1 and 3 * perplexity below N - 1 = {N - 1}, got {self.perplexity:g}"
            )
        if max(self.neighbors) >= N / 2:
            raise InputError(f"k must be smaller than half the number of images ({N}), got {max(self.neighbors)}")
        counts = images.require_labels("an analysis").bincount(minlength=len(images.classes))
        for name, count in zip(images.classes, counts.tolist(), strict=True):
            if count < 2:
                raise InputError(f"class {name!r} has {count} images: at least 2 are required")


PRESETS = {"default": Settings(), "paper": Settings(samples=1000, iterations=3000, learning_rate=200.0)}


def preset(name: str) -> Settings:
    """The settings of that name: "default" or "paper" (InputError for another)."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is fine-tuned; the defaults are those of Wang & Liu (CIKM 2024).

    Attributes
    ----------
    samples : int or "all"
        Training images, the same number of each class.
    image_size : int, optional
        Side in pixels that images are resized to; None takes the network's own.
    epochs : int
        Passes over the training images.
    batch_size : int
        Images in a step.
    lr : float
        Learning rate of Adam.
    seed : int
        Of the head's weights, the order and dropout.
    """

    samples: int | str = setting(
        "all", "Training images, as many of each class, or all.", stage="weights", read=read_samples
    )
    image_size: int | None = setting(
        None, "Side in pixels that images are resized to; by default the network's own.", stage="weights", least=1
    )
    epochs: int = setting(10, "Passes over the training images.", stage="weights", least=1)
    batch_size: int = setting(16, "Images in a step.", stage="weights", least=1)
    lr: float = setting(1e-5, "Learning rate of Adam.", stage="weights", least=0)
    seed: int = setting(0, "Of the head's weights, the order and dropout.", stage="weights", least=0)

    def __post_init__(self) -> None:
        _check_all(self)
        read_samples(self.samples)
        if not self.lr > 0:
            raise InputError(f"lr must be a number above 0, got {self.lr!r}")
