"""Choices of calibration states: strata over time, TAP's clusters."""

from __future__ import annotations

import numpy as np
import pytest

from diffaccel.calibrate.tap import affinity, laplacian, stratified, tap
from diffaccel.errors import OptionError


def pool(n=4000, d=8, steps=20, seed=0):
    rng = np.random.default_rng(seed)
    at = rng.integers(0, steps, n)
    directions = rng.normal(size=(4, d))
    return directions[rng.integers(0, 4, n)] * (1 + at[:, None]) + rng.normal(size=(n, d)), at


def test_strata_hold_as_many_of_each_step():
    _, steps = pool()
    chosen = stratified(steps, 203, seed=1)
    counts = np.bincount(steps[chosen], minlength=20)
    assert len(np.unique(chosen)) == 203 and set(counts) == {10, 11}
    np.testing.assert_array_equal(chosen, stratified(steps, 203, seed=1))
    rare = np.array([0] * 100 + [1])
    assert 100 in stratified(rare, 2)  # a step with one state is not drowned


def test_tap_takes_some_of_every_cluster_and_is_repeatable():
    x, steps = pool()
    chosen = tap(x, steps, 800, seed=3)
    np.testing.assert_array_equal(chosen, tap(x, steps, 800, seed=3))
    assert len(np.unique(chosen)) == len(chosen) <= 800
    assert set(steps[chosen]) == set(range(20))
    assert len(tap(x, steps, 50)) == 50


def test_the_affinity_knows_direction_and_time():
    x = np.array([[1.0, 0], [2, 0], [-1, 0], [0, 1]])
    a = affinity(x, np.array([0, 0, 0, 1]))
    assert a[0, 1] == pytest.approx(1) and a[0, 2] == pytest.approx(0.5)  # opposite: the cosine counts as 0
    assert a[0, 3] == pytest.approx(0.5 * np.exp(-1))
    assert np.linalg.eigvalsh(laplacian(a)).max() == pytest.approx(1)


def test_a_pool_that_is_too_small():
    with pytest.raises(OptionError, match="pool of 5"):
        tap(np.ones((5, 2)), np.zeros(5), 6)
    with pytest.raises(OptionError, match="pool of 5"):
        stratified(np.zeros(5), 0)
