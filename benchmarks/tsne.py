"""Exact t-SNE beside scikit-learn (Barnes-Hut), openTSNE (FFT) and, on CUDA, cuML (FFT).

Every method gets the same points, perplexity 40, a random start, 1,000 iterations, the first 250 of them with early
exaggeration 12, and the same learning rate; all are scored on one P. Times include the affinities.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common import bar, interleaved, peak_resident_bytes, seconds, timing
from qdv_gpu import TSNE, activations, load_images, load_network, neighborhood_hit
from qdv_gpu.data.images import Images
from qdv_gpu.features.pca import reduce
from qdv_gpu.scores.quality import trustworthiness
from qdv_gpu.tsne.affinities import SparseAffinities, joint_affinities
from qdv_gpu.tsne.engines.cuml import cuml_model
from qdv_gpu.tsne.objective import kl_divergence

PERPLEXITY, EXAGGERATED = 40, 250
Method = Callable[[torch.Tensor, int, int], Any]  # points, iterations, seed


def rate(N: int) -> float:
    """scikit-learn's and our learning rate "auto"."""
    return max(N / 12 / 4, 50.0)


def ours(X: torch.Tensor, n_iter: int, seed: int, engine: str = "exact") -> torch.Tensor:
    """The engine of this package."""
    return TSNE(perplexity=PERPLEXITY, iterations=n_iter, seed=seed, engine=engine).fit_transform(X)


def scikit_learn(X: torch.Tensor, n_iter: int, seed: int) -> np.ndarray:
    """Barnes-Hut; its learning rate "auto" is ours."""
    from sklearn.manifold import TSNE as ScikitTSNE

    model = ScikitTSNE(
        perplexity=PERPLEXITY, max_iter=n_iter, init="random", random_state=seed, n_jobs=2,
        min_grad_norm=0.0, n_iter_without_progress=n_iter,
    )  # fmt: skip
    Z = model.fit_transform(X.numpy())
    assert model.n_iter_ == n_iter - 1, f"stopped early, at {model.n_iter_ + 1}"
    return Z


def open_tsne(X: torch.Tensor, n_iter: int, seed: int) -> np.ndarray:
    """Interpolation by FFT; its gradient lacks the factor 4, so that its learning rate has it."""
    from openTSNE import TSNE as OpenTSNE

    model = OpenTSNE(
        perplexity=PERPLEXITY, n_iter=n_iter - EXAGGERATED, early_exaggeration_iter=EXAGGERATED,
        early_exaggeration=12, learning_rate=4 * rate(len(X)), initialization="random",
        negative_gradient_method="fft", random_state=seed, n_jobs=2,
    )  # fmt: skip
    return np.asarray(model.fit(X.numpy()), dtype=np.float32)


def cuml(X: torch.Tensor, n_iter: int, seed: int) -> torch.Tensor:
    """cuML's FFT from points that are on the device, with its own neighbours."""
    import cupy

    settings = TSNE(perplexity=PERPLEXITY, iterations=n_iter).get_params()
    columns = X.T.contiguous().T  # column-major, which cuML reads without a copy
    torch.cuda.current_stream().synchronize()
    model = cuml_model(settings, seed, rate(len(X)), None)
    return torch.from_dlpack(model.fit_transform(cupy.from_dlpack(columns))).contiguous()


def peers(device: torch.device) -> dict[str, Method]:
    """Those that are installed."""
    known = {"cuml": cuml} if device.type == "cuda" else {"sklearn": scikit_learn, "openTSNE": open_tsne}
    return {name: method for name, method in known.items() if importlib.util.find_spec(name)}


def validate(X: torch.Tensor) -> None:
    """Compare KL with a plain sum over all pairs; the same seed must give the same bits, with one thread as well.

    Run on a few points, it also warms up every kernel.
    """
    import numba

    model = TSNE(perplexity=PERPLEXITY, iterations=300)
    Z = model.fit_transform(X)
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    again = ours(X, 300, 0)
    numba.set_num_threads(threads)
    assert torch.equal(Z, again), "the same seed gave other bits"
    P = joint_affinities(X, perplexity=PERPLEXITY)
    assert isinstance(P, SparseAffinities)
    p, z = torch.zeros(len(X), len(X), dtype=torch.float64), Z.double().cpu()
    rows = torch.arange(len(X)).repeat_interleave(P.indptr.diff().cpu())
    p[rows, P.indices.long().cpu()] = P.values.double().cpu()
    q = (1 / (1 + (z[:, None] - z).square().sum(dim=2))).fill_diagonal_(0)
    truth = float((torch.xlogy(p, p) - torch.xlogy(p, q / q.sum())).sum())
    kl = float(model.kl_divergence_)
    assert abs(kl / truth - 1) < 1e-6, f"KL {kl}, by a plain sum {truth}"


