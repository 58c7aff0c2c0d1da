"""What a stage must hold to be used: names, shapes and types; whatever breaks a rule raises a ValueError."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from qdv_gpu.errors import short
from qdv_gpu.results.store import Record
from qdv_gpu.scores.quality import LayerScores, MapScore, Score

ARRAYS = tuple(field.name for field in fields(LayerScores) if field.name not in ("k", "maps", "mean"))


def check_array(
    arrays: Mapping[str, np.ndarray], name: str, kind: type, *shape: int | None, finite: bool = True
) -> np.ndarray:
    """One of some arrays, which has this type and this shape, None standing for any length, and finite numbers."""
    if name not in arrays:
        raise ValueError(f"it holds no {name}")
    array = arrays[name]
    if array.dtype != kind or len(array.shape) != len(shape) or any(
        b not in (None, a) for a, b in zip(array.shape, shape, strict=True)
    ):  # fmt: skip
        raise ValueError(f"{name} is {list(array.shape)} of {array.dtype}")
    if finite and not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return array


def check_numbers(said: Any, names: Sequence[str], *, unknown: bool = False) -> None:
    """Whether an object says these names and nothing else, and of each a number, which may be NaN where `unknown`."""
    if not isinstance(said, Mapping) or said.keys() != set(names):
        raise ValueError(f"it does not say {', '.join(names)}")
    for name, value in said.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not (unknown or math.isfinite(value)):
            raise ValueError(f"{name} is {short(value)}")


def check_cost(said: Any) -> None:
    """Whether an object is what a stage took."""
    check_numbers(said, ("seconds", "peak_bytes"))


def check_components(record: Record, *, samples: int, features: int | None = None) -> None:
    """Components X float32 [N, n] of a layer, the number of its features, and what they took."""
    check_array(record.arrays, "X", np.float32, samples, None)
    if features is not None and record.about["features"] != features:
        raise ValueError(f"it is of {record.about['features']} features, not {features}")
    for stage in ("activations", "pca"):
        check_cost(record.about["timings"][stage])


def check_map(record: Record, *, samples: int) -> None:
    """A map Z float32 [N, 2], its divergence, engine and cost."""
    check_array(record.arrays, "Z", np.float32, samples, 2)
    check_numbers({"kl": record.about["kl"]}, ["kl"], unknown=True)
    check_cost(record.about["timing"])
    if not isinstance(record.about["engine"], str):
        raise ValueError("it names no engine")


def check_scores(record: Record, *, samples: int, k: int, seeds: int | None = None) -> None:
    """The scores of a layer's maps for one k."""
    maps, mean = record.about["maps"], record.about["mean"]
    if not isinstance(maps, list) or not maps or seeds not in (None, len(maps)):
        raise ValueError("it has not one score for each map")
    for said, kind in [*((one, MapScore) for one in maps), (mean, Score)]:
        check_numbers(said, [field.name for field in fields(kind)], unknown=True)
        if said["k"] != k:
            raise ValueError(f"it is of k {said['k']}, not {k}")
    check_cost(record.about["timing"])
    for name in ARRAYS:
        shape = [samples] if name.endswith("_feature_space") else [len(maps), samples]
        near = name.startswith("neighbors")
        check_array(record.arrays, name, np.int32 if near else np.float64, *shape, *([k] if near else []), finite=near)


def check_predictions(record: Record, *, samples: int, classes: int) -> None:
    """Class int64 [N] and probability float32 [N] of each image."""
    said = check_array(record.arrays, "classes", np.int64, samples)
    check_array(record.arrays, "probabilities", np.float32, samples, finite=False)
    if not ((said >= 0) & (said < classes)).all():
        raise ValueError(f"classes are not below {classes}")


def check_outputs(record: Record, *, paths: Sequence[str], classes: int) -> None:
    """What two images showed of layers: features and tokens of each call, bytes of an activation, seconds."""
    said = record.about
    if said["predicts"] and said["calls"][""] != [classes]:  # of the network itself
        raise ValueError(f"the network's own outputs are {said['calls']['']!r:.40}")
    for path in paths:
        calls, tokens = said["calls"][path], said["tokens"][path]
        if not calls or len(calls) != len(tokens) or not all(isinstance(one, int) and one > 0 for one in calls):
            raise ValueError(f"calls of {path} are {calls!r:.40}")
        if not all(one is None or isinstance(one, str) for one in tokens):
            raise ValueError(f"tokens of {path} are {tokens!r:.40}")
    check_numbers({name: said[name] for name in ("element", "seconds", "predicts")}, ("element", "seconds", "predicts"))
    if not isinstance(said["channels_last"], bool):
        raise ValueError(f"channels_last is {said['channels_last']!r:.40}")
    if said["predicts"] not in (0, classes):
        raise ValueError(f"it predicts {said['predicts']} classes, not {classes}")


def check_thumbnails(record: Record) -> None:
    """Sheets of pictures, uint8."""
    if not record.arrays:
        raise ValueError("it holds no pictures")
    for name in record.arrays:
        check_array(record.arrays, name, np.uint8, None)
