"""t-SNE alone: several seeds side by side, on a GPU where the points are; and the neighborhood hit of the maps.

python docs/examples/tsne_alone.py
"""

import numpy as np
from sklearn.datasets import load_digits

import qdv_gpu

digits = load_digits(n_class=6)
X = digits.data[:600].astype(np.float32)  # [600, 64]; a torch tensor or a CuPy array gives one back
Z = qdv_gpu.TSNE(perplexity=30, iterations=500).fit_transform(X, seeds=3)  # [3, 600, 2]
for seed, map_ in enumerate(Z):
    print(f"seed {seed}: NH {qdv_gpu.neighborhood_hit(map_, digits.target[:600], k=5):.3f}")

again = qdv_gpu.TSNE(perplexity=30, iterations=500).fit_transform(X, seeds=1)
print("the same seed gives the same bits, alone or in a batch:", np.array_equal(again[0], Z[0]))
figure, _ = qdv_gpu.plot_maps(list(Z[:2]), digits.target[:600], [str(n) for n in range(6)], titles=["seed 0", "seed 1"])
figure.savefig("tsne_alone.png")
