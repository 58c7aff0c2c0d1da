"""What can be set, each thing once: its default, the stage that depends on it, what it is, and what it may be.

The command line's options with their help, the keys of the store, and the checks follow from these tables.
"""

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from qdv_gpu.errors import (
    LARGEST,
    SEED,
    SIDE,
    InputError,
    check_among,
    check_count,
    check_flag,
    check_most,
    check_samples,
    check_whole,
    is_real,
    listed,
    short,
)
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
    most: float | None = None,
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
    least, most : float, optional
        The smallest and the largest number allowed.
    among : sequence of str, optional
        The texts allowed.
    read : callable, optional
        The value of a text from the command line, where the annotation does not say.
    """
    about = {"help": help, "stage": stage, "least": least, "most": most, "among": among, "read": read}
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
    if not isinstance(base, Settings | Training):
        raise InputError(f"settings must be Settings or Training, got {short(base)}")
    names = [field.name for field in dataclasses.fields(base)]
    for name in changes:
        check_among("setting", name, names)
    return dataclasses.replace(base, **changes)


def of_stage(table: Any, stage: Stage) -> dict[str, Any]:
    """The settings of a table that a stage depends on."""
    return {f.name: getattr(table, f.name) for f in dataclasses.fields(table) if f.metadata["stage"] == stage}


def _check_all(table: Any) -> None:
    """Check every value, and keep numbers as Python's own."""
    if table.split is not None and (not isinstance(table.split, str) or not table.split):
        raise InputError(f"split must be the name of one, got {short(table.split)}")
    values: dict[str, Any] = {name: _numbers(name, getattr(table, name)) for name in ("mean", "std")}
    values["samples"] = read_samples(table.samples)
    for field in dataclasses.fields(table):
        value = _checked(field, values.get(field.name, getattr(table, field.name)))
        object.__setattr__(table, field.name, value)


def _numbers(name: str, values: Any) -> tuple[float, ...] | None:
    if values is None:
        return None
    given = [values] if isinstance(values, numbers.Real) else listed(name, values, numbers.Real, "numbers")
    if not all(abs(value) <= LARGEST for value in given):
        raise InputError(f"{name} must be finite numbers of at most {LARGEST:g}, got {short(values)}")
    return tuple(map(float, given))


def _checked(field: Any, value: Any) -> Any:
    name = field.name.replace("_", " ")
    least, most, among = (field.metadata[rule] for rule in ("least", "most", "among"))
    if field.type is bool:
        return check_flag(name, value)
    if among is not None:
        return check_among(f"value of {name}", value, among)
    if least is None or (value is None and field.default is None):
        return value
    if field.type in (int, int | None):
        return check_most(name, check_count(name, value, least=least), most or math.inf)
    if not is_real(value) or not least <= value < math.inf:
        raise InputError(f"{name} must be a number of at least {least:g}, got {short(value)}")
    check_most(name, value, most or LARGEST)
    return operator.index(value) if isinstance(value, numbers.Integral) else float(value)


def read_samples(text: str | int) -> int | str:
    """A number of images, at least 1, or "all"."""
    found = check_samples(text)
    return found if isinstance(found, str) else check_count("samples", found)


def read_list(text: str) -> tuple[str, ...]:
    """Texts separated by commas."""
    return tuple(part.strip() for part in text.split(","))


def read_integers(text: str) -> tuple[int, ...]:
    """Integers separated by commas."""
    try:
        return tuple(int(part) for part in read_list(text))
    except ValueError:
        raise InputError(f"integers separated by commas are required, got {short(text)}") from None


def read_numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in read_list(text))
    except ValueError:
        raise InputError(f"numbers separated by commas are required, got {short(text)}") from None


