"""The CUDA packages in one process: they import, build our t-SNE, and search on the CPU."""

import cuml
import cupy
import faiss
import numpy as np
import torch
import torchvision

from qdv_gpu.neighbors import knn
from qdv_gpu.tsne.engines.cuml import cuml_model
from qdv_gpu.tsne.estimator import TSNE

for package in (torch, torchvision, cupy, cuml, faiss):
    print(package.__name__, package.__version__)

model = cuml_model(TSNE(perplexity=40).get_params(), seed=0, rate=200.0, neighbors=None)
assert model.n_neighbors == 121
assert model.learning_rate == 800.0
print(model)

X = torch.from_numpy(np.random.default_rng(0).normal(size=(2000, 50)).astype(np.float32))
assert torch.equal(knn(X, 120, engine="faiss").indices, knn(X, 120, engine="direct").indices)
print("faiss agrees with all distances")
