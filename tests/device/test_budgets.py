"""What each stage asks of a device: launches, waits of the host, and bytes that come back, for a small case.

Waits, bytes and our own kernels are exact. Of the operators, which other versions of torch make of other parts, there
may be fewer. A stage that asks for more than its line is slower on a GPU, and nothing else here would say so.
"""

from collections import namedtuple
from functools import partial

import pytest
import torch

from qdv_gpu import Deconvnet, Images, Settings, activations, analyze, finetune, load_images, load_network
from qdv_gpu.data.images import AHEAD
from qdv_gpu.features.pca import principal_components
from qdv_gpu.machine import product_precision
from qdv_gpu.neighbors import knn
from qdv_gpu.scores.quality import score_maps
from qdv_gpu.tsne.affinities import _symmetrised_by_sorting, joint_affinities
from qdv_gpu.tsne.engines.cuda import descend_cuda
from qdv_gpu.tsne.engines.fft_cuda import descend_fft_cuda
from qdv_gpu.tsne.objective import kl_divergence
from qdv_gpu.tsne.problem import Motion, Phase, Problem, Repulsion, stacked

SPEC = "tiny_networks:cnn"
N, SEEDS = 60, 3

Budget = namedtuple("Budget", "launches kernels syncs to_host", defaults=(0, 0, 0, 0))


def points(d=6):
    return torch.randn(N, d, generator=torch.Generator().manual_seed(0)).cuda()


def descent(affinities):
    P = joint_affinities(points(), perplexity=8, kind=affinities)
    problem = Problem(stacked([P], copies=SEEDS), Phase(50, 4.0, 0.5), learning_rate=1.0, gaussian=False)
    return partial(descend_cuda, problem, Motion.at_rest(torch.randn(SEEDS, N, 2).cuda()), lambda done: None)


def descent_on_grids():
    """25 iterations and one: of small steps, so that no map leaves its grid."""
    P = joint_affinities(points(), perplexity=8, kind="knn")
    problem = Problem(stacked([P], copies=2), Phase(26, 1.0, 0.5), learning_rate=1e-3, gaussian=False)
    start = 0.5 * torch.randn(2, N, 2, generator=torch.Generator().manual_seed(0)).cuda()
    return lambda: descend_fft_cuda(problem, Motion.at_rest(start), lambda done: None, Repulsion("fft"))


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
    "neighbours": (lambda: partial(knn, points(), 5), Budget(75, 1, 6, 0)),
    "neighbours, nearly all": (lambda: partial(knn, points(), 5, engine="inverted"), Budget(276, 2, 18, 0)),
    "affinities, knn": (lambda: partial(joint_affinities, points(), perplexity=8, kind="knn"), Budget(527, 1, 17, 0)),
    "affinities, full": (lambda: partial(joint_affinities, points(), perplexity=8, kind="full"), Budget(491, 1, 13, 0)),
    "descent, knn": (partial(descent, "knn"), Budget(8, 150, 1, 0)),
    "descent, full": (partial(descent, "full"), Budget(8, 150, 1, 0)),
    "descent on grids": (descent_on_grids, Budget(410, 26 * (5 + 2 * 2), 15, 4096)),
    "divergence, knn": (partial(divergence, "knn"), Budget(34, 1, 2, 8)),
    "divergence, full": (partial(divergence, "full"), Budget(30, 1, 1, 0)),
    "components": (lambda: partial(principal_components, points(30).split(20), 5), Budget(269, 0, 21, 0)),
    "scores": (scores, Budget(390, 12, 42, 37440)),
    "activations": (forward, Budget(68, 0, 1, 8)),
    "deconvnet": (partial(pictures, "deconvnet"), Budget(95, 4, 4, 0)),
    "guided": (partial(pictures, "guided"), Budget(71, 4, 4, 0)),
    "top activations": (best, Budget(561, 14, 30, 28016)),
}


@pytest.mark.parametrize("stage", STAGES)
def test_stage(gpu, stage):
    make, budget = STAGES[stage]
    work = make()
    work()  # compiles, and fills what is kept
    gpu.counts.clear()
    with product_precision("tf32"):  # which a user may have set, and no stage takes over
        work()
    counts = gpu.counts
    found = Budget(*(sum(one.values()) for one in (counts.launches, counts.kernels, counts.syncs, counts.to_host)))
    said = f"{stage}: {found} where {budget} is allowed; what the work cannot do without, write into STAGES."
    assert found._replace(launches=0) == budget._replace(launches=0), f"{said} Waits: {counts.syncs.most_common()}"
    assert found.launches <= budget.launches, said
    assert not counts.tf32
    assert not counts.unordered
    assert not counts.pageable


def test_affinities_are_symmetrised_beside_little_else(gpu):
    """Bytes for each neighbour: two keys, what sorting makes of them, and the numbers of their places."""
    k = 30
    indices = torch.stack([torch.arange(1, k + 1).add(i) % 400 for i in range(400)]).int().cuda()
    shares = torch.rand(400, k).cuda()
    pool = gpu.memory[0]
    before = pool.peak = pool.allocated
    _symmetrised_by_sorting(indices, shares)
    assert pool.peak - before <= 400 * k * 2 * (8 + 8 + 8) * 1.1


def test_images_of_the_host_go_up_page_locked(gpu):
    """So that the copies run beside the network; the host waits only for those that are too many to be page-locked."""
    images = Images.from_arrays(torch.zeros(10, 1, 300, 300, dtype=torch.uint8))
    sent = list(images.batches(torch.arange(10).split(1), "cuda"))
    assert sum(gpu.counts.from_host.values()) == 10 * 300 * 300
    assert not gpu.counts.pageable
    assert sum(gpu.counts.syncs.values()) == 10 - AHEAD
    assert all(batch.is_cuda for batch in sent)


def test_a_step_of_training_waits_for_nothing(gpu, tmp_path):
    """All that depends on the number of batches are their uploads, page-locked, and launches."""
    found = []
    for samples in (40, 80):
        gpu.counts.clear()
        options = {"epochs": 1, "batch_size": 10, "device": "cuda"}
        finetune(SPEC, "digits", tmp_path / str(samples), samples=samples, **options)
        found.append(sum(n for where, n in gpu.counts.syncs.items() if "finetune" in where or "images" in where))
        assert not gpu.counts.pageable
        assert not gpu.counts.tf32
    assert found[0] == found[1], gpu.counts.syncs.most_common()


def test_analysis(gpu, tmp_path):
    """Between the images and the tables nothing larger than a layer's components or neighbours comes back."""
    settings = Settings(layers=("pool",), samples=80, pca=10, perplexity=8, iterations=30, seeds=2, k=(3,))
    analyze(SPEC, "digits", tmp_path / "run", settings=settings, device="cuda")
    components, neighbours = 80 * 10 * 4, 80 * 64 * 4
    assert gpu.counts.largest_copy <= max(components, neighbours)
    assert not [where for where in gpu.counts.to_host if "images.py" in where]
    assert not gpu.counts.tf32
    assert not gpu.counts.unordered
    assert not gpu.counts.pageable
    assert gpu.counts.replays
    assert len(gpu.faiss_resources) == 1
    assert gpu.memory[0].allocated == 0, "something of the analysis stays on the device"
