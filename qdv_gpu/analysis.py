"""The pipeline: networks and images in, a run folder with maps, scores, tables and figures out."""

import csv
import io
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import qdv_gpu
from qdv_gpu.data import Images, load_images
from qdv_gpu.device import free_memory, measured, resolve_device
from qdv_gpu.errors import InputError, unknown
from qdv_gpu.files import read_json, remove_leftovers, replacing, write_json, write_text
from qdv_gpu.forward import ForwardPass, hold
from qdv_gpu.networks import Network, load_network
from qdv_gpu.pca import NORMALISATIONS, reduce
from qdv_gpu.quality import score_maps
from qdv_gpu.tsne import ENGINES, TSNE

Report = Callable[[str], None]
COLUMNS = ["network", "layer", "features", "samples", "perplexity", "seed", "k", "nh", "nh_feature_space"]
COLUMNS += ["chance", "tied", "trustworthiness", "continuity", "kl", "seconds"]


@dataclass(frozen=True)
class Settings:
    """What an analysis computes; `PRESETS["paper"]` holds the values of Wang & Liu (CIKM 2024).

    Attributes
    ----------
    samples : int or "all"
        Test images, the same number of each class.
    image_size : int, optional
        Side in pixels that images are resized to; None takes the size that each network was trained at.
    layers : tuple of str, optional
        Layer names or module paths; None takes each network's default layers.
    normalise : {"minmax", "l2", "standard", "none"}
    pca : int
        Components before t-SNE; 0 for none.
    perplexity : float
    iterations : int
    learning_rate : float or "auto"
    seeds : int
        Number of t-SNE maps of each layer, from seeds 0, 1, ...
    k : tuple of int
        Numbers of neighbours that the neighborhood hit is computed for.
    engine : {"auto", "exact", "cuml"}
        Of t-SNE.
    """

    samples: int | str = "all"
    image_size: int | None = None
    layers: tuple[str, ...] | None = None
    normalise: str = "minmax"
    pca: int = 50
    perplexity: float = 40.0
    iterations: int = 1000
    learning_rate: float | str = "auto"
    seeds: int = 5
    k: tuple[int, ...] = (5,)
    engine: str = "auto"

    def check(self) -> None:
        """Raise InputError for a value that no data can make valid."""
        if self.normalise not in NORMALISATIONS:
            raise unknown("normalisation", self.normalise, NORMALISATIONS)
        if self.engine not in ENGINES:
            raise unknown("t-SNE engine", self.engine, ENGINES)
        least = {"pca": 0, "iterations": 1, "seeds": 1, "image_size": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise InputError(f"{name.replace('_', ' ')} must be at least {bound}, got {value}")
        if not self.k or min(self.k) < 1 or len(set(self.k)) < len(self.k):
            raise InputError(f"k must be one or more different positive numbers, got {list(self.k)}")

    def check_images(self, images: Images) -> None:
        """Raise InputError for a value that does not fit these images."""
        N = len(images)
        if not 1 <= self.perplexity < (N - 1) / 3:
            raise InputError(
                f"perplexity must be at least 1 and 3 * perplexity below N - 1 = {N - 1}, got {self.perplexity:g}"
            )
        if max(self.k) >= N / 2:
            raise InputError(f"k must be smaller than half the number of images ({N}), got {max(self.k)}")
        counts = images.labels.bincount(minlength=len(images.classes))
        for name, count in zip(images.classes, counts.tolist(), strict=True):
            if count < 2:
                raise InputError(f"class {name!r} has {count} images: at least 2 are required")


PRESETS = {"paper": Settings(samples=1000, image_size=224, iterations=3000, learning_rate=200.0)}


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
        """The paper's Table 3 as rows of cells, a header first: layers down, networks across, NH +- standard error."""
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


def analyze(
    networks: Sequence[str],
    data: str | Path,
    out: str | Path,
    *,
    settings: Settings | str = "default",
    weights: str | Path = "imagenet",
    device: str = "auto",
    skip_bad: bool = False,
    report: Report = print,
) -> Analysis:
    """Score every layer of networks: activations, normalisation, PCA, t-SNE, neighborhood hit (Algorithm 1).

    Parameters
    ----------
    networks : sequence of str
        As for `load_network`: "alexnet", "vgg19=runs/vgg19", "package.module:factory", ...
    data : str or Path
        As for `load_images`; its test images are analysed.
    out : str or Path
        The run folder: run.json, layers.csv, table3.md and .csv, timings.json, embeddings/<network>/<layer>.npz
        (Z float32 [S, N, 2], labels, indices) and figures/*.png. A layer that is already there is not computed
        again, so a killed run goes on where it was.
    settings : Settings or "default" or "paper"
    weights : str or Path
        For the networks that name no checkpoint, as for `load_network`.
    report : callable
        Called with one line of text for each thing that a user should know.

    Returns
    -------
    Analysis

    Raises
    ------
    InputError
        For anything in the input that is not as required; nothing has been written then. Also for NaN or infinite
        activations, an `out` folder from other settings, and a full disk.
    """
    if isinstance(settings, str):
        if settings not in ("default", *PRESETS):
            raise unknown("preset", settings, ["default", *PRESETS])
        settings = PRESETS.get(settings, Settings())
    settings.check()
    if not networks:
        raise InputError("at least one network is required")
    target = resolve_device(device)
    loaded = _distinct([load_network(spec, weights=weights, device=target) for spec in networks])
    selected = [network.select(settings.layers) for network in loaded]
    images = load_images(data, "test", samples=settings.samples, image_size=settings.image_size, skip_bad=skip_bad)
    settings.check_images(images)
    if images.skipped:
        report(f"skipped {images.skipped} unreadable files")

    run = _Run(Path(out), settings, images=images, networks=loaded, device=target, data=data, weights=weights)
    images = images.to(target)
    for network, layers in zip(loaded, selected, strict=True):
        run.network(network, images, layers, report)
    return run.finish(images)


def _distinct(networks: list[Network]) -> list[Network]:
    """Number the labels of networks that share one."""
    labels = [network.name for network in networks]
    for position, network in enumerate(networks):
        if labels.count(network.name) > 1:
            networks[position] = replace(network, name=f"{network.name}-{labels[: position + 1].count(network.name)}")
    return networks


class _Run:
    """A run folder: its files, and which of its stages are done."""

    def __init__(
        self,
        out: Path,
        settings: Settings,
        *,
        images: Images,
        networks: Sequence[Network],
        device: torch.device,
        data: str | Path,
        weights: str | Path,
    ) -> None:
        self.out, self.settings = out, settings
        inputs = {
            "data": str(data),
            "images": images.fingerprint(),
            "networks": {network.name: _fingerprint(network) for network in networks},
            "device": device.type,
            **json.loads(json.dumps(asdict(settings))),
        }
        self.hash = sha256(json.dumps([qdv_gpu.__version__, inputs]).encode()).hexdigest()
        self.layers: list[tuple[str, str]] = []
        file = out / "run.json"
        if file.is_file():
            before = read_json(file).get("inputs", {})
            changed = [key for key, value in inputs.items() if before.get(key) != value]
            if changed:
                key = changed[0]
                raise InputError(
                    f"{out} holds a run with another {key} ({_short(before.get(key))}, not {_short(inputs[key])}): "
                    "choose another --out or delete it"
                )
            remove_leftovers(out)
        elif out.exists() and any(out.iterdir()):
            raise InputError(f"{out} is not empty and holds no run.json: choose another --out")
        write_json(
            file,
            {
                "inputs": inputs,
                "weights": str(weights),
                "seeds": list(range(settings.seeds)),
                "samples": len(images),
                "classes": list(images.classes),
                "skipped": images.skipped,
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
                "versions": {
                    "qdv_gpu": qdv_gpu.__version__,
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "numpy": np.__version__,
                },
            },
        )

    def network(self, network: Network, images: Images, layers: dict[str, str], report: Report) -> None:
        """Compute the layers of one network that are not done yet."""
        settings = self.settings
        probe = ForwardPass(network, images.take(torch.arange(1)), layers, settings.image_size)
        names = [name for outputs in probe for name in outputs]
        self.layers += [(network.name, name) for name in names]
        pending = [name for name in names if not self._is_done(network.name, name)]
        if len(pending) < len(names):
            report(f"{network.name}: {len(names) - len(pending)} of {len(names)} layers were done before")
        if not pending:
            return
        room = free_memory(network.device) // 2
        kept: dict[str, str] = {}
        for name in sorted(pending, key=probe.widths.__getitem__):
            size = probe.widths[name] * len(images) * 4
            if size <= room:
                kept[probe.source(name)] = layers[probe.source(name)]
                room -= size
        pass_ = ForwardPass(network, images, kept, settings.image_size, report=report)
        with measured(network.device) as forward:
            held = hold(pass_) if kept else {}
        share = {**forward, "seconds": round(forward["seconds"] / max(1, len(held)), 3)}
        for name in pending:
            stages = {"activations": share} if name in held else {}
            tiles = (
                held.pop(name).split(pass_.batch_size) if name in held else replace(pass_, layers=layers).tiles(name)
            )
            self._layer(network, images, name, tiles, features=probe.widths[name], stages=stages, report=report)

    def _layer(
        self,
        network: Network,
        images: Images,
        layer: str,
        tiles: Iterable[Tensor],
        *,
        features: int,
        stages: dict[str, dict[str, float]],
        report: Report,
    ) -> None:
        settings = self.settings
        with measured(network.device) as stages["pca"]:
            X = reduce(tiles, settings.pca, normalise=settings.normalise, name=f"{network.name} {layer}")
        del tiles
        with measured(network.device) as stages["tsne"]:
            tsne = TSNE(
                perplexity=settings.perplexity,
                n_iter=settings.iterations,
                learning_rate=settings.learning_rate,
                engine=settings.engine,
                device=str(network.device),
            )
            Z = tsne.fit_transform(X, seeds=settings.seeds)  # [S, N, 2]
        with measured(network.device) as stages["quality"]:
            rows, scores = score_maps(X, Z, images.labels, k=settings.k)
        divergences = np.atleast_1d(tsne.kl_divergence_)  # [S]
        seconds = sum(stage["seconds"] for stage in stages.values()) / settings.seeds
        for row in rows:
            row |= {
                "network": network.name,
                "layer": layer,
                "features": features,
                "samples": len(images),
                "perplexity": settings.perplexity,
                "kl": float(divergences[row["seed"]]),
                "seconds": round(seconds, 3),
            }
        with replacing(self._file(network.name, layer, ".npz")) as temporary:
            np.savez(temporary, Z=Z.cpu().numpy(), labels=images.labels.numpy(), indices=images.indices.numpy())
        done = {"hash": self.hash, "engine": tsne.engine_, "stages": stages, "rows": rows, "scores": scores}
        write_json(self._file(network.name, layer, ".json"), done)
        best = scores[0]
        report(f"{network.name} {layer}: NH {best['nh']:.3f} ± {best['standard_error']:.3f} ({features} features)")

    def finish(self, images: Images) -> Analysis:
        """Write the tables and figures from the finished layers."""
        from qdv_gpu import figures

        rows, scores, timings = [], [], {}
        positions: dict[str, int] = {}
        for network, layer in self.layers:
            positions[network] = positions.get(network, 0) + 1
            done = read_json(self._file(network, layer, ".json"))
            rows += done["rows"]
            label = {"position": positions[network], "network": network, "layer": layer}
            scores += [{**label, **score} for score in done["scores"]]
            timings[f"{network}/{layer}"] = done["stages"]
        write_text(self.out / "layers.csv", _csv(rows, COLUMNS))
        write_text(self.out / "table3.csv", _csv(scores, list(scores[0])))
        write_json(self.out / "timings.json", timings)
        result = Analysis(self.out, scores)
        write_text(self.out / "table3.md", self._markdown(result, len(images)))

        maps = [
            (score, np.load(self._file(score["network"], score["layer"], ".npz"))["Z"][0])
            for score in scores
            if score["k"] == self.settings.k[0]
        ]
        labels = images.labels.numpy()
        with replacing(self.out / "figures" / "maps.png") as temporary:
            figures.plot_maps(maps, labels, images.classes).savefig(temporary, dpi=130)
        with replacing(self.out / "figures" / "nh.png") as temporary:
            figures.plot_nh([score for score, _ in maps]).savefig(temporary, dpi=130)
        return replace(result, figures=[self.out / "figures" / name for name in ("maps.png", "nh.png")])

    def _markdown(self, result: Analysis, samples: int) -> str:
        settings, text = self.settings, ""
        for k in settings.k:
            header, *body = result.table(k)
            lines = [header, ["---"] * len(header), *body]
            text += "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n"
            text += (
                f"Neighborhood hit (k = {k}) ± standard error, {samples} test images, mean of {settings.seeds} t-SNE "
                f"maps (perplexity {settings.perplexity:g}, {settings.iterations} iterations).\n\n"
            )
        return text.rstrip() + "\n"

    def _file(self, network: str, layer: str, suffix: str) -> Path:
        return self.out / "embeddings" / network / f"{layer}{suffix}"

    def _is_done(self, network: str, layer: str) -> bool:
        file = self._file(network, layer, ".json")
        maps = self._file(network, layer, ".npz")
        return file.is_file() and maps.is_file() and read_json(file)["hash"] == self.hash


def _fingerprint(network: Network) -> str:
    digest = sha256(network.spec.encode())
    for name, tensor in network.module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _csv(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
