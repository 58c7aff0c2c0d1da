"""What each stage asks of a device: launches, waits of the host, and bytes that come back, for a small case.

Waits, bytes and our own kernels are exact. Of the operators, which other versions of torch make of other parts, there
may be fewer. A stage that asks for more than its line is slower on a GPU, and nothing else here would say so.
"""

from collections import namedtuple
from functools import partial

import pytest
import torch

from qdv_gpu import Deconvnet, activations, load_images, load_network
from qdv_gpu.features.pca import principal_components
from qdv_gpu.neighbors import knn
from qdv_gpu.scores.quality import score_maps
from qdv_gpu.tsne.affinities import joint_affinities
from qdv_gpu.tsne.engines.cuda import descend_cuda
from qdv_gpu.tsne.objective import kl_divergence
from qdv_gpu.tsne.problem import Phase, Problem, stacked

SPEC = "tiny_networks:cnn"
N, SEEDS = 60, 3

Budget = namedtuple("Budget", "launches kernels syncs to_host", defaults=(0, 0, 0, 0))


def points(d=6):
    return torch.randn(N, d, generator=torch.Generator().manual_seed(0)).cuda()


def descent(affinities):
    P = joint_affinities(points(), perplexity=8, kind=affinities)
    problem = Problem(stacked([P], copies=SEEDS), Phase(56, 4.0, 0.5), learning_rate=1.0, gaussian=False)
    return partial(descend_cuda, problem, torch.randn(SEEDS, N, 2).cuda(), lambda done: None)


def divergence(affinities):
    return partial(kl_divergence, joint_affinities(points(), perplexity=8, kind=affinities), points(2))


def scores():
    X, Z = points(), torch.stack([points(2)] * SEEDS)
    return partial(score_maps, X, Z, torch.arange(N) % 3, k=(5, 3))


def network():
    return load_network(SPEC, weights="none", device="cuda")


def forward():
    net, images = network(), load_images("digits", samples=40).to("cuda")
    return lambda: activations(net, images, layers=["conv2"], batch_size=20)


def pictures(mode):
    net, image = Deconvnet(network()), load_images("digits", samples=10).pixels[3]
    return lambda: net.reconstruct(image, "pool@2", mode=mode)


def best():
    net, images = Deconvnet(network()), load_images("digits", samples=40).to("cuda")
    return lambda: net.top_activations(images, "pool@2", k=9)


STAGES = {
    "neighbours": (lambda: partial(knn, points(), 5), Budget()),
    "affinities, knn": (lambda: partial(joint_affinities, points(), perplexity=8, kind="knn"), Budget()),
    "affinities, full": (lambda: partial(joint_affinities, points(), perplexity=8, kind="full"), Budget()),
    "descent, knn": (partial(descent, "knn"), Budget()),
    "descent, full": (partial(descent, "full"), Budget()),
    "divergence, knn": (partial(divergence, "knn"), Budget()),
    "divergence, full": (partial(divergence, "full"), Budget()),
    "components": (lambda: partial(principal_components, points(30).split(20), 5), Budget()),
    "scores": (scores, Budget()),
    "activations": (forward, Budget()),
    "deconvnet": (partial(pictures, "deconvnet"), Budget()),
    "guided": (partial(pictures, "guided"), Budget()),
    "top activations": (best, Budget()),
}


@pytest.mark.parametrize("stage", STAGES)
def test_stage(gpu, stage):
    make, budget = STAGES[stage]
    work = make()
    work()  # compiles, and fills what is kept
    gpu.counts.clear()
    work()
    counts = gpu.counts
    found = Budget(*(sum(one.values()) for one in (counts.launches, counts.kernels, counts.syncs, counts.to_host)))
    assert found._replace(launches=0) == budget._replace(launches=0), counts.syncs.most_common()
    assert found.launches <= budget.launches
    assert not counts.tf32
    assert not counts.unordered
    assert not counts.pageable
