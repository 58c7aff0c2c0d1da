"""Our neighborhood hit against scikit-learn's PCA, t-SNE and neighbours, on the same activations.

Fails if they differ by more than 0.02 on any layer.

python -m benchmarks.agreement NETWORK[=CHECKPOINT]... --data D [--samples N] [--seeds S] [--json FILE]
"""

import argparse
import json
import time

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE as SklearnTSNE
from sklearn.neighbors import NearestNeighbors

from qdv_gpu import TSNE, activations, load_images, load_network, neighborhood_hit
from qdv_gpu.features.pca import reduce

BAR = 0.02  # on the difference in NH of any layer


def peer(X: np.ndarray, labels: np.ndarray, perplexity: float, seed: int) -> float:
    """NH (k = 5) of min-max normalised activations X [N, D] by scikit-learn alone."""
    X = (X - X.min()) / (X.max() - X.min())
    reduced = PCA(50, random_state=seed).fit_transform(X) if X.shape[1] > 50 else X
    Z = SklearnTSNE(perplexity=perplexity, init="random", max_iter=1000, random_state=seed).fit_transform(reduced)
    neighbours = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(Z).kneighbors(return_distance=False)
    return float((labels[neighbours] == labels[:, None]).mean())


def main() -> None:
    """Print and save the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", default="1000")
    parser.add_argument("--perplexity", type=float, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()

    images = load_images(options.data, samples=options.samples)
    labels = images.labels.numpy()
    rows = []
    for spec in options.networks:
        network = load_network(spec)
        for layer, X in activations(network, images).items():
            started = time.perf_counter()
            Z = TSNE(perplexity=options.perplexity).fit_transform(reduce([X], 50), seeds=options.seeds)
            ours = float(np.mean([neighborhood_hit(z, images.labels) for z in Z]))
            between = time.perf_counter()
            seeds = range(options.seeds)
            theirs = float(np.mean([peer(X.cpu().numpy(), labels, options.perplexity, seed) for seed in seeds]))
            ended = time.perf_counter()
            row = {
                "network": network.name,
                "layer": layer,
                "features": X.shape[1],
                "samples": len(images),
                "seeds": options.seeds,
                "nh": round(ours, 4),
                "nh_scikit_learn": round(theirs, 4),
                "difference": round(ours - theirs, 4),
                "seconds": round(between - started, 2),
                "seconds_scikit_learn": round(ended - between, 2),
            }
            rows.append(row)
            print(*row.values(), sep="\t", flush=True)
    largest = max(abs(row["difference"]) for row in rows)
    print(f"largest difference: {largest:.4f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)
    raise SystemExit(largest > BAR)


if __name__ == "__main__":
    main()