def compare(X: torch.Tensor, labels: torch.Tensor, methods: dict[str, Method], n_iter: int, repeats: int) -> dict:
    """Median seconds and quality of each method on X, with a seed for each repeat; every KL is on the same P."""
    P = joint_affinities(X, perplexity=PERPLEXITY)
    times, maps = interleaved({name: partial(method, X, n_iter) for name, method in methods.items()}, repeats)
    table = {}
    for name in methods:
        Z = [torch.as_tensor(z).to(X.device) for z in maps[name]]
        assert all(z.shape == (len(X), 2) and z.isfinite().all() for z in Z), name
        table[name] = {
            "seconds": median(times[name]),
            "all_seconds": times[name],
            "kl": median([kl_divergence(P, z) for z in Z]),
            "nh": median([neighborhood_hit(z, labels) for z in Z]),
            "trustworthiness": median([trustworthiness(X, z) for z in Z]),
        }
    print(f"  {f'{len(X):,} points, {n_iter:,} iterations':<30}   seconds        KL        NH  trustworthiness")
    for name, row in table.items():
        print(f"    {name:<28}{row['seconds']:>10.3f}{row['kl']:>10.4f}{row['nh']:>10.4f}", end="")
        print(f"{row['trustworthiness']:>17.4f}")
    return table


