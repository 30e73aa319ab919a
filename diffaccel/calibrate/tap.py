"""Which recorded states to take ranges from: stratified over time, or TAP's clusters (Q&C, arXiv:2503.02508).

Only static ranges need such a choice; what `denoiser.quant` offers has ranges for each token, at run time. Measured
(`benchmarks/bench_quant_ranges.py`): static ranges double the error of int8 and gain next to no time, and TAP is no
better than strata over time. It is here for parity with the paper, and for quantisers of others.
"""

from __future__ import annotations

import warnings

import numpy as np
from scipy.cluster.vq import kmeans2

from ..errors import OptionError

REPEATS = 3  # draws of TAP that are united
SHARE = 20  # each sees 1/20 of the pool
CLUSTERS = 100
PER_CLUSTER = (3, 10)


def stratified(steps: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """`count` of the states, as many of each step as can be.

    Args:
        steps: (n,) step index of each state.

    Returns:
        sorted indices.

    Raises:
        OptionError: for more than there are.
    """
    _enough(len(steps), count)
    rng = np.random.default_rng(seed)
    # the k-th of a (shuffled) step comes before the (k+1)-th of any other
    order = rng.permutation(len(steps))
    rank = np.empty(len(steps), dtype=np.int64)
    for step in np.unique(steps):
        mine = order[steps[order] == step]
        rank[mine] = np.arange(len(mine))
    taken = np.lexsort((rng.random(len(steps)), rank))[:count]
    return np.sort(taken)


def affinity(x: np.ndarray, steps: np.ndarray, alpha: float = 0.5, tau: float = 1.0) -> np.ndarray:
    """`alpha max(0, cos(x_k, x_h)) + (1 - alpha) exp(-|i_k - i_h|/tau)`, (n, n).

    The paper's time affinity in units of t in 0..999 would be the identity; i is the step index.

    Args:
        x: (n, d). steps: (n,).
    """
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    near = np.exp(-np.abs(np.subtract.outer(steps, steps)) / tau)
    total: np.ndarray = alpha * np.maximum(unit @ unit.T, 0) + (1 - alpha) * near
    return total


def laplacian(a: np.ndarray) -> np.ndarray:
    """`D^-1/2 A D^-1/2` with the degrees D, (n, n)."""
    scale = 1 / np.sqrt(a.sum(1))
    made: np.ndarray = scale[:, None] * a * scale[None]
    return made


def tap(
    x: np.ndarray, steps: np.ndarray, count: int = 800, *, seed: int = 0, alpha: float = 0.5, tau: float = 1.0
) -> np.ndarray:
    """TAP's choice among the states of a pool, recorded while the cache is on.

    Three draws of a twentieth of the pool are clustered spectrally (100 clusters), 3 to 10 of each cluster are taken.

    Args:
        x: (n, d) states. steps: (n,) step index of each.
        count: at most.

    Returns:
        sorted indices, `count` or fewer.

    Raises:
        OptionError: a pool of fewer than `count`.
    """
    _enough(len(x), count)
    rng = np.random.default_rng(seed)
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    chosen: set[int] = set()
    for _ in range(REPEATS):
        drawn = rng.choice(len(flat), size=max(len(flat) // SHARE, 1), replace=False)
        clusters = min(CLUSTERS, len(drawn))
        _, vectors = np.linalg.eigh(laplacian(affinity(flat[drawn], steps[drawn], alpha, tau)))
        rows = vectors[:, -clusters:]
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "One of the clusters is empty")
            labels = kmeans2(rows, clusters, minit="++", seed=rng)[1]
        for label in np.unique(labels):
            members = drawn[labels == label]
            take = min(len(members), int(rng.integers(PER_CLUSTER[0], PER_CLUSTER[1] + 1)))
            chosen.update(rng.choice(members, size=take, replace=False).tolist())
    found = np.array(sorted(chosen))
    return found if len(found) <= count else np.sort(rng.choice(found, size=count, replace=False))


def _enough(have: int, count: int) -> None:
    if not 1 <= count <= have:
        raise OptionError(f"{count} states are to be chosen from a pool of {have}")
