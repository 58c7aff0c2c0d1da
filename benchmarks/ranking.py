"""How honest a ranking of many candidates is: against fresh samples of images, all tied and with a true order.

    python -m benchmarks.ranking [--repeats 150] --json FILE

V candidates see the same N images; each is a cloud in the plane, which has a part of the images' noise in common. Five
seeds add noise of their own, or three training runs of one map each change how far the classes are apart. "tied": all
are equal. "best": one is ahead by about 0.03 of NH. "graded": all differ. "unequal runs": all
tied, but half the candidates' runs vary three times as much as the others', which the pooled variance does not know.

"relation": twenty candidates at three layers, all tied, so that NH has nothing to do with the accuracy of each, which
is that of the nearest centre in its last layer: how often is a relation found all the same?
"""

import argparse
import json
import platform
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from qdv_gpu.neighbors import knn
from qdv_gpu.scores.comparison import Side
from qdv_gpu.scores.ranking import Estimates, estimates, gains, ranks
from qdv_gpu.scores.relation import halves, relation
from qdv_gpu.scores.statistics import error_neighbors, hits, influence_values, spread_values

CLASSES, K, APART = 10, 5, 2.5
SEEDS, RUNS = 5, 3
GAP = 0.17  # between centres, about 0.03 of NH


@dataclass(frozen=True)
class Scenario:
    """How far the classes of each candidate are apart, and by how much that varies with the run (0: seeds only)."""

    gaps: tuple[float, ...]
    spread: tuple[float, ...]

    @property
    def V(self) -> int:
        return len(self.gaps)


