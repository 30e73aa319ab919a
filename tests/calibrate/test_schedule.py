"""Shortest paths against brute force; interval masks; neighbours."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffaccel.calibrate.schedule import every, intervals, letters, neighbours, shortest, shortest_few
from diffaccel.denoiser.cache import Cache
from diffaccel.errors import OptionError


def brute(cost, budget, window):
    """Every mask with its cost, cheapest first."""
    n, found = len(cost), []
    for rest in combinations(range(1, n), budget - 1):
        full = (0, *rest)
        if max(np.diff([*full, n])) > window:
            continue
        total = 0.0
        for k, l in enumerate(full):
            end = full[k + 1] if k + 1 < len(full) else n
            total += cost[full[k - 1] if k else 0, l, l + 1 : end].sum()
        found.append((total, tuple(int(i in full) for i in range(n))))
    return sorted(found)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 12), m=st.integers(1, 5), window=st.integers(2, 12), seed=st.integers(0, 10**6))
def test_the_path_is_the_cheapest_mask(n, m, window, seed):
    cost = np.random.default_rng(seed).gamma(0.5, size=(n, n, n))
    expected = brute(cost, m, window) if m <= n else []
    if not expected:
        with pytest.raises(OptionError):
            shortest(cost, m, window)
        return
    found = shortest_few(cost, m, window, 4)
    assert [s.cost for s in found] == pytest.approx([c for c, _ in expected[:4]], abs=1e-9)
    assert [s.mask for s in found] == [mask for _, mask in expected[:4]]


def test_what_was_not_measured_is_not_used():
    cost = np.full((4, 4, 4), np.inf)
    cost[0, 0, 1] = cost[0, 2, 3] = 1.0
    assert shortest(cost, 2).mask == (1, 0, 1, 0)
    with pytest.raises(OptionError, match="measured"):
        shortest(cost, 1)


def test_the_interval_masks_are_the_policy_s_and_complete():
    steps, budget = 12, 5
    found = intervals(steps, budget)
    assert all(sum(mask) == budget for mask in found)
    for mask, (n, warmup, tail) in found.items():
        assert mask == tuple(map(int, Cache.every(n, warmup, tail, forecast=0).full_steps(steps)))
    others = {every(steps, n, w, t) for n in range(1, 15) for w in range(1, 9) for t in range(9)}
    assert {mask for mask in others if sum(mask) == budget} == set(found)


def test_neighbours_move_one_full_step():
    mask = (1, 0, 1, 1, 0)
    found = set(neighbours(mask))
    assert found == {(1, 1, 0, 1, 0), (1, 0, 1, 0, 1)}
    assert letters(mask) == "F.FF."
