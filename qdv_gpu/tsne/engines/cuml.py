"""t-SNE by cuML's FFT method, where it is asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qdv_gpu.neighbors import knn
from qdv_gpu.tsne.problem import MOMENTUM

MAX_NEIGHBORS = 1023  # counting the point itself


def cuml_embeddings(X: torch.Tensor, settings: Mapping[str, Any], seeds: Sequence[int], rate: float) -> torch.Tensor:
    """Embed X [N, d] with each of S seeds on its CUDA device, float32 [S, N, 2], by the parameters of `TSNE`.

    The objective is that of the exact engine, but cuML's perplexity search counts the point itself, so its P is
    slightly narrower than ours.
    """
    import cupy

    neighbors = knn(X, int(3 * settings["perplexity"]))
    itself = torch.arange(len(X), device=X.device)[:, None]
    indices = torch.cat([itself, neighbors.indices], dim=1)
    distances = torch.cat([torch.zeros_like(itself), neighbors.squared_distances.sqrt()], dim=1).to(torch.float32)
    columns = X.to(torch.float32).T.contiguous().T  # cuML reads column-major arrays without a copy
    maps = []
    for seed in seeds:
        # a copy, because cuML squares the distances in place
        model = cuml_model(settings, seed, rate, (cupy.from_dlpack(indices), cupy.from_dlpack(distances.clone())))
        torch.cuda.empty_cache()  # cuML allocates beside torch, and could not use what torch keeps for later
        with torch.cuda.device(X.device):
            torch.cuda.synchronize()  # cuML runs on a stream of its own: it waits for torch's, and then torch for it
            found = torch.from_dlpack(model.fit_transform(cupy.from_dlpack(columns)))
            torch.cuda.synchronize()
            maps.append(found.contiguous())
    return torch.stack(maps)


def cuml_model(settings: Mapping[str, Any], seed: int, rate: float, neighbors: tuple[Any, Any] | None) -> Any:
    """cuML's estimator with our settings; `neighbors` are indices and distances [N, k + 1], each point itself first.

    cuML's update lacks the gradient's factor 4, hence 4 * rate; it doubles the rate after early exaggeration.
    """
    from cuml.manifold import TSNE as CumlTSNE

    return CumlTSNE(
        n_components=2,
        perplexity=settings["perplexity"],
        early_exaggeration=settings["early_exaggeration"],
        exaggeration_iter=settings["exaggeration_iterations"],
        learning_rate=4 * rate,
        learning_rate_method="none",  # "adaptive" would overwrite n_neighbors
        max_iter=settings["iterations"],
        n_iter_without_progress=settings["iterations"],
        min_grad_norm=0.0,
        pre_momentum=MOMENTUM[0],
        post_momentum=MOMENTUM[1],
        n_neighbors=int(3 * settings["perplexity"]) + 1,
        method="fft",
        init=settings["init"],
        random_state=seed,
        precomputed_knn=neighbors,
        output_type="cupy",
    )