def scenarios() -> dict[str, Scenario]:
    found = {}
    for V in (5, 20):
        tied, best = (0.0,) * V, (0.0,) * (V - 1) + (GAP,)
        graded = tuple(GAP * i for i in range(V)) if V == 5 else tuple(GAP * (i // 2) + 0.02 * i for i in range(V))
        still, runs = (0.0,) * V, (0.07,) * V
        found |= {
            f"tied {V}": Scenario(tied, still),
            f"best {V}": Scenario(best, still),
            f"graded {V}": Scenario(graded, still),
            f"tied runs {V}": Scenario(tied, runs),
            f"best runs {V}": Scenario(best, runs),
            f"tied unequal runs {V}": Scenario(tied, (0.04,) * (V // 2) + (0.12,) * (V - V // 2)),
        }
    return found


def centres() -> np.ndarray:
    angle = 2 * np.pi * np.arange(CLASSES) / CLASSES
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def side(maps: list[np.ndarray], labels: torch.Tensor) -> Side:
    near = [knn(torch.from_numpy(Z), error_neighbors(K, len(labels))).indices for Z in maps]
    spread = torch.stack([spread_values(one, labels, k=K) for one in near])
    return Side(spread, tuple(float(hits(one[:, :K], labels).mean()) for one in near))


def candidates(random: np.random.Generator, N: int, scenario: Scenario) -> list[list[Side]]:
    """The runs of each candidate on one fresh sample of images."""
    labels = torch.arange(N) % CLASSES
    middle, shared = centres()[labels], random.normal(size=(N, 2))
    found = []
    for gap, spread in zip(scenario.gaps, scenario.spread, strict=True):
        own = np.sqrt(0.5) * shared + np.sqrt(0.5) * random.normal(size=(N, 2))
        apart = [APART + gap + spread * random.normal() for _ in range(RUNS if spread else 1)]
        count = 1 if spread else SEEDS
        found.append(
            [
                side([a * middle + own + 0.3 * random.normal(size=own.shape) for _ in range(count)], labels)
                for a in apart
            ]
        )
    return found


def one_sample(task: tuple[int, int, str]) -> dict[str, Any]:
    """The ranking of one fresh sample."""
    seed, N, name = task
    torch.set_num_threads(1)
    found = estimates(candidates(np.random.default_rng(seed), N, scenarios()[name]), torch.arange(N) % CLASSES)
    order, against = ranks(found), gains(found, 0)
    winner = int(np.argmax(found.nh))
    return {
        "nh": found.nh.tolist(),
        "best": order.can_be_best.tolist(),
        "ranks": order.ranks.tolist(),
        "verdicts": list(against.verdicts),
        "low": against.low.tolist(),
        "high": against.high.tolist(),
        "optimism": order.optimism,
        "within 1.645 of the winner": _near(found, winner),
    }


def _near(found: Estimates, winner: int) -> list[bool]:
    """The common rule, for comparison: those within 1.645 standard errors of the winner."""
    sigma = found.sigma
    error = np.sqrt(np.maximum(np.diag(sigma) + sigma[winner, winner] - 2 * sigma[winner], 0))
    return (found.nh[winner] - found.nh <= 1.645 * error).tolist()


def one_relation(task: tuple[int, int]) -> dict[str, Any]:
    """p-values of NH against accuracy on one fresh sample, where there is nothing to find."""
    seed, N = task
    torch.set_num_threads(1)
    random, V, L = np.random.default_rng(seed), 20, 3
    labels = torch.arange(N) % CLASSES
    middle, shared = centres()[labels], random.normal(size=(L, N, 2))
    phi, right = np.empty((L, V, N)), np.empty((V, N))
    for v in range(V):
        own = random.normal(size=(N, 2))
        for layer in range(L):
            noise = np.sqrt(0.5) * shared[layer] + np.sqrt(0.4) * own + np.sqrt(0.1) * random.normal(size=(N, 2))
            X = (1.7 + 0.4 * layer) * middle + noise
            phi[layer, v] = influence_values(knn(torch.from_numpy(X), K).indices, labels).numpy()
        distances = ((X[:, None] - (1.7 + 0.4 * (L - 1)) * centres()) ** 2).sum(axis=2)
        right[v] = distances.argmin(axis=1) == labels.numpy()
    first = halves(labels)
    apart = relation(phi[:, :, first].mean(axis=2), right[:, ~first].mean(axis=1))
    same = relation(phi.mean(axis=2), right.mean(axis=1))
    single = [float(relation(row[:, first].mean(axis=1), right[:, ~first].mean(axis=1)).p[0]) for row in phi]
    return {"halves": apart.p.tolist(), "same images": same.p.tolist(), "halves, layer by layer": single}


def summarised(rows: list[dict[str, Any]], scenario: Scenario) -> dict[str, Any]:
    """How often what was said of the samples is true."""
    V, gaps = scenario.V, np.array(scenario.gaps)
    nh, best, spans = (np.array([row[name] for row in rows]) for name in ("nh", "best", "ranks"))
    tied = not gaps.any()
    theta = np.full(V, nh.mean()) if tied else np.array([nh[:, gaps == gap].mean() for gap in gaps])
    true_best = np.flatnonzero(gaps == gaps.max())
    true_ranks = 1 + np.argsort(np.argsort(-gaps, kind="stable"))  # as if the first of equal ones were a hair ahead
    near = np.array([row["within 1.645 of the winner"] for row in rows])
    low, high = (np.array([row[name] for row in rows]) for name in ("low", "high"))
    true = theta - theta[0]
    claims = np.array([[v in ("ahead", "behind") for v in row["verdicts"]] for row in rows])
    null = gaps == gaps[0]
    winners = nh.argmax(axis=1)
    optimism = nh.max(axis=1) - theta[winners]
    return {
        "a true best is held": float(best[:, true_best].any(axis=1).mean()),
        "each true best is held, the least": float(best[:, true_best].mean(axis=0).min()),
        "all true bests are held": float(best[:, true_best].all(axis=1).mean()),
        "held by the rule of 1.645 standard errors, the least": float(near[:, true_best].mean(axis=0).min()),
        "all held by that rule": float(near[:, true_best].all(axis=1).mean()),
        "can be best, mean count": float(best.sum(axis=1).mean()),
        "rank sets hold all true ranks": float(
            ((spans[:, :, 0] <= true_ranks) & (true_ranks <= spans[:, :, 1])).all(axis=1).mean()
        ),
        "false claims against the baseline": float(claims[:, null].any(axis=1).mean()) if null.sum() > 1 else None,
        "intervals against the baseline hold": float(((low <= true + 1e-12) & (true <= high + 1e-12)).all(1).mean()),
        "power against the baseline, of the best": None if tied else float(claims[:, true_best].mean()),
        "the winner's NH is too high by": float(optimism.mean()),
        "and is said to be by": float(np.mean([row["optimism"] for row in rows])),
        "NH of the best less the others', least": None if tied else float(theta.max() - np.sort(theta)[-2]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=150)
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for name, scenario in scenarios().items():
            tasks = [(seed, options.images, name) for seed in range(options.repeats)]
            found[name] = summarised(list(pool.map(one_sample, tasks, chunksize=5)), scenario)
            print(name, json.dumps(found[name], indent=1), flush=True)
        rows = list(pool.map(one_relation, [(seed, options.images) for seed in range(options.repeats)], chunksize=5))
    alarms = {how: float(np.mean([min(row[how]) <= 0.05 for row in rows])) for how in rows[0]}
    found["relation"] = {f"false alarms, {how}": share for how, share in alarms.items()}
    print("relation", json.dumps(found["relation"], indent=1), flush=True)
    about = {"images": options.images, "repeats": options.repeats, "classes": CLASSES, "seeds": SEEDS, "runs": RUNS,
             "machine": platform.machine()}  # fmt: skip
    with open(options.json, "w") as file:
        json.dump({**about, **found}, file, indent=1)


if __name__ == "__main__":
    main()