def components(*splits: Images, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The first 50 principal components of the images' pixels, float32 [N, 50], and their classes [N]."""
    pixels = torch.cat([images.pixels.flatten(1) for images in splits if images.pixels is not None])
    return reduce([pixels.to(device, torch.float32)], 50), torch.cat([images.labels for images in splits])


def last_layer(options: argparse.Namespace) -> tuple[str, tuple[torch.Tensor, torch.Tensor]]:
    """The same of the activations of a network's last layer, and its name."""
    network = load_network(options.network[0], device=options.device)
    images = load_images(options.data, samples=options.images)
    name = list(network.layers)[-1]
    held = activations(network, images.to(options.device), layers=[name])
    return f"{network.name} {name}", (reduce([held[name]], 50), images.labels)


def in_a_process(X: torch.Tensor, n_iter: int, device: torch.device) -> dict[str, float]:
    """Seconds and peak memory of one embedding, in a process that does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "X.npy"
        np.save(file, X.cpu().numpy())
        command = [sys.executable, "-m", "benchmarks.tsne", str(file), str(n_iter), device.type]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def alone(X: torch.Tensor, n_iter: int) -> list[dict[str, float]]:
    """One embedding of half of the points and one of all, each in a process of its own."""
    rows = [{"points": N, **in_a_process(X[:N], n_iter, X.device)} for N in (len(X) // 2, len(X))]
    for row in rows:
        print(f"  {row['points']:,} points: {row['seconds']:.2f} s, peak {row['peak_bytes'] / 1e9:.3f} GB")
    return rows


def on_cuda(
    X: torch.Tensor, whole: torch.Tensor, *, few: int, sizes: list[int], n_iter: int, repeats: int
) -> dict[str, Any]:
    """A hundred embeddings of `few` points at once, repeatability on X, and where cuML overtakes.

    Sizes beyond the data are filled up with copies, moved by a tenth of each column's standard deviation.
    """
    batch = X[: len(X) // few * few].view(-1, few, X.shape[1])  # ten sets, ten seeds each
    model = TSNE(perplexity=PERPLEXITY, iterations=n_iter, engine="exact")
    many = [seconds(lambda: model.fit_transform(batch, seeds=100 // len(batch)))[0] for _ in range(repeats + 1)][1:]
    first = ours(X, n_iter, 0)
    same = 1 + sum(torch.equal(first, ours(X, n_iter, 0)) for _ in range(19))
    generator = torch.Generator(X.device).manual_seed(0)
    rows = []
    for N in sizes:
        points = whole.repeat(math.ceil(N / len(whole)), 1)[:N].clone()
        noise = torch.randn(points.shape, generator=generator, device=X.device) * whole.std(dim=0) / 10
        points[len(whole) :] += noise[len(whole) :]
        methods = {"ours": ours, **peers(X.device)}
        calls = {name: partial(method, points, n_iter) for name, method in methods.items()}
        times, maps = interleaved(calls, repeats)
        P = joint_affinities(points, perplexity=PERPLEXITY)
        row = {"points": N, **{name: median(times[name]) for name in methods}}
        rows.append(row | {f"kl_{name}": kl_divergence(P, maps[name][0]) for name in methods})
        print(" ", rows[-1], flush=True)
    overtaken = [row["points"] for row in rows if row.get("cuml", math.inf) < row["ours"]]
    return {"hundred_seconds": median(many), "equal_runs": same, "sizes": rows, "cuml_overtakes_at": overtaken[:1]}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, on `options.device`, what the device has bars for."""
    device, quick = options.device, options.quick
    cuda = device.type == "cuda"
    few, large, many = (300, 1000, 1400) if quick else (1000, 10_000, 40_000)
    n_iter, repeats = (300, 1) if quick else (1000, 3)
    others = peers(device)
    methods = {"ours": ours, **others}
    train, test = (load_images("fashion-mnist", split) for split in ("train", "test"))
    X, labels = (part[:large] for part in components(test, device=device))
    validate(X[:300])
    for method in others.values():  # warm-up
        method(X[:300], 300, 0)

    result: dict[str, Any] = {"iterations": n_iter, "repeats": repeats, "perplexity": PERPLEXITY}
    print("Fashion-MNIST")
    quality = {"Fashion-MNIST": compare(X, labels, methods, n_iter, repeats)}
    bars = []
    own, *theirs = (row["seconds"] for row in quality["Fashion-MNIST"].values())
    if theirs:
        ratio, least = min(theirs) / own, 5 if cuda else 3
        bars.append(bar(f"{len(X):,} points: ratio to the faster of {', '.join(others)}", ratio, ">=", least))
    if cuda:
        bars.append(bar(f"{len(X):,} points: seconds", own, "<=", 0.25))
        sizes = [500, 1000] if quick else [10_000, 20_000, 50_000, 100_000, 200_000]
        whole, _ = components(train, test, device=device)
        result["cuda"] = on_cuda(X, whole, few=few, sizes=sizes, n_iter=n_iter, repeats=repeats)
        bars.append(bar(f"100 embeddings of {few:,} points: seconds", result["cuda"]["hundred_seconds"], "<=", 1))
        bars.append(bar("runs with the same bits, of 20", result["cuda"]["equal_runs"], ">=", 20))
    else:
        chosen = {name: method for name, method in methods.items() if name != "openTSNE"}
        result["few"] = compare(X[:few], labels[:few], chosen, n_iter, repeats)
        if "sklearn" in others:
            ratio = result["few"]["sklearn"]["seconds"] / result["few"]["ours"]["seconds"]
            bars.append(bar(f"{few:,} points: ratio to sklearn", ratio, ">=", 8))
        half, full = result["many"] = alone(components(train, device=device)[0][:many], n_iter)
        growth = math.log2(full["seconds"] / half["seconds"])
        bars.append(bar(f"{half['points']:,} to {full['points']:,} points: exponent of the time", growth, "<=", 2))
        bars.append(bar(f"{full['points']:,} points: peak memory, GB", full["peak_bytes"] / 1e9, "<=", 1))

    sets = {"digits": components(*(load_images("digits", split) for split in ("train", "test")), device=device)}
    if options.network and options.data:
        name, points = last_layer(options)
        sets[name] = points
    counts = {"Fashion-MNIST": len(X)}
    for name, (points, classes) in sets.items():
        print(name)
        counts[name] = min(len(points), large)
        quality[name] = compare(points[:large], classes[:large], methods, n_iter, repeats)
    for name, table in quality.items():
        for other in others:
            bars.append(bar(f"{name}: KL less that of {other}", table["ours"]["kl"] - table[other]["kl"], "<=", 0))
    few_points = {f"{few:,} points of Fashion-MNIST": result["few"]} if "few" in result else {}
    tables = {f"{name}, {counts[name]:,} points": table for name, table in quality.items()} | few_points
    timings = [
        timing(f"t-SNE, {what}", {method: row["all_seconds"] for method, row in table.items()})
        for what, table in tables.items()
    ]
    return {**result, "quality": quality, "timings": timings, "bars": bars}


def main() -> None:
    """Embed the points of one file: FILE.npy N_ITER DEVICE."""
    file, n_iter, device = sys.argv[1:]
    X = torch.from_numpy(np.load(file)).to(device)
    ours(X[:200], 300, 0)  # compiles, or loads what was compiled
    spent, _ = seconds(lambda: ours(X, int(n_iter), 0))
    print(json.dumps({"seconds": round(spent, 3), "peak_bytes": peak_resident_bytes()}))


if __name__ == "__main__":
    main()
