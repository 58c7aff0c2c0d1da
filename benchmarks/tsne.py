"""t-SNE beside scikit-learn-intelex, scikit-learn (both Barnes-Hut), openTSNE (FFT) and, on CUDA, cuML (FFT).

Every method gets the same points, perplexity 40, a random start, 1,000 iterations, the first 250 of them with early
exaggeration 12, and the same learning rate; all are scored on one P. Times include the affinities. Rough iterations are
done sooner, so the time that ours takes to a peer's KL stands beside the time that the peer took.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import bars
from benchmarks.common import Stage, peak_resident_bytes, seconds, timing
from benchmarks.data import fashion
from qdv_gpu import TSNE, activations, load_images, load_network, neighborhood_hit
from qdv_gpu.data.images import Images
from qdv_gpu.features.pca import reduce
from qdv_gpu.machine import on_threads
from qdv_gpu.neighbors import Neighbors, knn
from qdv_gpu.scores.quality import trustworthiness
from qdv_gpu.tsne.affinities import SparseAffinities, joint_affinities
from qdv_gpu.tsne.engines.cuml import cuml_model
from qdv_gpu.tsne.objective import kl_divergence
from qdv_gpu.tsne.problem import phases
from qdv_gpu.tsne.schedule import descend

PERPLEXITY, EXAGGERATED = 40, 250
Method = Callable[[torch.Tensor, int, int], Any]  # points, iterations, seed


def rate(N: int) -> float:
    """scikit-learn's and our learning rate "auto"."""
    return max(N / 12 / 4, 50.0)


def ours(X: torch.Tensor, n_iter: int, seed: int, engine: str = "exact") -> torch.Tensor:
    """The engine of this package."""
    return TSNE(perplexity=PERPLEXITY, iterations=n_iter, seed=seed, engine=engine).fit_transform(X)


def descent(P: SparseAffinities, n_iter: int, seed: int) -> torch.Tensor:
    """The same from the affinities on, to the map: no affinities, no KL."""
    N = len(P.indptr) - 1
    start = 1e-4 * torch.randn(1, N, 2, generator=torch.Generator().manual_seed(seed)).to(P.values.device)
    steps = phases(n_iter, 12.0, EXAGGERATED)
    return descend([P], start, phases=steps, learning_rate=rate(N), gaussian=False)[0][0]


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


def intelex(X: torch.Tensor, n_iter: int, seed: int) -> np.ndarray:
    """scikit-learn-intelex, a drop-in for scikit-learn; it does not say how many iterations it did."""
    from sklearnex.manifold import TSNE as IntelTSNE

    model = IntelTSNE(
        perplexity=PERPLEXITY, max_iter=n_iter, init="random", random_state=seed, n_jobs=2,
        min_grad_norm=0.0, n_iter_without_progress=n_iter,
    )  # fmt: skip
    return np.ascontiguousarray(model.fit_transform(X.numpy()), dtype=np.float32)


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
    torch.cuda.empty_cache()  # cuML allocates beside torch
    model = cuml_model(settings, seed, rate(len(X)), None)
    found = torch.from_dlpack(model.fit_transform(cupy.from_dlpack(columns)))
    torch.cuda.synchronize()
    return found.contiguous()


def peers(device: torch.device) -> dict[str, Method]:
    """Those that are installed."""
    on_cpu: dict[str, Method] = {"sklearnex": intelex, "openTSNE": open_tsne, "sklearn": scikit_learn}
    known = {"cuml": cuml} if device.type == "cuda" else on_cpu
    return {name: method for name, method in known.items() if importlib.util.find_spec(name)}


def validate(X: torch.Tensor, stage: Stage) -> None:
    """Compare KL with a plain sum over all pairs; the same seed must give the same bits, with one thread as well.

    Run on a few points, it also warms up every kernel.
    """
    model = TSNE(perplexity=PERPLEXITY, iterations=300)
    Z = model.fit_transform(X)
    with on_threads(1):
        again = ours(X, 300, 0)
    stage.bar("coordinates that one thread moves", int((Z != again).sum()), "<=", 0)
    P = joint_affinities(X, perplexity=PERPLEXITY)
    p, z = torch.zeros(len(X), len(X), dtype=torch.float64), Z.double().cpu()
    rows = torch.arange(len(X)).repeat_interleave(P.indptr.diff().cpu())
    p[rows, P.indices.long().cpu()] = P.values.double().cpu()
    q = (1 / (1 + (z[:, None] - z).square().sum(dim=2))).fill_diagonal_(0)
    truth = float((torch.xlogy(p, p) - torch.xlogy(p, q / q.sum())).sum())
    kl = float(model.kl_divergence_)
    stage.bar("KL: relative difference to a plain sum", abs(kl / truth - 1), "<=", 1e-6)


