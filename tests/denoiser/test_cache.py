"""Settings of caches, which steps they make full, and forecasts: nothing here runs a model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffaccel.denoiser.cache import Cache, letters
from diffaccel.denoiser.cache_forecast import History, weights
from diffaccel.denoiser.cache_policy import Watch, decide
from diffaccel.errors import ArtifactError, OptionError, RunError


def plan(cache: Cache, steps: int) -> str:
    return letters(cache.full_steps(steps))


# ---------------------------------------------------------------------- which steps
def test_steps_of_every():
    assert plan(Cache.every(3), 12) == "FFFF..F..F.F"
    assert plan(Cache.every(3, warmup=1, tail=0, forecast=0), 12) == "FF..F..F..F."
    assert plan(Cache.every(3, warmup=0, tail=0, forecast=0), 9) == "F..F..F.."
    assert plan(Cache.every(1), 5) == "FFFFF"


@given(n=st.integers(1, 6), warmup=st.integers(0, 5), tail=st.integers(0, 5), steps=st.integers(1, 60))
def test_every_is_its_formula_and_begins_full(n, warmup, tail, steps):
    found = Cache.every(n, warmup, tail, forecast=0).full_steps(steps)
    for i in range(1, steps):
        assert found[i] == (i < warmup or (i - warmup) % n == 0 or i >= steps - tail)
    assert found[0]


def test_a_mask_is_what_it_says():
    assert plan(Cache.mask([1, 1, 0, 1, 0], forecast=1), 5) == "FF.F."


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: Cache.every(0), "interval n=0"),
        (lambda: Cache.every(2.5), "whole number"),
        (lambda: Cache.every(2, warmup=-1), "warmup=-1"),
        (lambda: Cache.every(2, forecast=4), "orders up to 3"),
        (lambda: Cache.every(2, forecast=0, variable="lam"), "no effect"),
        (lambda: Cache.every(2, level="blocks"), "unknown level"),
        (lambda: Cache.every(2, forcast=1), "forecast"),
        (lambda: Cache.mask([0, 1, 1]), r"mask\[0\] is 0"),
        (lambda: Cache.mask([]), "0 and 1"),
        (lambda: Cache.mask([1, 2]), "0 and 1"),
        (lambda: Cache.first_block(), "threshold"),
        (lambda: Cache.first_block(0.0), "between 0 and 1"),
        (lambda: Cache.first_block(1.0), "between 0 and 1"),
        (lambda: Cache.first_block(0.1, max_run=0), "max_run=0"),
        (lambda: Cache.first_block(0.1, cfg="both"), "unknown cfg"),
        (lambda: Cache.mask([1, 0, 1], forecast=0).full_steps(4), "3 steps, the run has 4"),
        (lambda: Cache.mask([1, 0, 1], forecast=1).full_steps(3), "forecast=1 goes through 2 full values"),
        (lambda: Cache.every(5, warmup=1, tail=0, forecast=2).full_steps(7), "at most 2 lie before"),
    ],
)
def test_bad_settings_are_refused(made, says):
    with pytest.raises(OptionError, match=says):
        made()


def test_learned_needs_an_artifact_of_its_kind(tmp_path):
    with pytest.raises(ArtifactError, match="no artifact"):
        Cache.learned(tmp_path / "none.safetensors")


def test_settings_survive_json():
    for cache in (Cache.every(3, forecast=2), Cache.mask([1, 1, 0]), Cache.first_block(0.2, cfg="separate")):
        assert Cache.from_dict(cache.to_dict()) == cache


# ---------------------------------------------------------------------- forecasts
nodes_of = st.lists(st.floats(-50, 50), min_size=1, max_size=6, unique=True).filter(
    lambda u: len(u) < 2 or min(abs(a - b) for a, b in itertools.combinations(u, 2)) > 0.5
)


@given(nodes=nodes_of, order=st.integers(0, 3), target=st.floats(-60, 60))
def test_weights_sum_to_one_within_their_bound(nodes, order, target):
    found = weights(nodes, target, order)
    assert 1 <= len(found) <= min(order + 1, len(nodes))
    assert sum(found) == pytest.approx(1, abs=1e-9)
    assert max(map(abs, found)) <= 10


@given(nodes=nodes_of, coefs=st.lists(st.floats(-2, 2), min_size=4, max_size=4), gap=st.floats(0.1, 3))
def test_polynomials_of_the_order_are_exact(nodes, coefs, gap):
    target = nodes[-1] + gap
    for order in range(4):
        found = weights(nodes, target, order, largest=1e9)
        degree = len(found) - 1  # what the number of nodes allows
        poly = np.polynomial.Polynomial([c / 10.0**k for k, c in enumerate(coefs[: degree + 1])])
        forecast = np.dot(found, poly(np.array(nodes[-len(found) :])))
        assert forecast == pytest.approx(poly(target), abs=1e-12 * max(1, sum(map(abs, found))) * 1e3)


def test_a_large_weight_drops_the_order():
    assert len(weights([0.0, 1.0], 2.0, 1)) == 2
    assert weights([0.0, 0.1], 2.0, 1) == [1.0]  # 20 and -19
    assert len(weights([0.0, 0.1], 2.0, 1, largest=30)) == 2


def test_infinite_nodes_take_no_part():
    assert weights([-float("inf"), 0.0], 1.0, 1) == [1.0]
    assert len(weights([-float("inf"), 0.0, 1.0], 2.0, 2)) == 2


def test_history_keeps_rows_apart():
    """Rows that are full at different steps get the forecasts that each would get alone."""
    torch.manual_seed(0)
    values = torch.randn(8, 3, 2, dtype=torch.float64)
    full = {0: [0, 1, 2], 1: [0, 1, 2], 2: [1], 3: [0, 2], 4: [2], 5: [0, 1, 2], 6: [0]}
    for order in range(4):
        together = History(order)
        alone = [History(order) for _ in range(3)]
        for step, rows in full.items():
            if len(rows) == 3:
                together.push([values[step]], step, None, 3)
            else:
                together.push([values[step][rows]], step, rows, 3)
            for r in rows:
                alone[r].push([values[step][r : r + 1]], step, None, 1)
            found = together.predict(step + 0.7)[0]
            for r in range(3):
                torch.testing.assert_close(found[r : r + 1], alone[r].predict(step + 0.7)[0], rtol=0, atol=1e-12)
            some = together.predict(step + 0.7, [2, 0])[0]
            torch.testing.assert_close(some, found[[2, 0]], rtol=0, atol=1e-12)


def test_half_precision_is_forecast_in_float32():
    history = History(1)
    for step, value in enumerate((1.0, 1.0 + 2**-7)):
        history.push([torch.full((1, 4), value, dtype=torch.bfloat16)], step, None, 1)
    found = history.predict(3)[0]
    assert found.dtype is torch.bfloat16
    assert float(found[0, 0]) == 1 + 3 * 2**-7
    assert history.bytes == 2 * 4 * 4


def test_what_is_reused_is_a_copy():
    history = History(0)
    history.push([torch.ones(1, 2)], 0, None, 1)
    history.predict(1)[0].zero_()
    assert torch.equal(history.predict(1)[0], torch.ones(1, 2))


# ---------------------------------------------------------------------- first_block
def decisions(cache: Cache, values: list[list[float]], groups=()) -> list[str]:
    """Letters of each row, for a head's quantity that is one number a row."""
    watch, found = Watch(), []
    for step, now in enumerate(values):
        found.append(decide(watch, torch.tensor(now)[:, None], cache, [step > 0] * len(now), list(groups), step))
    return [letters(f[r] for f in found) for r in range(len(values[0]))]


