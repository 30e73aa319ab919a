"""Picard iteration: its fixed point is the sequential run, for every linear sampler on every path."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffaccel.core.linear import carry
from diffaccel.core.node import decay
from diffaccel.core.table import Mix, Row, Table
from diffaccel.core.trace import trace_loop
from diffaccel.errors import OptionError, RunError
from diffaccel.parallel.picard import Picard, picard, variances
from diffaccel.samplers.registry import samplers
from diffaccel.testing.problems import four_modes
from diffaccel.testing.runs import PATHS, run_nodes, traced

PROBLEM = four_modes()
CALLS = 9


def _cases():
    for name, sampler in samplers().items():
        for options in sampler.settings:
            shown = ",".join(f"{k}={v}" for k, v in options.items())
            yield pytest.param(sampler, options, id=f"{name}({shown})")


CASES = list(_cases())


class Model:
    """The exact denoiser of the standard problem, which counts its batches."""

    def __init__(self):
        self.batches = []

    def one(self, x, node, space):
        return PROBLEM.predict(x, node, space)

    def batch(self, states, nodes, spaces):
        self.batches.append(len(states))
        return [self.one(*request) for request in zip(states, nodes, spaces, strict=True)]


def start(table, n=3, seed=0):
    first = table.nodes[0]
    return np.random.default_rng(seed).standard_normal((n, 2)) * math.hypot(first.alpha, first.sigma)


def noise(seed=1):
    rng = np.random.default_rng(seed)
    return lambda x: rng.standard_normal(x.shape)


def sequential(table, x):
    return table.apply(x, Model().one, noise())


@pytest.mark.parametrize("window", [1, 4, None])
@pytest.mark.parametrize("path", ["vp", "edm", "flow"])
@pytest.mark.parametrize(("sampler", "options"), CASES)
def test_equals_sequential(sampler, options, path, window):
    """tol = 0: the same result in at most N sweeps, history rows at the window's edges and noise included."""
    table = traced(sampler, options, PATHS[path], CALLS, "linspace_open")
    x, model = start(table), Model()
    out, work = picard(table, x, model.batch, noise(), window=window, tol=0)
    np.testing.assert_allclose(out, sequential(table, x), rtol=0, atol=1e-10)
    assert len(work.sweeps) <= len(table)
    assert model.batches == [s.rows for s in work.sweeps]
    assert work.calls == sum(model.batches)
    if window == 1:
        assert model.batches == [1] * len(table)


@pytest.mark.parametrize("space", ["v", "x0", "eps", "flow"])
@pytest.mark.parametrize("opening", [None, 1])
def test_every_space(space, opening):
    """A start at alpha = 0 included, where a noise prediction says nothing."""
    table = traced(samplers()["dpmpp"], {"order": 2}, PATHS["flow"], 20, "linspace_open")
    x = start(table)
    out, work = picard(table, x, Model().batch, window=6, tol=1e-4, space=space, opening=opening)
    np.testing.assert_allclose(out, sequential(table, x), rtol=0, atol=2e-3)
    assert len(work.sweeps) < 20
    assert work.sweeps[0].rows == (opening or 6)


@pytest.mark.parametrize("rule", ["scan", "official"])
def test_k_sweeps_make_k_states_exact(rule):
    table = traced(samplers()["dpmpp"], {"order": 3}, PATHS["vp"], 8, "linspace_open")
    x = start(table)
    states = table.apply(x, Model().one, trajectory=True)
    run = Picard(table, x, tol=0, rule=rule)
    for k in range(1, len(table) + 1):
        run.sweep(Model().batch(*zip(*run.requests(), strict=True)))
        assert run.first >= k
        np.testing.assert_allclose(run.state, states[run.first], rtol=0, atol=1e-12)
        if run.done:
            break
    assert run.done


def test_one_sweep_for_constant_v():
    """What the scan holds fixed is v: where v is constant along the run, one sweep of all rows is exact."""
    table = traced(samplers()["ddim"], {}, PATHS["vp"], 30, "linspace_open")
    x, v = start(table), np.array([[0.3, -0.7]] * 3)

    def batch(states, nodes, spaces):
        assert set(spaces) == {"v"}
        return [v] * len(states)

    run = Picard(table, x, tol=0)
    run.sweep(batch(*zip(*run.requests(), strict=True)))
    exact = table.apply(x, lambda s, node, space: node.alpha * s - node.sigma * v if space == "x0" else v)
    assert run._states[-1] == pytest.approx(exact, abs=1e-12)


def test_registers_at_a_window_edge():
    """A momentum that runs through the whole run is kept from one window to the next."""

    def loop(x, nodes, predict, noise):
        m = None
        for i in range(len(nodes) - 1):
            s, t = nodes[i], nodes[i + 1]
            d = predict(x, s)
            m = carry(d if m is None else 0.7 * d + 0.3 * m)
            x = (t.sigma / s.sigma) * x + t.alpha * (1 - decay(s, t)) * m
        return x

    table = trace_loop(loop, run_nodes(samplers()["ddim"], {}, PATHS["vp"], 12, "linspace_open"))
    assert table.slots == 1
    x = start(table)
    out, _ = picard(table, x, Model().batch, window=5, tol=0)
    np.testing.assert_allclose(out, sequential(table, x), rtol=0, atol=1e-11)


