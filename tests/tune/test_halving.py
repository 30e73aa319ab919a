"""Successive halving on recorded errors: what it spends, and what it finds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffaccel.errors import OptionError
from diffaccel.tune.halving import Rung, evaluations, halve, rungs, score


class Recorded:
    """Errors (C, S) that are handed out, and counted."""

    def __init__(self, errors):
        self.errors, self.runs, self.asked = errors, 0, []

    def __call__(self, c, first, stop):
        self.runs += stop - first
        self.asked.append((c, first, stop))
        return self.errors[c, first:stop]


def noisy(candidates, images, spread, seed):
    """Errors of candidates of falling quality; every image shares its difficulty, as paired seeds do."""
    rng = np.random.default_rng(seed)
    quality = np.linspace(0, 2, candidates)[:, None]
    return np.exp(quality + rng.normal(0, 2, (1, images)) + rng.normal(0, spread, (candidates, images)))


@given(st.integers(1, 300), st.integers(1, 80))
@settings(max_examples=80, deadline=None)
def test_a_plan_shrinks_ends_on_all_images_and_costs_what_it_says(candidates, images):
    plan = rungs(candidates, images)
    assert plan[0].candidates == candidates and plan[-1].images == images
    assert all(a.candidates >= b.candidates and a.images < b.images for a, b in pairwise(plan))
    record = Recorded(noisy(candidates, images, 0.3, 0))
    found = halve(candidates, images, record)
    assert record.runs == evaluations(plan)
    assert len(found.errors[found.winner]) == images
    assert set(found.ranked) | set(found.eliminated) == set(range(candidates))


@pytest.mark.parametrize("candidates", [100, 150, 250, 400])
@pytest.mark.parametrize("images", [32, 48, 64, 100])
def test_it_spends_at_most_15_per_cent_of_an_exhaustive_search(candidates, images):
    assert evaluations(rungs(candidates, images)) <= 0.15 * candidates * images


def test_without_noise_the_best_wins_wherever_it_stands():
    base = noisy(60, 48, 0.0, 1)
    for place in (0, 17, 59):
        errors = np.roll(base, place, axis=0)
        assert halve(60, 48, Recorded(errors)).winner == place


def test_with_noise_the_winner_is_near_the_best():
    """Difficulty differs between images by a factor of e^2 and more; pairing takes it out."""
    excess = []
    for seed in range(20):
        errors = noisy(200, 48, 0.3, seed)
        found = halve(200, 48, Recorded(errors))
        excess.append(score(errors[found.winner]) / min(score(e) for e in errors))
    assert np.mean(np.array(excess) <= 1.05) >= 0.9


def test_images_are_paired_and_none_is_run_twice():
    record = Recorded(noisy(30, 32, 0.3, 2))
    found = halve(30, 32, record)
    for c in range(30):
        parts = sorted((a, b) for k, a, b in record.asked if k == c)
        assert parts[0][0] == 0 and all(x[1] == y[0] for x, y in pairwise(parts))
        np.testing.assert_array_equal(found.errors[c], record.errors[c, : parts[-1][1]])


def test_what_diverges_loses_and_of_equals_the_first_wins():
    errors = np.ones((9, 16))
    errors[0], errors[1, 0] = np.inf, np.nan
    assert halve(9, 16, Recorded(errors)).winner == 2
    assert score(np.array([np.inf, 1.0])) > 1e10 and score(np.zeros(2)) == pytest.approx(1e-30)


def test_one_image_that_ends_elsewhere_does_not_decide():
    typical, lucky = np.full(24, 0.1), np.full(24, 0.15)
    typical[3] = 1.0
    assert typical.mean() < 1 and np.sqrt((typical**2).mean()) > np.sqrt((lucky**2).mean())
    assert score(typical) < score(lucky)


def test_a_small_search_compares_two_on_all_images():
    assert rungs(1, 8)[-1] == Rung(1, 8) and rungs(5, 8)[-1] == Rung(2, 8)
    with pytest.raises(OptionError, match="needs a candidate and an image"):
        rungs(0, 8)
