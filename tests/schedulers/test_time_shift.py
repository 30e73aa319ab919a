"""Time-Shift: identities, the clocks' bias, per-image decisions, the hook, refusals. Golden runs: tests/parity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_runs import PATHS, loop, make, noise

import diffaccel as da
from diffaccel import TableScheduler
from diffaccel.compare import counted
from diffaccel.core.grid import nodes as grid_nodes
from diffaccel.core.path import Path
from diffaccel.errors import OptionError, RunError
from diffaccel.samplers.ddim import ancestral
from diffaccel.schedulers.clocks import Steps
from diffaccel.schedulers.from_config import path_of
from diffaccel.testing.pipelines import build, call_kwargs

X = noise(3, 3, 8, 8, dtype=torch.float64)
LEVEL = {"window": 60, "cutoff": 100}
LAM = {"window_lam": 0.3, "cutoff_lam": 1.0}


def shifted(path="sd15", sampler="ddim", calls=10, settings=None, **options):
    part = da.time_shift(**(options or (LEVEL if PATHS[path].get("path", "vp") == "vp" else LAM)))
    scheduler = make(path, sampler, {**(settings or {}), "policy": [part]})
    scheduler.set_timesteps(calls)
    return scheduler


def model(x, t):
    return torch.tanh(0.9 * x)


# ---------------------------------------------------------------------- what a shift is
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "pndm", "ipndm", "ghvb"])
@pytest.mark.parametrize("clock", [{}, {"clock": "corrected", "data_variance": 0.8}])
def test_window_0_is_the_sampler_itself(sampler, clock):
    ours = shifted(sampler=sampler, window=0, cutoff=0, **clock)
    plain = make("sd15", sampler)
    plain.set_timesteps(10)
    runs = [loop(s, X, predict=model, generator=torch.Generator().manual_seed(0)) for s in (ours, plain)]
    torch.testing.assert_close(*runs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["sd15", "edm", "flow"])
def test_a_row_is_aimed_at_the_chosen_level(path):
    """The DDIM step to tau, by the formula, for the tau that the policy chose for each image."""
    scheduler = shifted(path)
    x = scheduler.init_noise_sigma * X
    for i, t in enumerate(scheduler.timesteps):
        run = scheduler._runs.need()
        fed = scheduler.scale_model_input(x, t)
        after = scheduler.step(model(fed, t), t, x)
        chosen = dict(run.shifts.chosen)
        if i in chosen:
            s, positions = scheduler.table.rows[i].node, run.shifts.aims[i].positions[chosen[i].numpy()]
            alpha, sigma = (torch.tensor(v).view(-1, 1, 1, 1) for v in run.shifts.clock.levels(positions))
            d = after.pred_original_sample
            expected = alpha * d + sigma * (x - s.alpha * d) / s.sigma
            torch.testing.assert_close(after.prev_sample, expected, rtol=0, atol=1e-9)
        x = after.prev_sample
    assert len(chosen) >= 3


def test_it_equals_epsilon_scaling_with_another_amplitude():
    """DDIM to tau = DDIM to t' with `lambda = (s - s')/(s - s_tau)`, times `alpha_tau/alpha'`; s = sigma/alpha."""
    scheduler = shifted(window=40, cutoff=0)
    x = X
    for i, t in enumerate(scheduler.timesteps[:4]):
        output = model(x, t)
        state = scheduler.step(output, t, x).prev_sample
        run = scheduler._runs.need()
        row = scheduler.table.rows[i]
        if i:
            k = dict(run.shifts.chosen)[i]
            tau = [run.grid.path.at(float(p)) for p in run.shifts.aims[i].positions[k.numpy()]]
            for image, node in enumerate(tau):
                s, after = row.node, row.next
                factor = (s.level - after.level) / (s.level - node.level)
                e = output[image] / factor
                scaled = after.alpha * (x[image] - s.sigma * e) / s.alpha + after.sigma * e
                torch.testing.assert_close(state[image], scaled * node.alpha / after.alpha, rtol=0, atol=1e-12)
                assert factor >= 1
        x = state


