"""The change of size of a noisy latent: exact signal, white noise, and the four fills."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from diffaccel.core.stages import FILLS, ratio
from diffaccel.errors import RunError
from diffaccel.schedulers.resize import (
    Memory,
    dct,
    drawer,
    filled,
    fitted,
    idct,
    packed,
    resized,
    seeds_of,
    transition,
    unpacked,
)

SIZES = [((12, 16), (6, 8)), ((17, 10), (8, 6)), ((9, 9), (5, 4)), ((8, 6), (8, 4))]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def never(shape):
    raise AssertionError("nothing is to be drawn")


def aligned(x, rho, size, **more):
    """In y coordinates (alpha = 1), at the aligned level."""
    return transition(x, (1.0, rho), (1.0, rho * ratio(x.shape[-2:], size)), size, **more)


@pytest.mark.parametrize("shape", [(2, 3, 16, 12), (1, 7, 13), (2, 4, 3, 8, 6)])
def test_dct(shape):
    x = randn(*shape)
    np.testing.assert_allclose(dct(x).numpy(), dctn(x.numpy(), axes=(-2, -1), norm="ortho"), rtol=0, atol=1e-12)
    torch.testing.assert_close(idct(dct(x)), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("high", "low"), SIZES)
def test_down_and_up_again_is_the_identity(high, low):
    """With memory and no step between: even, odd and unevenly rounded sizes."""
    y, rho = randn(2, 3, *high), 3.0
    down = aligned(y, rho, low, draw=never)
    back = aligned(down, rho * ratio(high, low), high, fill="memory", memory=Memory.of(dct(y), rho), draw=never)
    torch.testing.assert_close(back, y, rtol=0, atol=1e-12 * float(y.abs().max()))


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(("high", "low"), SIZES)
def test_up_and_down_again_is_the_identity(high, low, fill):
    y, rho, power = randn(2, 3, *low), 1.5, torch.rand(high, dtype=torch.float64)
    memory = Memory.of(dct(randn(2, 3, *high, seed=1)), 4.0)
    up = aligned(y, rho, high, fill=fill, power=power, memory=memory, draw=randn_of(high))
    torch.testing.assert_close(aligned(up, rho * ratio(low, high), low, draw=never), y, rtol=0, atol=1e-12)


def randn_of(size):
    return lambda shape: randn(*shape, seed=7)


def test_white_noise_stays_white():
    """20,000 samples of 8x8 -> 12x16: covariance rho'^2 I within 5 standard errors, in pixels and in DCT modes."""
    n, rho = 20_000, 0.7
    y = rho * randn(n, 8, 8)
    out = aligned(y, rho, (12, 16), draw=lambda shape: randn(*shape, seed=3))
    expected = (rho * ratio((8, 8), (12, 16))) ** 2
    for values in (out, dct(out)):
        flat = values.flatten(1)
        covariance = flat.T @ flat / n
        error = expected * math.sqrt(2 / n) * torch.ones_like(covariance)
        error[~torch.eye(len(error), dtype=torch.bool)] = expected / math.sqrt(n)
        assert bool(((covariance - expected * torch.eye(len(error))).abs() < 5.5 * error).all())


@pytest.mark.parametrize("path", ["flow", "vp", "ve"])
def test_the_same_on_every_path(path):
    """x = alpha y: a transition on any path is that of y."""
    alpha = {"flow": lambda r: 1 / (1 + r), "vp": lambda r: (1 + r * r) ** -0.5, "ve": lambda r: 1.0}[path]
    y, rho, size = randn(1, 2, 6, 10), 1.3, (12, 20)
    out = 2 * rho
    got = transition(
        alpha(rho) * y, (alpha(rho), alpha(rho) * rho), (alpha(out), alpha(out) * out), size, draw=randn_of(size)
    )
    want = alpha(out) * aligned(y, rho, size, draw=randn_of(size))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_a_clean_image_keeps_its_amplitude():
    wave = torch.cos(torch.pi * (torch.arange(16, dtype=torch.float64) + 0.5) * 3 / 16).expand(2, 16, 16)
    small = resized(wave, (8, 8))
    assert float((small**2).mean()) == pytest.approx(float((wave**2).mean()), rel=1e-12)
    torch.testing.assert_close(resized(small, (16, 16)), wave, rtol=0, atol=1e-12)
    assert resized(torch.full((1, 5, 7), 0.3), (9, 9)).numpy() == pytest.approx(0.3, abs=1e-6)
    assert resized(torch.full((1, 2, 5, 7), 0.3), (9, 9), "bicubic").numpy() == pytest.approx(0.3, abs=1e-6)


