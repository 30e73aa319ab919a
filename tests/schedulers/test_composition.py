"""Every {sampler} x {rewriter} x {policy}: it works, or it is refused before the first call with the reason.

The pairs are generated from the registers, so that what is added later is walked through as well; a new rewriter or
policy without an entry in `OPTIONS` fails the test.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from scheduler_runs import make, noise

import diffaccel as da
from diffaccel.core.prediction import Output, pair
from diffaccel.errors import OptionError
from diffaccel.samplers.registry import samplers
from diffaccel.samplers.rewrite import listed
from diffaccel.schedulers.policy import POLICIES

CALLS = 14
X = noise(2, 1, 4, 4, dtype=torch.float64)
OPTIONS = {
    "restart": da.restart([(3, 1, 1.0, 3.0)]),
    "epsilon_scale": da.epsilon_scale(1.004, below=10.0),
    "momentum": da.momentum(0.7),
    "contrast": da.contrast(0.1),
    "align": da.align([(0.0, 0.0), (999.0, -8.0)]),
    "boost_and_skip": da.boost_and_skip(1.5, drop=1),
    "skip": da.skip("h2/s3"),
    "time_shift": da.time_shift(40, 300),
}
X0_POLICIES = {"none": {}, "clip": {"clip_sample": True, "clip_sample_range": 1.5}, "threshold": {"thresholding": True}}
NAMES = [n for n in samplers() if n not in ("fitted",)]  # its rows are an artifact's


def model(x, t):
    """A bounded noise prediction, each element by itself."""
    return torch.tanh(0.8 * x + torch.as_tensor(t).to(x) / 2000)


def built(sampler, rewrite, policy, x0_policy):
    settings = {"rewrite": rewrite, "policy": policy, **X0_POLICIES[x0_policy]}
    scheduler = make("sd15", sampler, settings)
    scheduler.set_timesteps(CALLS)
    return scheduler


def run(scheduler, x, seeds, begin=0):
    """(end, calls that the model saw)."""
    calls = 0
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    for t in scheduler.timesteps[begin:]:
        calls += 1
        x = scheduler.step(model(x, t), t, x, generator=generators)[0]
    return x, calls


def test_everything_registered_is_walked_through():
    assert set(OPTIONS) >= set(listed()) | set(POLICIES.kinds)


@pytest.mark.parametrize("sampler", NAMES)
def test_single_rewriters_with_every_policy(sampler):
    worked, refused = 0, {}
    for name in [None, *listed()]:
        for policy in [None, *POLICIES.kinds]:
            for x0_policy in X0_POLICIES:
                parts = [OPTIONS[name]] if name else [], [OPTIONS[policy]] if policy else []
                try:
                    scheduler = built(sampler, *parts, x0_policy)
                except OptionError as error:
                    text = str(error)
                    mine = [n for n in (name, policy) if n]
                    assert any(n in text for n in mine), text
                    assert sampler in text or all(n in text for n in mine), text
                    refused[name, policy] = text
                    continue
                check(scheduler, policy)
                worked += 1
    assert worked >= 6, refused


def check(scheduler, policy):
    """N calls, finite, the same alone as in a batch; without policies the run of its table."""
    begin = scheduler.init_noise_sigma * X
    (x, calls), rows = run(scheduler, begin, (1, 2)), scheduler.table
    assert calls == CALLS == len(rows) == len(scheduler.timesteps)
    assert x.isfinite().all()
    scheduler.set_timesteps(CALLS)
    alone, _ = run(scheduler, begin[1:], (2,))
    torch.testing.assert_close(alone, x[1:], rtol=0, atol=1e-12)
    if policy is None and not (scheduler.config.clip_sample or scheduler.config.thresholding):
        draws = torch.Generator().manual_seed(2)

        def predict(state, node, space):
            u, w = pair(Output("eps"), space, node)
            return u * state + w * model(torch.tensor(state), node.t).numpy()

        def draw(state):
            return torch.randn(state.shape, generator=draws, dtype=X.dtype).numpy()

        end = rows.apply(begin[1:].numpy(), predict, draw)
        np.testing.assert_allclose(alone.numpy(), end, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "unipc", "ghvb"])
def test_pairs_of_rewriters(sampler):
    names = listed()
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            try:
                first, second = (built(sampler, [OPTIONS[m], OPTIONS[n]], [], "none") for m, n in ((a, b), (b, a)))
            except OptionError as error:
                assert a in str(error) or b in str(error), str(error)
                continue
            assert first.table == second.table  # whatever order the user lists
            x, calls = run(first, first.init_noise_sigma * X, (3, 4))
            assert calls == CALLS and x.isfinite().all(), (a, b)


@pytest.mark.parametrize("path", ["flow", "edm", "zero_snr"])
@pytest.mark.parametrize("sampler", ["ddim", "unipc", "ghvb", "heun"])
def test_other_paths(sampler, path):
    """Each rewriter on models of other kinds, and Time-Shift in half log-SNR: N finite calls, or refused by name."""
    policies = [None, da.time_shift(window_lam=0.4, cutoff_lam=1.5)]
    for name in [None, *listed()]:
        for policy in policies:
            settings = {"rewrite": [OPTIONS[name]] if name else [], "policy": [policy] if policy else []}
            try:
                scheduler = make(path, sampler, settings)
                scheduler.set_timesteps(CALLS)
            except OptionError as error:
                assert (name or "time_shift") in str(error) or "time_shift" in str(error)
                continue
            x, calls = scheduler.init_noise_sigma * X, 0
            generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
            for t in scheduler.timesteps:
                output = torch.tanh(scheduler.scale_model_input(x, t))
                x, calls = scheduler.step(output, t, x, generator=generators)[0], calls + 1
            assert calls == CALLS and x.isfinite().all(), (name, policy)


@pytest.mark.parametrize("name", listed())
@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp"])
def test_every_begin_works_or_is_refused(name, sampler):
    try:
        scheduler = built(sampler, [OPTIONS[name]], [], "none")
    except OptionError:
        return
    began = 0
    for k in range(CALLS):
        scheduler.set_timesteps(CALLS)
        try:
            scheduler.set_begin_index(k)
        except OptionError as error:
            assert name in str(error)
            continue
        x, calls = run(scheduler, X, (5, 6), k)
        assert calls == CALLS - k and x.isfinite().all()
        began += 1
    assert began >= (1 if name == "boost_and_skip" else CALLS // 2)


@pytest.mark.parametrize("name", ["restart", "momentum", "time_shift"])
def test_threads_and_folders(name, tmp_path):
    part = {"policy": [OPTIONS[name]]} if name in POLICIES.kinds else {"rewrite": [OPTIONS[name]]}
    scheduler = make("sd15", "ddim", part)
    scheduler.save_pretrained(tmp_path)
    loaded = da.TableScheduler.from_pretrained(tmp_path)
    ends = {}

    def work(key, which):
        which.set_timesteps(CALLS)
        ends[key] = run(which, X, (7, 8))[0]

    threads = [threading.Thread(target=work, args=(i, scheduler)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    work("loaded", loaded)
    assert all(torch.equal(ends[0], other) for other in ends.values())