def test_ddpm_rows_keep_their_noise():
    scheduler = shifted(sampler="ddpm", window=40, cutoff=0)
    draws = []
    x = X
    for i, t in enumerate(scheduler.timesteps[:3]):
        after = scheduler.step(model(x, t), t, x, generator=torch.Generator().manual_seed(i))
        run, row = scheduler._runs.need(), scheduler.table.rows[i]
        draws.append(run.draws[0])
        if i:
            k = dict(run.shifts.chosen)[i]
            for image, p in enumerate(run.shifts.aims[i].positions[k.numpy()]):
                kept, fresh = ancestral(row.node, run.grid.path.at(float(p)), 1.0)
                d, node = after.pred_original_sample[image], run.grid.path.at(float(p))
                e = (x[image] - row.node.alpha * d) / row.node.sigma
                expected = node.alpha * d + kept * e + fresh * draws[-1][image]
                torch.testing.assert_close(after.prev_sample[image], expected, rtol=0, atol=1e-12)
        x = after.prev_sample


@settings(deadline=None, max_examples=25)
@given(st.integers(5, 12), st.integers(2, 40), st.floats(0.3, 2.0))
def test_saturation(calls, half, spread):
    """A state's variance is never below sigma^2: where the stride exceeds half the window, the choice is its edge."""
    scheduler = shifted(calls=calls, window=2 * half, cutoff=0, settings={"grid": "trailing"})
    assert 1000 / calls > half
    path, rng = path_of(scheduler.config), np.random.default_rng(0)
    x0 = spread * rng.standard_normal((2, 3, 32, 32))
    for i, t in enumerate(scheduler.timesteps):
        node = scheduler.table.rows[i].node
        x = torch.tensor(node.alpha * x0 + node.sigma * rng.standard_normal(x0.shape))
        scheduler.step(torch.zeros_like(x), t, x)
    report = scheduler.policy_report()
    assert report["edge_share"] > 0.8
    assert report["constant"] == (report["edge_share"] > 0.9) == ("is a constant" in scheduler.explain())
    assert report["mean_shift"] > 0
    assert path.family == "vp"


# ---------------------------------------------------------------------- clocks
def test_the_corrected_clock_has_no_bias():
    """For exact samples its mean shift is 0 within the standard error; the official clock's is positive."""
    rng, v0 = np.random.default_rng(1), 0.5
    mean = {}
    for clock in ({}, {"clock": "corrected", "data_variance": v0}):
        scheduler = shifted(calls=20, window=60, cutoff=200, **clock)
        found = []
        for i, t in enumerate(scheduler.timesteps):
            node = scheduler.table.rows[i].node
            x0 = np.sqrt(v0) * rng.standard_normal((64, 3, 24, 24))
            x = torch.tensor(node.alpha * x0 + node.sigma * rng.standard_normal(x0.shape))
            scheduler.step(torch.zeros_like(x), t, x)
            run = scheduler._runs.need()
            chosen = dict(run.shifts.chosen)
            if i in chosen:
                aim = run.shifts.aims[i]
                found.append(aim.positions[chosen[i].numpy()] - aim.positions[aim.center])
        values = np.concatenate(found)
        mean[clock.get("clock", "variance")] = (values.mean(), values.std() / np.sqrt(len(values)))
    assert abs(mean["corrected"][0]) < 4 * mean["corrected"][1] + 0.25  # a quarter step: whole steps are rounded
    assert mean["variance"][0] > 10


def test_too_little_variance_keeps_more_noise():
    scheduler = shifted(window=80, cutoff=0, clock="corrected", data_variance=0.5)
    path = path_of(scheduler.config)
    for i, t in enumerate(scheduler.timesteps[:6]):
        node = scheduler.table.rows[i].node
        exact = (0.5 * node.alpha**2 + node.sigma**2) ** 0.5
        size = exact * torch.tensor([0.97, 1.0, 1.03], dtype=torch.float64).view(-1, 1, 1, 1)
        x = X / X.flatten(1).std(dim=1).view(-1, 1, 1, 1) * size
        scheduler.step(torch.zeros_like(x), t, x)
    run = scheduler._runs.need()
    for i, k in run.shifts.chosen:
        positions = run.shifts.aims[i].positions[k.numpy()]
        assert positions[0] >= positions[1] >= positions[2]
        assert positions[1] == run.shifts.aims[i].positions[run.shifts.aims[i].center]
        assert node.alpha < 1 and path.family == "vp"
    assert scheduler.policy_report()["shifted"] > 0