def read_rate(text: str) -> float | str:
    """A number, or "auto"."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise InputError(f"learning rate must be a number or auto, got {short(text)}") from None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an analysis computes; `preset("paper")` gives the values of Wang & Liu (CIKM 2024).

    Attributes
    ----------
    split : str, optional
        Which images of the data set; None is "test", or a folder's own images if it has no folder of that name.
    samples : int or "all"
        Images, the same number of each class.
    image_size : int, optional
        Side in pixels that images are resized to; None takes the size that each network was trained at.
    crop : bool
        Resize the shorter side of an image and cut out the centre, as each network was tested, instead of squeezing it
        into a square.
    mean, std : sequence of float, optional
        Of each channel, for pixels in 0..1, instead of each network's own.
    tokens : {"auto", "cls", "mean", "all"}
        What is taken of a transformer's layers, as for `activations`.
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
    engine : {"auto", "exact", "fft", "cuml"}
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

    split: str | None = setting(None, "Which images, e.g. val; by default test.", stage="images")
    samples: int | str = setting("all", "Images, as many of each class, or all.", stage="images", read=read_samples)
    image_size: int | None = setting(
        None, "Side in pixels that images are resized to; by default each network's own.", stage="components", least=1,
        most=SIDE,
    )  # fmt: skip
    crop: bool = setting(
        default=False, help="Resize the shorter side and cut out the centre, as each network was tested.",
        stage="images",
    )  # fmt: skip
    mean: Sequence[float] | None = setting(
        None, "Of each channel, for pixels in 0..1; by default each network's own.", stage="components",
        read=read_numbers,
    )  # fmt: skip
    std: Sequence[float] | None = setting(
        None, "Of each channel; by default each network's own.", stage="components", read=read_numbers
    )
    tokens: str = setting(
        "auto", "Of a transformer's layers: cls, mean, all, or auto: cls where there is one, else mean.",
        stage="components", among=("auto", "cls", "mean", "all"),
    )  # fmt: skip
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
    seeds: int = setting(5, "t-SNE maps of each layer.", stage="layers", least=1, most=10_000)
    k: int | Sequence[int] = setting(
        (5,), "Neighbours of the neighborhood hit, e.g. 1,5,10.", stage="scores", read=read_integers
    )
    engine: str = setting(
        "auto", "Of t-SNE: auto, exact, fft or cuml.", stage="map", among=("auto", "exact", "fft", "cuml")
    )
    precision: str = setting(
        "fp32", "Of the forward pass: fp32, tf32 or bf16.", stage="components", among=("fp32", "tf32", "bf16")
    )
    memory: int | None = setting(
        None, "To stay within, e.g. 4GB; by default most of what is free.", stage="machine", least=1, read=parse_bytes
    )

    def __post_init__(self) -> None:
        _check_all(self)
        layers = self.layers
        k: Any = (self.k,) if isinstance(self.k, numbers.Integral) else self.k
        if isinstance(layers, str):
            object.__setattr__(self, "layers", read_list(layers))
        elif layers is not None:
            object.__setattr__(self, "layers", tuple(listed("layers", layers, str, "names or module paths")))
        k = [check_whole("k", n) for n in listed("k", k, what="integers")]
        object.__setattr__(self, "k", tuple(check_most("k", n, 2**63 - 1) for n in k))
        if not self.neighbors or min(self.neighbors) < 1 or len(set(self.neighbors)) < len(self.neighbors):
            raise InputError(f"k must be one or more different positive numbers, got {list(self.neighbors)}")
        rate: Any = self.learning_rate
        if is_real(rate) and 1 / LARGEST <= rate <= LARGEST:
            object.__setattr__(self, "learning_rate", rate if isinstance(rate, int | float) else float(rate))
        elif not isinstance(rate, str) or rate != "auto":
            raise InputError(
                f"learning rate must be auto or a number within {1 / LARGEST:g} and {LARGEST:g}, got {short(rate)}"
            )

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
        if images.labels is None:
            return
        if len(images.classes) < 2:
            raise InputError(f"at least two classes are required, all {N} images are of {images.classes[0]!r}")
        counts = images.labels.bincount(minlength=len(images.classes))
        for name, count in zip(images.classes, counts.tolist(), strict=True):
            if count < 2:
                raise InputError(
                    f"class {name!r} has {count or 'no'} image{'' if count else 's'}: at least 2 are required"
                )


PRESETS = {"default": Settings(), "paper": Settings(samples=1000, iterations=3000, learning_rate=200.0)}


def preset(name: str) -> Settings:
    """The settings of that name: "default" or "paper" (InputError for another)."""
    check_among("preset", name, PRESETS)
    return PRESETS[name]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is fine-tuned; the defaults are those of Wang & Liu (CIKM 2024).

    Attributes
    ----------
    split : str, optional
        Which images the accuracy is measured on; None is "test".
    samples : int or "all"
        Training images, the same number of each class.
    image_size : int, optional
        Side in pixels that images are resized to; None takes the network's own.
    crop : bool
        As for `Settings`.
    mean, std : sequence of float, optional
        As for `Settings`; kept with the weights.
    epochs : int
        Passes over the training images.
    batch_size : int
        Images in a step.
    lr : float
        Learning rate of Adam.
    seed : int
        Of the head's weights, the order and dropout.
    threads : int, optional
        Of a CPU that trains; its sums, and so the weights, depend on their number. None takes as many as torch does.
    """

    split: str | None = setting(None, "Images to test on, e.g. val; by default test.", stage="images")
    samples: int | str = setting(
        "all", "Training images, as many of each class, or all.", stage="weights", read=read_samples
    )
    image_size: int | None = setting(
        None, "Side in pixels that images are resized to; by default the network's own.", stage="weights", least=1,
        most=SIDE,
    )  # fmt: skip
    crop: bool = setting(
        default=False, help="Resize the shorter side and cut out the centre, as the network was tested.",
        stage="images",
    )  # fmt: skip
    mean: Sequence[float] | None = setting(
        None, "Of each channel, for pixels in 0..1; by default the network's own.", stage="images", read=read_numbers
    )
    std: Sequence[float] | None = setting(
        None, "Of each channel; by default the network's own.", stage="images", read=read_numbers
    )
    epochs: int = setting(10, "Passes over the training images.", stage="weights", least=1)
    batch_size: int = setting(16, "Images in a step.", stage="weights", least=1)
    lr: float = setting(1e-5, "Learning rate of Adam.", stage="weights", least=0, most=1e6)
    seed: int = setting(0, "Of the head's weights, the order and dropout.", stage="weights", least=0, most=SEED)
    threads: int | None = setting(
        None, "Of a CPU that trains, on which the weights depend; by default all.", stage="weights", least=1, most=1024
    )

    def __post_init__(self) -> None:
        _check_all(self)
        if not self.lr > 0:
            raise InputError(f"lr must be a number above 0, got {short(self.lr)}")
