"""The KL divergence is what its definition says, on both devices, and the GPU's kernel has no races."""

import numpy as np
import pytest
import torch
import tsne_reference as reference
from device.launches import devices, run
from sklearn.datasets import load_digits
from sklearn.manifold import TSNE as ScikitTSNE

from qdv_gpu.tsne import objective
from qdv_gpu.tsne.affinities import joint_affinities
from qdv_gpu.tsne.objective import SIMILARITIES, kl_divergence, log_normaliser

DIGITS = load_digits().data.astype(np.float32)
similarities = pytest.mark.parametrize("similarity", SIMILARITIES)
kinds = pytest.mark.parametrize("kind", ["knn", "full"])


def affinities(n, kind):
    X = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    return joint_affinities(X, perplexity=min(30, (n - 1) / 3), kind=kind)


@similarities
@kinds
def test_kl_divergence_agrees_with_the_definition(similarity, kind, monkeypatch):
    monkeypatch.setattr(objective, "CPU_PAIRS", 1000)  # several chunks
    for Z in (reference.cloud(130), reference.far_apart(130)):
        P = affinities(130, kind)
        truth = float(reference.kl(reference.matrix(P), Z.double(), gaussian=similarity == "gaussian"))
        assert kl_divergence(P, Z, similarity=similarity) == pytest.approx(truth, rel=1e-10)


@similarities
@kinds
def test_kl_divergence_on_a_gpu(similarity, kind, monkeypatch, cuda):
    P, Z = affinities(130, kind), reference.cloud(130)
    expected = kl_divergence(P, Z, similarity=similarity)
    there = P.to(cuda) if isinstance(P, torch.Tensor) else type(P)(*(part.to(cuda) for part in P))
    for block in (objective.CUDA_PAIRS, 1000):  # many chunks
        monkeypatch.setattr(objective, "CUDA_PAIRS", block)
        assert kl_divergence(there, Z.to(cuda), similarity=similarity) == pytest.approx(expected, rel=1e-12)


def test_kl_divergence_is_that_of_scikit_learn():
    model = ScikitTSNE(method="exact", perplexity=20, init="random", random_state=0, max_iter=300).fit(DIGITS[:150])
    P = joint_affinities(torch.from_numpy(DIGITS[:150]), perplexity=20, kind="full")
    assert kl_divergence(P, torch.from_numpy(model.embedding_)) == pytest.approx(model.kl_divergence_, rel=0.01)


MAPS = {
    "2": reference.cloud(2),
    "33": reference.cloud(33),
    "duplicates": reference.cloud(40).repeat_interleave(3, 0),
    "far": reference.far_apart(130),
    "one place": torch.zeros(20, 2),
}


@devices
@similarities
@pytest.mark.parametrize("name", MAPS)
def test_the_kernel_adds_up_what_the_loops_do(name, similarity, device):
    x, y = MAPS[name].double().T.contiguous()
    gaussian, n = similarity == "gaussian", len(x)
    there = [part.to("cuda" if device == "cuda" else "cpu") for part in (x, y, torch.full_like(x, torch.nan))]
    how = {"grid": (-(-n // 32),), "block": 128, "seed": 1, "GAUSSIAN": int(gaussian)}
    run(device, "objective", "similarities", *there, np.int32(n), **how)
    sums = there[2].cpu()
    found = sums.logsumexp(0) if gaussian else sums.sum().log()
    assert float(found) == pytest.approx(float(log_normaliser(x, y, gaussian=gaussian)), rel=1e-13)