# ---------------------------------------------------------------------- image by image, saving, copies
@pytest.mark.parametrize("path", ["sd15", "edm", "flow"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "ghvb"])
def test_each_image_decides_for_itself(path, sampler):
    scales = torch.tensor([0.9, 1.0, 1.1], dtype=torch.float64).view(-1, 1, 1, 1)
    together = shifted(path, sampler)
    start = together.init_noise_sigma * X * scales
    x = loop(together, start, predict=model, generator=[torch.Generator().manual_seed(i) for i in range(3)])
    for i in range(3):
        alone = shifted(path, sampler)
        y = loop(alone, start[i : i + 1], predict=model, generator=[torch.Generator().manual_seed(i)])
        torch.testing.assert_close(x[i : i + 1], y, rtol=0, atol=1e-12)


def test_begun_runs_and_copies():
    import copy

    scheduler = shifted(calls=12)
    x = X
    for t in scheduler.timesteps[:5]:
        x = scheduler.step(model(x, t), t, x)[0]
    twin = copy.deepcopy(scheduler)
    ends = []
    for s in (scheduler, twin):
        y = x
        for t in s.timesteps[5:]:
            y = s.step(model(y, t), t, y)[0]
        ends.append(y)
    assert torch.equal(*ends) and scheduler.policy_report() == twin.policy_report()
    scheduler.set_timesteps(12)
    scheduler.set_begin_index(6)
    loop(scheduler, X, 6, predict=model)
    assert scheduler.policy_report()["decisions"] == 3 * sum(
        6 < i < 11 and row.next.t > LEVEL["cutoff"] for i, row in enumerate(scheduler.table.rows)
    )


def test_saved_and_loaded(tmp_path):
    made = da.TimeShiftScheduler.from_config(make("sd15").config, sampler="pndm", order=2, window=40, cutoff=300)
    made.save_pretrained(tmp_path)
    loaded = da.TimeShiftScheduler.from_pretrained(tmp_path)
    runs = []
    for s in (made, loaded):
        s.set_timesteps(9)
        runs.append(loop(s, X, predict=model))
    assert torch.equal(*runs)
    assert loaded.config.policy == [{"name": "time_shift", "window": 40, "cutoff": 300}]


def test_nothing_is_read_from_the_device(monkeypatch):
    scheduler = shifted()

    def refuse(*_):
        raise AssertionError("a value was read")

    x = X.float()
    for i, t in enumerate(scheduler.timesteps[:6]):
        output = model(x, t)
        if i == 1:  # the first call looks up where the run begins; the finite check reads the CPU on purpose
            scheduler._runs.need().watch = ""
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
                monkeypatch.setattr(torch.Tensor, name, refuse)
        x = scheduler.step(output, t, x)[0]
    monkeypatch.undo()
    assert scheduler.policy_report()["decisions"] > 0


# ---------------------------------------------------------------------- mode "timestep"
def pipeline(**options):
    pipe = build("sd15")
    pipe.set_progress_bar_config(disable=True)
    policy = [da.time_shift(120, 100, mode="timestep", **options)]
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="ddim", policy=policy)
    kept = {k: v for k, v in call_kwargs("sd15").items() if k not in ("num_inference_steps", "generator")}
    return pipe, kept | {"num_inference_steps": 8, "output_type": "latent", "guidance_scale": 3.0}


def test_the_hook_feeds_each_image_its_own_timestep():
    pipe, kwargs = pipeline()
    kwargs |= {"prompt": ["a", "b"], "latents": noise(2, 4, 16, 16) * torch.tensor([1e-4, 1.1]).view(2, 1, 1, 1)}
    torch.nn.init.zeros_(pipe.unet.conv_out.weight)  # one image stays small, the other grows
    torch.nn.init.zeros_(pipe.unet.conv_out.bias)
    fed = []
    with da.feed_timesteps(pipe), counted(pipe) as count:
        watch = pipe.unet.register_forward_pre_hook(
            lambda m, a, k: fed.append(torch.as_tensor(k.get("timestep", a[1] if len(a) > 1 else None))),
            with_kwargs=True,
        )
        pipe(**kwargs)
        watch.remove()
    assert count.calls == 8
    assert fed[0].ndim == 0 and all(t.shape == (4,) for t in fed[1:6])  # two conditions of two images
    assert all(torch.equal(t[:2], t[2:]) for t in fed[1:6])
    assert any(float(t[0]) != float(t[1]) for t in fed[1:6])
    report = pipe.scheduler.policy_report()
    assert report["shifted"] > 0
    with pytest.raises(RunError, match="feed_timesteps"):
        pipe(**kwargs)


