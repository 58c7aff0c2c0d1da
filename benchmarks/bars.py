"""What a GPU must reach: every bar of `benchmarks/gpu_check.sh`, meant for an H100 or H200, with its limit."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

DEVICES = ("H100", "H200")
POOLINGS = [(64, 224), (128, 112), (256, 56), (512, 28), (512, 14)]  # VGG19's maps and their side before each pooling
SIGNS: dict[str, Callable[[Any, Any], bool]] = {"<=": operator.le, ">=": operator.ge}


class Bar(NamedTuple):
    """A requirement: value `sign` limit, measured in a stage that may need a package."""

    stage: str
    what: str
    sign: str
    limit: float
    needs: str = ""


TESTS = "tests on the GPU that fail"
SAME_MAPS = "t-SNE of 10,000 points: runs with the same bits, of 20"
SAME_GRIDS = "t-SNE of 100,000 points, on a grid: runs with the same bits, of 20"
SAME_PICTURES = "unpooling: runs with the same bits, of 20"
DESCENT = "exact t-SNE of 10,000 points without affinities: seconds"
EMBEDDING = "exact t-SNE of 10,000 points with all: seconds"
RATIO = "exact t-SNE of 10,000 points: ratio to cuML's seeded FFT"
HUNDRED = "100 embeddings of 1,000 points: seconds"
LARGE = {100_000: "t-SNE of 100,000 points with all: seconds", 1_000_000: "t-SNE of 1,000,000 points with all: seconds"}
RECALL = "neighbours of 100,000 points: share found by the inverted file"
DECONV = "every map of every layer of VGG19: seconds"
TABLE3 = "Table 3 of AlexNet and VGG19: seconds"


def sanitized(tool: str) -> str:
    """The bar of a tool of compute-sanitizer."""
    return f"compute-sanitizer {tool}: errors"


def unpooled(C: int, side: int) -> str:
    """The bar of a pooling of C maps."""
    return f"unpooling {C} x {side} x {side}: share of copy bandwidth"


BARS = [
    Bar("tests", TESTS, "<=", 0),
    *(Bar(tool, sanitized(tool), "<=", 0) for tool in ("memcheck", "racecheck", "synccheck", "initcheck")),
    Bar("bits", SAME_MAPS, ">=", 20),
    Bar("bits", SAME_GRIDS, ">=", 20),
    Bar("bits", SAME_PICTURES, ">=", 20),
    Bar("tsne", DESCENT, "<=", 0.05),
    Bar("tsne", EMBEDDING, "<=", 0.15),
    Bar("tsne", RATIO, ">=", 5, "cuml"),
    Bar("tsne", HUNDRED, "<=", 0.5),
    Bar("tsne", LARGE[100_000], "<=", 1),
    Bar("tsne", LARGE[1_000_000], "<=", 15),
    Bar("tsne", RECALL, ">=", 0.98),
    *(Bar("unpool", unpooled(*pooling), ">=", 0.75) for pooling in POOLINGS),
    Bar("deconv", DECONV, "<=", 3),
    Bar("table3", TABLE3, "<=", 15),
]
LIMITS = {one.what: (one.sign, one.limit) for one in BARS}


def bar(what: str, value: float, sign: str = "", limit: float = 0) -> dict[str, Any]:
    """A requirement `value` >= or <= `limit`, by default that of BARS, and whether it is met; NaN never is."""
    if not sign:
        sign, limit = LIMITS[what]
    return {"what": what, "value": float(value), "limit": f"{sign} {limit:g}", "met": SIGNS[sign](float(value), limit)}