def test_interpolation_of_noise_is_what_it_replaces():
    """Why noisy latents are never interpolated: bilinear and bicubic lose variance, this does not."""
    noise = randn(64, 1, 32, 32)
    up = torch.nn.functional.interpolate(noise, scale_factor=2, mode="bilinear")
    assert float(up.var()) == pytest.approx(0.391, abs=0.02)
    ours = aligned(noise, 1.0, (64, 64), draw=randn_of((64, 64)))
    assert float(ours.var()) == pytest.approx(4.0, rel=0.02)


def test_a_higher_start_adds_the_missing_variance():
    y = torch.zeros(4000, 4, 4, dtype=torch.float64)
    out = transition(y, (1.0, 1e-9), (1.0, 2.0), (4, 4), draw=lambda shape: randn(*shape))
    assert float(out.var()) == pytest.approx(4.0, rel=0.05)


def test_a_lower_start_is_refused():
    with pytest.raises(RunError, match="cannot lower the noise"):
        transition(randn(1, 4, 4), (1.0, 1.0), (1.0, 1.9), (8, 8), draw=never)


def test_fills():
    """Each formula, mode by mode; what memory does not cover is drawn."""
    power, rho, rho_d = torch.rand(6, 6, dtype=torch.float64), 0.8, 3.0
    y, z = randn(1, 6, 6), randn(1, 6, 6, seed=7)
    memory = Memory.of(y, rho_d)
    args = ((1, 6, 6), rho)
    draw = randn_of((6, 6))
    torch.testing.assert_close(filled(*args, "white", None, memory, draw), rho * z)
    torch.testing.assert_close(filled(*args, "memory", None, memory, never), rho / rho_d * y)
    torch.testing.assert_close(filled(*args, "matched", power, None, draw), torch.sqrt(power + rho**2) * z)
    want = torch.sqrt((power + rho**2) / (power + rho_d**2)) * y
    torch.testing.assert_close(filled(*args, "memory_matched", power, memory, never), want)
    part = filled(*args, "memory", None, Memory.of(y[..., :4, :4], rho_d), draw)
    torch.testing.assert_close(part[..., :4, :4], rho / rho_d * y[..., :4, :4])
    torch.testing.assert_close(part[..., 4:, :], rho * z[..., 4:, :])
    with pytest.raises(RunError, match="needs the spectrum"):
        filled(*args, "matched", None, None, draw)


def test_memory_of_several_sizes():
    """Each mode comes from the latest state that had it; the start noise itself is stored at rho = inf."""
    noise, later = randn(1, 8, 8), randn(1, 4, 4, seed=1)
    memory = Memory.of(later, 2.0).over(Memory.of(noise, math.inf))
    torch.testing.assert_close(memory.units[..., :4, :4], later / 2.0)
    torch.testing.assert_close(memory.units[..., 4:, :], noise[..., 4:, :])
    assert float(memory.rho[0, 0]) == 2.0 and float(memory.rho[7, 7]) == math.inf
    larger = Memory.of(noise, 5.0).over(Memory.of(later, 2.0))
    assert bool((larger.rho == 5.0).all())


def test_noise_of_an_image_is_its_own():
    """Alone or in a batch, whatever the others are."""
    latents = randn(3, 2, 4, 4).float()
    together = drawer(seeds_of(latents), torch.device("cpu"))((3, 2, 6, 6))
    alone = drawer(seeds_of(latents[1:2]), torch.device("cpu"))((1, 2, 6, 6))
    assert torch.equal(together[1:2], alone)
    assert len(set(seeds_of(latents))) == 3


def test_dtype_is_kept():
    assert aligned(randn(1, 2, 4, 4).to(torch.bfloat16), 1.0, (8, 8), draw=randn_of((8, 8))).dtype == torch.bfloat16


def test_packing():
    x = randn(2, 4, 6, 10)
    assert packed(x).shape == (2, 15, 16)
    assert torch.equal(unpacked(packed(x), (6, 10)), x)
    with pytest.raises(RunError, match="has 12 tokens, got 15"):
        unpacked(packed(x), (6, 8))


def test_fitted():
    c = randn(2, 3, 4)
    assert fitted(c, (5, 2)).shape == (2, 5, 2) and not fitted(c, (5, 2))[:, 3:].any()