def test_window_0_of_the_paper_form_is_ddim():
    runs = []
    for window in (0, None):
        policy = None if window is None else [da.time_shift(window, 0, mode="timestep")]
        pipe = build("sd15")
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="ddim", policy=policy)
        kept = {k: v for k, v in call_kwargs("sd15").items() if k not in ("num_inference_steps", "generator")}
        kept |= {"num_inference_steps": 6, "output_type": "latent", "latents": noise(1, 4, 16, 16)}
        if policy:
            with da.feed_timesteps(pipe):
                runs.append(pipe(**kept).images)
        else:
            runs.append(pipe(**kept).images)
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)


def test_the_next_row_starts_from_the_fed_level():
    scheduler = make(
        "sd15", "ddim", {"policy": [da.time_shift(80, 100, mode="timestep")], "prediction_type": "v_prediction"}
    )
    pipe = type("Pipe", (), {"unet": torch.nn.Identity(), "scheduler": scheduler})()
    with da.feed_timesteps(pipe):
        scheduler.set_timesteps(8)
        path, x = path_of(scheduler.config), X
        for i, t in enumerate(scheduler.timesteps[:5]):
            fed, output = scheduler.fed_timesteps, model(x, t)
            after = scheduler.step(output, t, x).prev_sample
            if fed is not None:
                for image, step in enumerate(fed.tolist()):
                    s, target = path.at(step), scheduler.table.rows[i].next
                    d = s.alpha * x[image] - s.sigma * output[image]
                    e = s.sigma * x[image] + s.alpha * output[image]
                    torch.testing.assert_close(after[image], target.alpha * d + target.sigma * e, rtol=0, atol=1e-12)
            x = after
        assert fed is not None


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs window and cutoff"),
        ({"window": 40}, "needs window and cutoff"),
        ({"window": 40, "cutoff": 1, "window_lam": 0.1, "cutoff_lam": 1.0}, "needs window and cutoff"),
        ({"window": -2, "cutoff": 1}, "window of 0 or more"),
        ({"window": 2.5, "cutoff": 1}, "whole number"),
        ({"window": 4, "cutoff": 1, "mode": "both"}, "unknown mode"),
        ({"window": 4, "cutoff": 1, "clock": "sun"}, "unknown clock"),
        ({"window": 4, "cutoff": 1, "clock": "corrected"}, "needs data_variance"),
        ({"window": 4, "cutoff": 1, "data_variance": 1.0}, "only it takes it"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        TableScheduler(sampler="ddim", policy=[da.time_shift(**options)])


@pytest.mark.parametrize("sampler", ["dpmpp", "unipc", "deis", "heun", "er_sde"])
def test_samplers_that_cannot_be_aimed_elsewhere(sampler):
    with pytest.raises(OptionError, match=f"'time_shift' cannot be combined with sampler '{sampler}'"):
        shifted(sampler=sampler)


def test_other_refusals():
    with pytest.raises(OptionError, match="window_lam"):
        shifted("flow", **LEVEL)
    with pytest.raises(OptionError, match="'time_shift' cannot be combined with 'restart'"):
        TableScheduler(sampler="ddim", policy=[da.time_shift(40, 300)], rewrite=[da.restart()])
    with pytest.raises(OptionError, match="mode 'timestep' works with"):
        shifted(sampler="ddpm", window=40, cutoff=300, mode="timestep")
    with pytest.raises(OptionError, match="unknown policy"):
        TableScheduler(policy=["time_shft"])
    with pytest.raises(OptionError, match="a TableScheduler"):
        da.feed_timesteps(build("sd15"))


def test_positions_of_the_clock():
    clock = Steps(Path.vp(tuple(np.linspace(1e-4, 0.02, 1000))))
    assert clock.window(10, 20).tolist() == list(range(31)) and clock.window(990, 20)[-1] == 999
    nodes = grid_nodes(clock.path, 5, "trailing")
    assert [clock.position(n) for n in nodes[:-1]] == [999, 799, 599, 399, 199]