def test_coefficients_of_a_samples_shape():
    """Rows with arrays (DPM-Solver-v3) and constants."""
    base = traced(samplers()["dpmpp"], {"order": 2}, PATHS["vp"], 10, "linspace_open")
    c = np.array([0.97, 1.02])
    rows = [
        Row(r.node, r.next, r.space, Mix(r.out.x, tuple(b * c for b in r.out.p), one=0.01 * c), r.t) for r in base.rows
    ]
    table = Table(tuple(rows))
    x = start(table)
    out, _ = picard(table, x, Model().batch, window=4, tol=0)
    np.testing.assert_allclose(out, sequential(table, x), rtol=0, atol=1e-11)
    tensors, _ = picard(
        table,
        torch.from_numpy(x),
        lambda *a: [torch.from_numpy(p) for p in Model().batch([s.numpy() for s in a[0]], *a[1:])],
        window=4,
        tol=0,
    )
    np.testing.assert_allclose(tensors.numpy(), out, rtol=0, atol=1e-11)


@given(
    window=st.integers(1, 14), tol=st.floats(1e-6, 0.3), seed=st.integers(0, 99), opening=st.sampled_from([None, 1, 3])
)
@settings(max_examples=40, deadline=None)
def test_error_follows_the_tolerance(window, tol, seed, opening):
    """The root mean square error is some small multiple of the tolerance, whatever the window."""
    table = traced(samplers()["dpmpp"], {"order": 2}, PATHS["vp"], 14, "linspace_open")
    x = start(table, seed=seed)
    out, work = picard(table, x, Model().batch, window=window, tol=tol, opening=opening)
    assert np.sqrt(np.mean((out - sequential(table, x)) ** 2)) <= tol
    assert len(work.sweeps) <= len(table)
    assert all(a.first + a.moved == b.first for a, b in zip(work.sweeps, work.sweeps[1:], strict=False))


def test_slowest_sample_decides():
    """A batch's window moves by its slowest sample: no sample is worse off than alone."""
    table = traced(samplers()["ddim"], {}, PATHS["vp"], 24, "linspace_open")
    x = start(table, n=4)
    together = picard(table, x, Model().batch, window=8, tol=0.02)[1]
    alone = [picard(table, x[i : i + 1], Model().batch, window=8, tol=0.02)[1] for i in range(4)]
    assert len(together.sweeps) >= max(len(w.sweeps) for w in alone)


def test_fewer_sweeps_than_the_authors_sum():
    """On a stochastic run at equal tolerance: fewer sweeps and calls, and no larger error."""
    table = traced(samplers()["ddpm"], {}, PATHS["vp"], 50, "linspace_open")
    x = start(table)
    exact = sequential(table, x)
    own, work = picard(table, x, Model().batch, noise(), window=10, tol=1e-3)
    sums, theirs = picard(table, x, Model().batch, noise(), window=10, tol=1e-3, rule="official")
    assert len(work.sweeps) < len(theirs.sweeps) and work.calls < theirs.calls
    assert np.abs(own - exact).max() < 2 * np.abs(sums - exact).max()


def test_variances():
    """The last positive one stands in for rows to sigma = 0 and rows that stay on their level."""
    table = traced(samplers()["heun"], {}, PATHS["flow"], 9, "linspace_open")
    plain, floored = variances(table, floor=False), variances(table)
    assert plain[-1] == plain[-2] == 0 and min(floored) > 0
    assert all(f == v for f, v in zip(floored, plain, strict=True) if v > 0)


def test_work():
    table = traced(samplers()["ddim"], {}, PATHS["vp"], 20, "linspace_open")
    _, work = picard(table, start(table), Model().batch, window=8, tol=0.05)
    assert work.rows == 20
    assert work.rounds(1) == work.calls and work.rounds(8) == len(work.sweeps)
    assert len(work.sweeps) <= work.rounds(3) <= work.calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is a number of rows"),
        ({"window": True}, "window is a number of rows"),
        ({"opening": 2.0}, "opening is a number of rows"),
        ({"tol": -1.0}, "tol must be"),
        ({"tol": math.nan}, "tol must be"),
        ({"space": "vv"}, "unknown space"),
        ({"rule": "jacobi"}, "unknown rule"),
        ({"rule": "official", "space": "v"}, "no effect"),
    ],
)
def test_refusals(options, message):
    table = traced(samplers()["ddim"], {}, PATHS["vp"], 4, "linspace_open")
    with pytest.raises(OptionError, match=message):
        Picard(table, start(table), **options)


def test_noise_is_needed():
    table = traced(samplers()["ddpm"], {}, PATHS["vp"], 4, "linspace_open")
    with pytest.raises(RunError, match="pass noise="):
        Picard(table, start(table))


def test_one_answer_a_request():
    table = traced(samplers()["ddim"], {}, PATHS["vp"], 4, "linspace_open")
    run = Picard(table, start(table))
    with pytest.raises(RunError, match="one answer for each of 4"):
        run.sweep([start(table)])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_breaks_is_named(bad):
    """NaN is never taken for a state that does not move any more."""
    table = traced(samplers()["ddim"], {}, PATHS["vp"], 12, "linspace_open")

    def batch(states, nodes, spaces):
        return [p if n.lam < 0 else p * bad for p, n in zip(Model().batch(states, nodes, spaces), nodes, strict=True)]

    with np.errstate(invalid="ignore"), pytest.raises(RunError, match="became NaN or infinite"):
        picard(table, start(table), batch, window=5, tol=0.1)
