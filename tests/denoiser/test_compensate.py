"""Variance compensation: what a fitted row does, the order of fitting, and what is refused."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffaccel.denoiser.compensate import KINDS, Compensation, Fit, fit_row
from diffaccel.errors import ArtifactError, OptionError, RunError

N, B, C = 6, 16, 3


def drifting(images=B, seed=0):
    """A linear recursion (N, B, C, 2, 2) and a run of it whose steps each lose some variance and shift the mean."""
    rng = torch.Generator().manual_seed(seed)
    start = torch.randn((images, C, 2, 2), generator=rng, dtype=torch.float64)
    noise = 0.1 * torch.randn((N, images, C, 2, 2), generator=rng, dtype=torch.float64)

    def full(x, i):
        return 0.9 * x + noise[i]

    def fast(x, i):
        return 0.86 * x + 0.9 * noise[i] + 0.05

    return start, full, fast


def fitted(kind="std", **how):
    start, full, fast = drifting()
    reference, x = [], start
    for i in range(N):
        x = full(x, i)
        reference.append(x)
    fit, x, states = Fit(torch.stack(reference), kind, **how), start, []
    for i in range(N):
        x = fit.correct(i, fast(x, i))
        states.append(x)
    return fit.done(), torch.stack(reference), torch.stack(states)


def test_a_sequential_fit_of_std_restores_mean_and_deviation_of_the_fit_set():
    made, reference, states = fitted()
    dims = (1, 3, 4)
    ratio = states.std(dims, correction=0) / reference.std(dims, correction=0)
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-12, rtol=0)
    assert torch.allclose(states.mean(dims), reference.mean(dims), atol=1e-12)
    assert made.range[1] > 1.01  # there was something to correct


@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_share_the_images_fit_the_rows_of_all(kind):
    """Threads in place of processes: each has some of the images, sums meet at a barrier."""
    ref, acc = (drifting(B, seed)[0] for seed in (1, 2))
    whole = fit_row(ref, 0.9 * ref + 0.3 * acc + 0.1, kind)
    cuts, barrier, sums, found = (slice(0, 5), slice(5, 6), slice(6, B)), threading.Barrier(3), {}, {}

    def work(rank, cut):
        def total(share):
            sums[rank] = share
            barrier.wait(30)
            everything = sum(sums[r] for r in range(3))
            barrier.wait(30)
            return everything

        found[rank] = fit_row(ref[cut], 0.9 * ref[cut] + 0.3 * acc[cut] + 0.1, kind, total=total)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(cuts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(3):
        for mine, theirs in zip(found[rank], whole, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-14)
    alone = fit_row(ref[cuts[0]], 0.9 * ref[cuts[0]] + 0.3 * acc[cuts[0]] + 0.1, kind)
    assert np.abs(alone[2] - whole[2]).max() > 1e-3  # a share by itself is not enough


def test_rows_fitted_at_once_multiply():
    made, reference, _ = fitted()
    start, _, fast = drifting()
    x, gains = start, []
    for i in range(N):
        x = fast(x, i)
        gains.append(fit_row(reference[i], x)[2])
    assert np.prod(gains, axis=0).min() > 1.05 * made.product_range[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_lowers_the_error_on_other_noise(kind):
    made, _, _ = fitted(kind)
    start, full, fast = drifting(seed=1)
    exact = plain = x = start
    for i in range(N):
        exact, plain, x = full(exact, i), fast(plain, i), made.apply(i, fast(x, i))
    assert (x - exact).square().mean() < 0.5 * (plain - exact).square().mean()


def test_equal_runs_are_left_alone():
    reference = torch.randn((N, B, C, 2, 2), dtype=torch.float64)
    fit = Fit(reference)
    for i in range(N):
        assert torch.allclose(fit.correct(i, reference[i]), reference[i], atol=1e-14)
    x = torch.randn((2, C, 4, 4))
    assert fit.done().apply(0, x) is x  # not even rounded


def test_without_shift_the_mean_stays():
    made, _, states = fitted(shift=False)
    np.testing.assert_array_equal(made.mu_ref, made.mu_acc)
    start, _, fast = drifting()
    first = fast(start, 0)
    assert torch.allclose(states[0].mean((0, 2, 3)), first.mean((0, 2, 3)))


@settings(max_examples=25, deadline=None)
@given(gain=st.floats(0.85, 1.2), shift=st.floats(-1, 1), kind=st.sampled_from(KINDS), tokens=st.booleans())
def test_an_affine_error_is_undone_exactly(gain, shift, kind, tokens):
    shape = (B, 5, C) if tokens else (B, C, 2, 2)
    reference = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fit = Fit(reference[None], kind)
    fit.correct(0, (reference - shift) / gain)
    made = fit.done()
    assert made.gain.shape == (1, C)
    np.testing.assert_allclose(made.gain, gain, rtol=1e-10)
    assert torch.allclose(made.apply(0, (reference - shift) / gain), reference, atol=1e-10)


def test_half_precision_is_computed_in_single():
    made, _, _ = fitted()
    x = torch.randn((2, C, 4, 4), dtype=torch.bfloat16)
    assert torch.equal(made.apply(2, x), made.apply(2, x.float()).bfloat16())
    assert made.apply(2, x).dtype is torch.bfloat16


# ---------------------------------------------------------------------- refusals
def test_too_few_images_and_unknown_kinds():
    with pytest.raises(OptionError, match="8 images"):
        Fit(torch.zeros((N, 7, C, 2, 2)))
    with pytest.raises(OptionError, match="compensation"):
        Fit(torch.zeros((N, 8, C, 2, 2)), "variance")


def test_a_fit_in_another_order_or_unfinished():
    fit = Fit(torch.randn((N, B, C, 2, 2)))
    with pytest.raises(RunError, match="step 0"):
        fit.correct(1, torch.randn((B, C, 2, 2)))
    with pytest.raises(RunError, match="step 0"):
        fit.correct(0, torch.randn((B // 2, C, 2, 2)))
    with pytest.raises(RunError, match="0 of 6"):
        fit.done()


def test_gains_that_are_no_correction():
    one, zero = np.ones((4, 2)), np.zeros((4, 2))
    for gain in (one * 1.3, one * 0.7, one * 1.2):  # 1.2^4 > 2: the product
        with pytest.raises(ArtifactError, match="no correction"):
            Compensation(zero, zero, gain)
    with pytest.raises(ArtifactError, match="finite"):
        Compensation(zero, zero, one * np.nan)
    with pytest.raises(ArtifactError, match="three arrays"):
        Compensation(zero, zero[:2], one)


def test_another_step_or_state():
    made, _, _ = fitted()
    with pytest.raises(RunError, match="6 steps of 3 channels"):
        made.apply(N, torch.zeros((1, C, 2, 2)))
    with pytest.raises(RunError, match="3 channels"):
        made.apply(0, torch.zeros((1, C + 1, 2, 2)))
