"""k-diffusion style functions as samplers: traced, run with tensors, refused with the reason."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import diffaccel as da
from diffaccel.core.path import Path
from diffaccel.errors import DiffaccelError, OptionError, TraceError
from diffaccel.samplers.kdiffusion import from_k_diffusion
from diffaccel.samplers.registry import REGISTRY, add, get
from diffaccel.testing.checks import CHECKS
from diffaccel.testing.problems import four_modes
from diffaccel.testing.runs import unroll

MODEL = four_modes()
PATHS = {"vp": Path.vp(np.linspace(0.03, 0.11, 1000) ** 2), "edm": Path.edm(), "flow": Path.flow(3.0)}


def slope(x, sigma, denoised):
    return (x - denoised) / sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


@torch.no_grad()
def sample_plain(model, x, sigmas, extra_args=None, callback=None, disable=None):
    extra_args = {} if extra_args is None else extra_args
    ones = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones, **extra_args)
        if callback is not None:
            callback({"x": x, "i": i})
        x = x + slope(x, sigmas[i], denoised) * (sigmas[i + 1] - sigmas[i])
    return x


def sample_trapezoid(model, x, sigmas, extra_args=None, callback=None, disable=None, churn=0.0, most=1e9, s_noise=1.0):
    ones = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        eps = torch.randn_like(x) * s_noise  # drawn whether it is used or not, as EDM's sampler does
        hat = sigmas[i] * (1 + churn) if sigmas[i] <= most else sigmas[i]
        if hat > sigmas[i]:
            x = x + eps * (hat**2 - sigmas[i] ** 2) ** 0.5
        d = slope(x, hat, model(x, hat * ones))
        dt = sigmas[i + 1] - hat
        if sigmas[i + 1] == 0:
            x = x + d * dt
        else:
            ahead = x + d * dt
            x = x + (d + slope(ahead, sigmas[i + 1], model(ahead, sigmas[i + 1] * ones))) / 2 * dt
    return x


def sample_two_points(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """DPM-Solver++(2M)."""
    ones, last = x.new_ones([x.shape[0]]), None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones)
        t, t_next = -sigmas[i].log(), -sigmas[i + 1].log()
        used = denoised
        if last is not None and sigmas[i + 1] > 0:
            r = (t + sigmas[i - 1].log()) / (t_next - t)
            used = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * last
        x = (sigmas[i + 1] / sigmas[i]) * x - (t - t_next).expm1() * used
        last = denoised
    return x


def sample_noisy(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, noise_sampler=None):
    """Euler ancestral."""
    ones = x.new_ones([x.shape[0]])
    noise_sampler = (lambda *_: torch.randn_like(x)) if noise_sampler is None else noise_sampler
    for i in range(len(sigmas) - 1):
        s, t = sigmas[i], sigmas[i + 1]
        denoised = model(x, s * ones)
        up = eta * (t**2 * (s**2 - t**2) / s**2) ** 0.5
        x = x + slope(x, s, denoised) * ((t**2 - up**2) ** 0.5 - s)
        if t > 0:
            x = x + noise_sampler(s, t) * up
    return x


def sample_adaptive(model, x, sigmas, extra_args=None, callback=None, disable=None):
    ones = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        d = slope(x, sigmas[i], model(x, sigmas[i] * ones))
        x = x + d * (sigmas[i + 1] - sigmas[i]) * (0.5 if torch.linalg.norm(d) > 1 else 1.0)
    return x


FUNCTIONS = [sample_plain, sample_trapezoid, sample_two_points, sample_noisy]


def replay():
    rng = np.random.default_rng(3)
    return lambda x: torch.from_numpy(rng.standard_normal(tuple(x.shape)))


def predict(x, node, space="x0"):
    return torch.from_numpy(MODEL.predict(x.numpy(), node, space))


@pytest.mark.parametrize("fn, parent", [(sample_plain, "ddim"), (sample_noisy, "ddpm"), (sample_trapezoid, "heun")])
@pytest.mark.parametrize("path", ["vp", "edm"])
def test_the_table_is_that_of_our_sampler(fn, parent, path):
    nodes = da.nodes(PATHS[path], 6, "karras")
    np.testing.assert_allclose(
        unroll(from_k_diffusion(fn).trace(nodes)), unroll(da.trace(parent, nodes)), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("path", PATHS)
def test_multistep_table(path):
    nodes = da.nodes(PATHS[path], 6, "karras")[1:]
    ours = da.trace("dpmpp", nodes, form="midpoint", lower_order_final=False)
    np.testing.assert_allclose(unroll(from_k_diffusion(sample_two_points).trace(nodes)), unroll(ours), atol=1e-9)


@pytest.mark.parametrize("fn", FUNCTIONS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_table_and_functional_run_equal_the_function(fn, path, final):
    nodes, made = da.nodes(PATHS[path], 7, final=final), from_k_diffusion(fn)
    x = torch.from_numpy(nodes[0].sigma * np.random.default_rng(0).standard_normal((5, 2)))
    table = made.trace(nodes)
    ours = table.apply(x, predict, replay())
    torch.testing.assert_close(made.run(x, nodes, predict, replay()), ours, rtol=1e-9, atol=1e-9)
    draw = replay()
    as_numpy = made.run(x.numpy(), nodes, MODEL.predict, lambda v: draw(v).numpy())
    np.testing.assert_allclose(as_numpy, ours, rtol=1e-9, atol=1e-9)
    if nodes[0].alpha == 0:  # the first step is a DDIM step made outside
        x, nodes = table.apply(x, predict, replay(), trajectory=True)[1], nodes[1:]
    sigmas = torch.tensor([n.level for n in nodes], dtype=torch.float64)

    def model(y, sigma):
        node = nodes.path.at_level(float(sigma[0]))
        return predict(y * node.alpha, node)

    draw = replay()
    extra = {"noise_sampler": lambda *_: draw(x)} if fn is sample_noisy else {}
    theirs = fn(model, x / nodes[0].alpha, sigmas, **extra) * nodes[-1].alpha
    torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)


def test_churn_from_the_second_step_on():
    """Noise by torch.randn_like comes from the run; draws that are not used are not made."""
    nodes, made = da.nodes(PATHS["edm"], 6, "karras"), from_k_diffusion(sample_trapezoid)
    options = {"churn": 0.1, "most": 30.0}
    table = made.trace(nodes, **options)
    ours = da.trace("heun", nodes, s_churn=0.6, s_tmax=30.0)
    np.testing.assert_allclose(unroll(table), unroll(ours), rtol=1e-9, atol=1e-9)
    x = torch.from_numpy(80 * np.random.default_rng(0).standard_normal((5, 2)))
    torch.testing.assert_close(
        made.run(x, nodes, predict, replay(), **options), table.apply(x, predict, replay()), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_calls_are_exact(fn):
    made = from_k_diffusion(fn)
    for path in PATHS.values():
        for final in ("zero", "sigma_min"):
            for calls in range(1, 12):
                nodes = da.nodes(path, made.intervals_of(calls), final=final)
                assert len(made.trace(nodes, calls)) == calls


@pytest.mark.parametrize("fn, order", [(sample_plain, 1), (sample_two_points, 2), (sample_noisy, 1)])
def test_it_passes_the_checks_of_every_sampler(fn, order):
    made = dataclasses.replace(from_k_diffusion(fn), order=order)
    for name in ("point_mass", "path_invariance", "order", "functional", "edits"):
        result = CHECKS[name](made, {})
        assert result.passed, str(result)


def test_options_and_registration():
    made = from_k_diffusion(sample_noisy, "k_noisy")
    assert made.stochastic and made.defaults == {"eta": 1.0}
    fixed = from_k_diffusion(sample_noisy, eta=0.0)
    assert not fixed.stochastic and fixed.name == "noisy" and fixed.defaults == {}
    try:
        assert add(made) is get("k_noisy")
        assert da.trace("k_noisy", da.nodes(PATHS["vp"], 4), eta=0.5).stochastic
    finally:
        REGISTRY.pop("k_noisy", None)
    with pytest.raises(OptionError, match="takes no option 'etta'"):
        from_k_diffusion(sample_noisy, etta=1.0)
    with pytest.raises(OptionError, match="takes no option 'etta'"):
        made.trace(da.nodes(PATHS["vp"], 4), etta=1.0)


def test_float32_tensors():
    nodes, made = da.nodes(PATHS["flow"], 5), from_k_diffusion(sample_plain)
    x = torch.randn(2, 3)

    def clean(v, node):
        return torch.tanh(v)

    out = made.run(x, nodes, clean)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, made.trace(nodes).apply(x, lambda v, n, s: clean(v, n)), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- refusals
def sample_own_levels(model, x, sigma_min, sigma_max, n):
    return x


def sample_unknown(model, x, sigmas, strength):
    return x


def sample_own_noise(model, x, sigmas):
    return model(x, sigmas[0]) + torch.randn(x.shape)


def sample_front_end(model, x, sigmas):
    return model(x, sigmas[0]) * model.inner_model.scale


def sample_early_noise(model, x, sigmas):
    return model(x + torch.randn_like(x), sigmas[0])


def sample_clipped(model, x, sigmas):
    return torch.clamp(model(x, sigmas[0]), -1, 1)


@pytest.mark.parametrize(
    "fn, kind, why",
    [
        (sample_adaptive, TraceError, r"calls torch\.\w*norm on a traced value"),
        (sample_own_levels, OptionError, "chooses its own noise levels, as adaptive ones do"),
        (sample_unknown, OptionError, "needs a value for strength"),
        (sample_own_noise, TraceError, "`noise_sampler` or torch.randn_like"),
        (sample_front_end, TraceError, "asks for model.inner_model"),
        (sample_early_noise, TraceError, "before the first model call"),
        (sample_clipped, TraceError, "torch.clamp"),
    ],
)
def test_refused_with_the_reason(fn, kind, why):
    with pytest.raises(kind, match=why) as caught:
        from_k_diffusion(fn)
    assert isinstance(caught.value, DiffaccelError)


def test_calls_that_do_not_suit_the_nodes():
    with pytest.raises(OptionError, match="2 model calls an interval; 20 calls do not suit 4 intervals"):
        from_k_diffusion(sample_trapezoid).trace(da.nodes(PATHS["vp"], 4), 20)