def calls(methods: dict[str, Method], X: torch.Tensor, n_iter: int) -> dict[str, Callable[[int], Any]]:
    """The methods on X as functions of a seed."""
    return {name: partial(method, X, n_iter) for name, method in methods.items()}


def race(
    stage: Stage, what: str, methods: dict[str, Callable[[int], Any]], repeats: int
) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Keep the seconds of each method, with a seed for each repeat; returns their medians and the maps."""
    print(f"  {what}")
    times, maps = stage.interleaved(methods, repeats)
    row = timing(f"t-SNE, {what}", times)
    stage.row(row)
    return {"ours": row["seconds"], **row["peers"]}, maps


def judge(stage: Stage, what: str, X: torch.Tensor, labels: torch.Tensor, maps: dict[str, list[Any]]) -> None:
    """Keep how good the maps of each method are; every KL is on the same P."""
    P, table = joint_affinities(X, perplexity=PERPLEXITY), {}
    for name in maps:
        with stage.part(f"quality of {name}, {what}"):
            Z = [torch.as_tensor(z).to(X.device) for z in maps[name]]
            table[name] = {
                "kl": median([kl_divergence(P, z) for z in Z]),
                "nh": median([neighborhood_hit(z, labels) for z in Z]),
                "trustworthiness": median([trustworthiness(X, z) for z in Z]),
            }
            print(f"    {name:<16}", ", ".join(f"{key} {value:.4f}" for key, value in table[name].items()), flush=True)
            stage.note(quality={**stage.record.get("quality", {}), what: table})
            if name == "exact":
                stage.bar(f"{what}: KL over the exact engine's", table["ours"]["kl"] / table[name]["kl"], "<=", 1.005)
            elif name != "ours" and "ours" in table:
                stage.bar(f"{what}: KL less that of {name}", table["ours"]["kl"] - table[name]["kl"], "<=", 0)


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


def faster(stage: Stage, what: str, X: torch.Tensor, spent: dict[str, float], most: float) -> None:
    """Keep our time as a share of scikit-learn-intelex's, for as many iterations and to its KL.

    The latter by runs of more and more iterations, each from the points on.
    """
    theirs, kl = spent["sklearnex"], stage.record["quality"][what]["sklearnex"]["kl"]
    stage.bar(f"{what}: time over that of sklearnex", spent["ours"] / theirs, "<=", most)
    P, curve = joint_affinities(X, perplexity=PERPLEXITY), []
    for iterations in range(EXAGGERATED + 50, 1001, 50):
        took, Z = seconds(partial(ours, X, iterations, 0, "auto"))
        curve.append({"iterations": iterations, "seconds": took, "kl": kl_divergence(P, Z)})
        if curve[-1]["kl"] <= kl:
            break
    stage.note(to_divergence={**stage.record.get("to_divergence", {}), what: curve})
    reached = curve[-1]["seconds"] if curve[-1]["kl"] <= kl else math.inf
    stage.bar(f"{what}: time to the KL of sklearnex over its time", reached / theirs, "<=", 0.4)


def curves(stage: Stage, what: str, X: torch.Tensor, methods: dict[str, Method], iterations: Sequence[int]) -> None:
    """Keep seconds and KL of runs of more and more iterations, each from the points on, for benchmarks.curves."""
    P, found = joint_affinities(X, perplexity=PERPLEXITY), {name: [] for name in methods}
    for n_iter in iterations:
        for name, method in methods.items():
            if stage.fits(f"{name}, {n_iter} iterations of {what}"):
                spent, Z = seconds(partial(method, X, n_iter, 0))
                kl = kl_divergence(P, torch.as_tensor(Z))
                found[name].append({"iterations": n_iter, "seconds": round(spent, 3), "kl": kl})
                print(f"    {name:<16}{n_iter:>5} iterations: {spent:.2f} s, KL {kl:.4f}", flush=True)
        stage.note(curves={what: found})


def in_a_process(X: torch.Tensor, n_iter: int, device: torch.device) -> dict[str, float]:
    """Seconds and peak memory of one embedding, in a process that does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "X.npy"
        np.save(file, X.cpu().numpy())
        command = [sys.executable, "-m", "benchmarks.tsne", str(file), str(n_iter), device.type]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def alone(stage: Stage, X: torch.Tensor, n_iter: int) -> None:
    """One embedding of a sixth of the points and one of all, each in a process of its own."""
    rows = []
    for N in (len(X) // 6, len(X)):
        if not stage.fits(f"{N:,} points in a process of their own"):
            return
        rows.append({"points": N, **in_a_process(X[:N], n_iter, X.device)})
        stage.note(many=rows)
        print(f"  {N:,} points: {rows[-1]['seconds']:.2f} s, peak {rows[-1]['peak_bytes'] / 1e9:.3f} GB", flush=True)
    sixth, full = rows
    growth = math.log(full["seconds"] / sixth["seconds"], full["points"] / sixth["points"])
    stage.bar(f"{sixth['points']:,} to {full['points']:,} points: exponent of the time", growth, "<=", 1.2)
    stage.bar(f"{full['points']:,} points: peak memory, GB", full["peak_bytes"] / 1e9, "<=", 1.5)


def hundred(stage: Stage, X: torch.Tensor, few: int, n_iter: int, repeats: int) -> None:
    """A hundred embeddings at once: ten sets of `few` points, ten seeds each."""
    batch = X[: len(X) // few * few].view(-1, few, X.shape[1])
    model = TSNE(perplexity=PERPLEXITY, iterations=n_iter, engine="exact")

    def embed(_: int) -> None:
        model.fit_transform(batch, seeds=100 // len(batch))

    embed(0)
    times, _ = stage.interleaved({"ours": embed}, repeats)
    stage.row(timing(f"t-SNE, 100 embeddings of {few:,} points", times))
    stage.bar(bars.HUNDRED, median(times["ours"]))


def filled_up(whole: torch.Tensor, N: int) -> torch.Tensor:
    """N points: beyond those there are, copies moved by a tenth of each column's standard deviation."""
    points = whole.repeat(math.ceil(N / len(whole)), 1)[:N].clone()
    generator = torch.Generator(whole.device).manual_seed(0)
    noise = torch.randn(points.shape, generator=generator, device=whole.device) * whole.std(dim=0) / 10
    points[len(whole) :] += noise[len(whole) :]
    return points


def neighbours(points: torch.Tensor, engine: str, turn: int) -> Neighbors:
    """Those that affinities are of."""
    return knn(points, 3 * PERPLEXITY, engine=engine)


def nearly_all(stage: Stage, whole: torch.Tensor, sizes: list[int]) -> None:
    """From where on an inverted file finds the neighbours sooner than a search of all pairs, and the share it finds."""
    rows = []
    for N in sizes:
        points = filled_up(whole, N)
        searches = {engine: partial(neighbours, points, engine) for engine in ("auto", "inverted")}
        times, found = stage.interleaved(searches, 3)
        every, nearly = found["auto"][0], found["inverted"][0]
        recall = float((nearly.squared_distances <= every.squared_distances[:, -1:]).double().mean())
        rows.append({"points": N, "found": recall, **{name: median(spent) for name, spent in times.items()}})
        print(" ", rows[-1], flush=True)
    stage.note(neighbours=rows)
    stage.bar(bars.RECALL, rows[-1]["found"])


def overtaking(stage: Stage, whole: torch.Tensor, sizes: list[int], methods: dict[str, Method], n_iter: int) -> None:
    """Where cuML overtakes, one run of each size."""
    rows: list[dict[str, float]] = []
    for N in sizes:
        if not stage.fits(f"{N:,} points"):
            continue
        with stage.part(f"{N:,} points"):
            points = filled_up(whole, N)
            times, maps = stage.interleaved(calls(methods, points, n_iter), 1)
            P = joint_affinities(points, perplexity=PERPLEXITY)
            row = {"points": N, **{name: median(spent) for name, spent in times.items()}}
            if N in bars.LARGE:
                stage.bar(bars.LARGE[N], row["ours"])
            rows.append(row | {f"kl_{name}": kl_divergence(P, maps[name][0]) for name in times})
            overtaken = [row["points"] for row in rows if row.get("cuml", math.inf) < row["ours"]]
            stage.note(sizes=rows, cuml_overtakes_at=overtaken[:1])
            print(" ", rows[-1], flush=True)


def run(options: argparse.Namespace, stage: Stage) -> None:
    """Measure, on `options.device`, what the device has bars for."""
    device, quick = options.device, options.quick
    cuda = device.type == "cuda"
    few, large, more = (300, 1000, [1200]) if quick else (1000, 10_000, [30_000, 60_000])
    n_iter, repeats = (300, 1) if quick else (1000, 3)
    train, test = (fashion(split) for split in ("train", "test"))
    X, labels = (part[:large] for part in components(test, device=device))
    stage.note(iterations=n_iter, repeats=repeats, perplexity=PERPLEXITY, points=test.name)
    methods: dict[str, Method] = {"ours": ours} if cuda else {"ours": partial(ours, engine="auto"), "exact": ours}
    with stage.part("correctness"):
        validate(X[:300], stage)
    for name, method in peers(device).items():
        with stage.part(name):
            method(X[:300], 300, 0)  # warm-up
            methods[name] = method
    source = "Fashion-MNIST" if test.name == "fashion-mnist" else test.name

    what = f"{source}, {len(X):,} points"
    with stage.part(source):
        spent, maps = race(stage, what, calls(methods, X, n_iter), repeats)
        if cuda:
            stage.bar(bars.EMBEDDING, spent["ours"])
            if "cuml" in spent:
                stage.bar(bars.RATIO, spent["cuml"] / spent["ours"])
        judge(stage, what, X, labels, maps)
        if "sklearnex" in spent:
            faster(stage, what, X, spent, 0.8)
    if not cuda:
        with stage.part("time against KL"):
            quickly = {name: method for name, method in methods.items() if name != "sklearn"}
            curves(stage, what, X, quickly, (275, 300) if quick else (300, 350, 400, 500, 600, 800, 1000))
    if cuda:
        with stage.part(bars.DESCENT):
            P = joint_affinities(X, perplexity=PERPLEXITY)
            times, _ = stage.interleaved({"ours": lambda seed: descent(P, n_iter, seed)}, repeats + 1)
            times["ours"] = times["ours"][1:] or times["ours"]  # the first is a warm-up
            stage.row(timing(f"t-SNE, {source}, {len(X):,} points, without affinities", times))
            stage.bar(bars.DESCENT, median(times["ours"]))
        with stage.part(bars.HUNDRED):
            hundred(stage, X, few, n_iter, repeats)
    else:
        with stage.part(f"{few:,} points"):
            chosen = {name: method for name, method in methods.items() if name != "openTSNE"}
            what = f"{few:,} points of {source}"
            spent, maps = race(stage, what, calls(chosen, X[:few], n_iter), 3 * repeats)
            judge(stage, what, X[:few], labels[:few], maps)
            if "sklearnex" in spent:
                stage.bar(f"{what}: time over that of sklearnex", spent["ours"] / spent["sklearnex"], "<=", 0.7)
        whole, classes = components(train, test, device=device)
        rivals = {name: method for name, method in methods.items() if name in ("ours", "sklearnex")}
        for N in more:
            if stage.fits(f"{N:,} points"):
                with stage.part(f"{N:,} points"):
                    what = f"{source}, {N:,} points"
                    spent, maps = race(stage, what, calls(rivals, whole[:N], n_iter), 1)
                    judge(stage, what, whole[:N], classes[:N], maps)
                    if "sklearnex" in spent:
                        faster(stage, what, whole[:N], spent, 1.0)
        with stage.part("growth"):
            alone(stage, whole[: more[-1]], n_iter)

    def digits() -> tuple[str, tuple[torch.Tensor, torch.Tensor]]:
        return "digits", components(*(load_images("digits", split) for split in ("train", "test")), device=device)

    for find in (digits, partial(last_layer, options)) if options.network and options.data else (digits,):
        if stage.fits("another set of points"):
            with stage.part("another set of points"):
                name, (points, classes) = find()
                points, classes = points[:large], classes[:large]
                what = f"{name}, {len(points):,} points"
                judge(stage, what, points, classes, race(stage, what, calls(methods, points, n_iter), repeats)[1])
    if cuda:
        with stage.part("sizes"):
            whole, _ = components(train, test, device=device)
            nearly_all(stage, whole, [500, 1000] if quick else [20_000, 50_000, 100_000])
            sizes = [500, 1000] if quick else [10_000, 20_000, 50_000, 100_000, 200_000, 1_000_000]
            overtaking(stage, whole, sizes, methods | {"ours": partial(ours, engine="auto")}, n_iter)


def main() -> None:
    """Embed the points of one file: FILE.npy N_ITER DEVICE."""
    file, n_iter, device = sys.argv[1:]
    X = torch.from_numpy(np.load(file)).to(device)
    engine = "auto" if device == "cpu" else "exact"
    ours(X[:1000], 300, 0, engine)  # compiles, or loads what was compiled
    spent, _ = seconds(lambda: ours(X, int(n_iter), 0, engine))
    print(json.dumps({"seconds": round(spent, 3), "peak_bytes": peak_resident_bytes()}))


if __name__ == "__main__":
    main()
