"""Stages: sizes, grids, the certificate and the delta rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dctn

from diffaccel.core import stages as S
from diffaccel.errors import OptionError

FIELD = S.Spectrum(203.615097 / 4, 1.915461, 32, 32)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 17, 64, 130])
def test_dct_matrix(n):
    c = S.dct_matrix(n)
    np.testing.assert_allclose(c @ c.T, np.eye(n), rtol=0, atol=1e-13)
    x = np.random.default_rng(n).standard_normal((n, n + 1))
    np.testing.assert_allclose(c @ x @ S.dct_matrix(n + 1).T, dctn(x, norm="ortho"), rtol=0, atol=1e-12)


@given(st.floats(0, 1e6))
def test_flow_time_and_level(rho):
    assert S.level(S.flow_time(rho)) == pytest.approx(rho, rel=1e-6)
    assert S.flow_time(math.inf) == 1 and S.level(1.0) == math.inf


@pytest.mark.parametrize(
    ("full", "divisor", "low"),
    [((18, 26), 2, (8, 12)), ((14, 22), 2, (8, 12)), ((17, 25), 4, (8, 12)),
     ((128, 128), 8, (64, 64)), ((96, 170), 2, (48, 84)), ((4, 4), 8, (8, 8))],
)  # fmt: skip
def test_sizes(full, divisor, low):
    """The sizes that were run end to end with published pipelines."""
    assert S.stage_size(full, 0.5, divisor) == low
    assert S.stage_size(full, 1.0, divisor) == full


def test_a_size_that_rounds_badly():
    with pytest.raises(OptionError, match="Latent sizes near by that work: ") as caught:
        S.stage_size((10, 40), 0.5, 8)
    sizes = str(caught.value).rsplit(": ", 1)[1]
    assert sizes != "none"
    for size in sizes.split(", "):
        h, w = map(int, size.split("x"))
        S.stage_size((h, w), 0.5, 8)


@given(st.floats(0.2, 1), st.floats(0, 0.9), st.integers(1, 30), st.floats(0.5, 9))
def test_grids_fall_between_exact_ends(start, part, n, shift):
    end = part * start
    for times in (S.shifted_times(start, end, n, shift), S.grid_times(np.linspace(1, 0, 21), start, end, n)):
        assert len(times) == n + 1 and times[0] == start and times[-1] == end
        assert np.all(np.diff(times) < 0) or start - end < 1e-9


def test_a_whole_grid_is_kept():
    grid = S.shifted_times(1.0, 0.0, 13, 3.0)
    np.testing.assert_allclose(S.grid_times(grid, 1.0, 0.0, 13), grid, atol=1e-15)


def test_delta_rule_is_the_latest_time_that_keeps_the_promise():
    power = FIELD.power((32, 32))
    for delta in (0.003, 0.01, 0.05, 0.3):
        t = S.switch_time(FIELD, (16, 16), (32, 32), delta)
        assert S.missing(power, (16, 16), 2 * S.level(t))[0] == pytest.approx(delta, rel=1e-9)
        assert S.missing(power, (16, 16), 2 * S.level(t - 1e-3))[0] > delta


def test_published_times():
    """FLUX at 128x128 from 64x64 and 32x32."""
    flux = S.SPECTRA["flux"]
    assert S.switch_time(flux, (64, 64), (128, 128)) == pytest.approx(0.635, abs=5e-4)
    assert S.switch_time(flux, (64, 64), (128, 128), 0.05) == pytest.approx(0.432, abs=5e-4)
    assert S.switch_time(flux, (32, 32), (128, 128)) == pytest.approx(0.572, abs=5e-4)
    assert S.switch_time(flux, (64, 64), (128, 128), rule="speed") == pytest.approx(0.852, abs=1e-3)


def test_power_at_another_size():
    """An image of twice the size has r^2 times the power in each shared coefficient."""
    np.testing.assert_allclose(FIELD.power((64, 64))[:32, :32], 4 * FIELD.power((32, 32)), rtol=1e-12)


def test_nothing_new_nothing_missing():
    assert S.missing(FIELD.power((32, 32)), (32, 32), 1.0) == (0.0, 0.0)


def test_step_equivalents():
    """FLUX's published shares of a call at 1024 pixels, and [4, 13, 8] at half size."""
    cost = {n: S.transformer_flops(57, 3072, (n // 16) ** 2 + 512) for n in (256, 512, 768, 1024)}
    assert cost[1024] / 1e12 == pytest.approx(74.4, abs=0.1)
    assert [cost[n] / cost[1024] for n in (768, 512, 256)] == pytest.approx([0.564, 0.289, 0.139], abs=1e-3)
    total = S.step_equivalents([4, 13, 8], [cost[1024], cost[512], cost[1024]], cost[1024])
    assert total == pytest.approx(15.8, abs=0.05)


@given(st.integers(3, 200))
def test_shares(calls):
    counts = S.shares(calls, (16, 52, 32))
    assert sum(counts) == calls and min(counts) >= 1
    assert all(abs(c - calls * p / 100) < 1 or c == 1 for c, p in zip(counts, (16, 52, 32), strict=True))
    assert S.shares(25, (16, 52, 32)) == [4, 13, 8]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S.Stage(0.0, 3), "scale must lie"),
        (lambda: S.Stage(0.5, 0), "steps is the number"),
        (lambda: S.Stage(0.5, 3, t_end=1.2), "t_end is a flow time"),
        (lambda: S.Stage(0.5, 3, shift=-1.0), "shift must be positive"),
        (lambda: S.shares(2, (1, 1, 1)), "at least 3 calls"),
        (lambda: S.switch_time(FIELD, (16, 16), (32, 32), 2.0), "delta must lie"),
        (lambda: S.switch_time(FIELD, (16, 16), (32, 32), rule="energy"), "unknown rule"),
        (lambda: S.Spectrum.of("sdxl"), "unknown spectrum"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(OptionError, match=message):
        make()
