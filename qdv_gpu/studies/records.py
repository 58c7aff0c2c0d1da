"""The run folder of an analysis: all its file names, what is finished, and the tables and figures made of it."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qdv_gpu.errors import InputError
from qdv_gpu.files import read_json, remove_leftovers, replacing, write_json, write_text
from qdv_gpu.report import figures

COLUMNS = ["network", "layer", "features", "samples", "perplexity", "seed", "k", "nh", "nh_feature_space"]
COLUMNS += ["chance", "tied", "trustworthiness", "continuity", "kl", "seconds"]


@dataclass(frozen=True)
class Analysis:
    """The outcome of `analyze`.

    Attributes
    ----------
    out : Path
        The run folder.
    scores : list of dict
        One entry per network, layer and k: position (from 1), network, layer, k, nh (mean over the seeds),
        standard_error, nh_feature_space, chance, tied, trustworthiness, continuity.
    figures : list of Path
    """

    out: Path
    scores: list[dict[str, Any]]
    figures: list[Path] = field(default_factory=list)

    def table(self, k: int) -> list[list[str]]:
        """The paper's Table 3 as rows of cells, a header first: layers down, networks across, NH ± standard error."""
        scores = [score for score in self.scores if score["k"] == k]
        networks = list(dict.fromkeys(score["network"] for score in scores))
        depth = max(score["position"] for score in scores)
        cells = {(score["position"], score["network"]): score for score in scores}
        names = [{cells[i, n]["layer"] for n in networks if (i, n) in cells} for i in range(1, depth + 1)]
        shared = all(len(layers) == 1 for layers in names)
        rows = [["layer", *networks, "chance"]]
        for i in range(1, depth + 1):
            row = [next(iter(names[i - 1])) if shared else str(i)]
            for network in networks:
                score = cells.get((i, network))
                text = "" if score is None else f"{score['nh']:.3f} ± {score['standard_error']:.3f}"
                row.append(text if shared or score is None else f"{score['layer']} {text}")
            rows.append([*row, f"{scores[0]['chance']:.3f}"])
        return rows


class RunFolder:
    """The files of one analysis below `out`.

    Parameters
    ----------
    out : Path
    inputs : dict
        Everything that the results depend on, as JSON. A folder that holds a run of other inputs, or something that
        is no run, is refused; nothing is written before the first layer is.
    about : dict
        What else `run.json` says.
    """

    def __init__(self, out: Path, inputs: dict[str, Any], about: dict[str, Any]) -> None:
        self.out = out
        self.inputs: dict[str, Any] = json.loads(json.dumps(inputs))
        self.about = about
        self.layers: list[tuple[str, str]] = []
        file = out / "run.json"
        if file.is_file():
            self._compare(read_json(file))
            remove_leftovers(out)
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} is not empty and holds no run.json: choose another --out")

    def _compare(self, run: Any) -> None:
        before = run.get("inputs") if isinstance(run, dict) else None
        if not isinstance(before, dict):
            raise InputError(f"{self.out / 'run.json'} is not of a qdv-gpu run: choose another --out")
        for key, value in self.inputs.items():
            if before.get(key) != value:
                change = f"{_short(before.get(key))}, not {_short(value)}"
                raise InputError(
                    f"{self.out} holds a run with another {key} ({change}): choose another --out or delete it"
                )

    def is_done(self, network: str, layer: str) -> bool:
        """Whether the layer's files are there."""
        return self._file(network, layer, ".json").is_file()

    def add(self, network: str, layer: str, arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
        """Write a finished layer: its maps, and last its record, which says that it is done."""
        if not (self.out / "run.json").is_file():
            write_json(self.out / "run.json", {"inputs": self.inputs, **self.about})
        with replacing(self._file(network, layer, ".npz")) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]  # the stubs take its options for arrays
        write_json(self._file(network, layer, ".json"), record)

    def finish(self, labels: np.ndarray, classes: Sequence[str]) -> Analysis:
        """Write the tables and figures from the finished `layers`."""
        rows, scores, timings = [], [], {}
        positions: dict[str, int] = {}
        for network, layer in self.layers:
            positions[network] = positions.get(network, 0) + 1
            record = read_json(self._file(network, layer, ".json"))
            rows += record["rows"]
            label = {"position": positions[network], "network": network, "layer": layer}
            scores += [{**label, **score} for score in record["scores"]]
            timings[f"{network}/{layer}"] = record["stages"]
        paths = [self.out / "figures" / name for name in ("maps.png", "nh.png")]
        result = Analysis(self.out, scores, paths)
        write_text(self.out / "layers.csv", _csv(rows, COLUMNS))
        write_text(self.out / "table3.csv", _csv(scores, list(scores[0])))
        write_text(self.out / "table3.md", self._markdown(result, len(labels)))
        write_json(self.out / "timings.json", timings)

        first = [score for score in scores if score["k"] == scores[0]["k"]]
        maps = [np.load(self._file(score["network"], score["layer"], ".npz"))["Z"][0] for score in first]
        pictures = [figures.plot_maps(first, maps, labels, classes), figures.plot_nh(first)]
        for path, picture in zip(paths, pictures, strict=True):
            with replacing(path) as temporary:
                picture.savefig(temporary, dpi=130)
        return result

    def _markdown(self, result: Analysis, samples: int) -> str:
        text = ""
        for k in self.inputs["k"]:
            header, *body = result.table(k)
            for line in (header, ["---"] * len(header), *body):
                text += "| " + " | ".join(line) + " |\n"
            text += (
                f"\nNeighborhood hit (k = {k}) ± standard error, {samples} test images, mean of {self.inputs['seeds']} "
                f"t-SNE maps (perplexity {self.inputs['perplexity']:g}, {self.inputs['iterations']} iterations).\n\n"
            )
        return text.rstrip() + "\n"

    def _file(self, network: str, layer: str, suffix: str) -> Path:
        return self.out / "embeddings" / network / f"{layer}{suffix}"


def _csv(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