def test_rows_decide_by_their_own_change():
    values = [[1.0, 1.0], [1.05, 1.5], [1.1, 1.51], [1.15, 1.52], [1.2, 3.0]]
    assert decisions(Cache.first_block(0.12, max_run=9), values) == ["F..F.", "FF..F"]


def test_the_last_full_step_is_the_other_reference():
    values = [[1.0], [1.05], [1.0], [1.05], [1.0], [1.2]]
    assert decisions(Cache.first_block(0.12, max_run=9), values) == ["F..F.F"]
    assert decisions(Cache.first_block(0.12, max_run=9, accumulate=False), values) == ["F....F"]


def test_runs_are_bounded():
    assert decisions(Cache.first_block(0.5, max_run=2), [[1.0]] * 8) == ["F..F..F."]


def test_a_group_is_full_together():
    values = [[1.0, 1.0], [1.05, 1.5], [1.1, 1.51], [1.15, 1.52], [1.2, 3.0]]
    assert decisions(Cache.first_block(0.12, max_run=9), values, [[0, 1]]) == ["FF..F", "FF..F"]


def test_what_is_not_finite_is_said():
    with pytest.raises(RunError, match=r"step 1: .* not finite"):
        decisions(Cache.first_block(0.12), [[1.0], [float("nan")]])
