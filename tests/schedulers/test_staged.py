"""StagedScheduler: what the transitions promise on an exact Gaussian field, and what a scheduler owes its pipeline."""

from __future__ import annotations

import copy
import json
import math
import pickle
import threading

import numpy as np
import pytest
import torch
from staged_field import Field, paired, run_field, solved, tweedie, unit_noise, unit_start, w2

from diffaccel.core.prediction import pair
from diffaccel.core.stages import Spectrum, Stage, flow_time, missing, shifted_times
from diffaccel.errors import OptionError, RunError
from diffaccel.schedulers import StagedScheduler, TableScheduler
from diffaccel.schedulers.from_config import output_of
from diffaccel.schedulers.resize import dct, idct

SIZE = (32, 32)
SPECTRUM = Spectrum(203.615097 / 4, 1.915461, *SIZE)
POWER = SPECTRUM.power(SIZE)
HLH = [Stage(1, 4, t_end=0.95, shift=3), Stage(0.5, 13, t_end=0.5, shift=3), Stage(1, 8, shift=1.5)]
LH = {t: [Stage(0.5, 12, t_end=t, shift=3), Stage(1, 12, shift=1.5)] for t in (0.7, 0.5, 0.3)}


def staged(stages, base=None, **options):
    base = base or TableScheduler(path="flow", sampler="dpmpp")
    options = {"spectrum": vars(SPECTRUM)} | options
    return StagedScheduler(base_config=dict(base.config), stages=[s.to_config() for s in stages], **options)


def gains(monkeypatch, stages, solver="dpmpp", size=SIZE, **options):
    unit_noise(monkeypatch)
    scheduler = staged(stages, TableScheduler(path="flow", sampler=solver), **options)
    return run_field(scheduler, Field(SPECTRUM.power(size)), unit_start(len(stages) + 1, size))


# ---------------------------------------------------------------------- claims on the exact field
@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
@pytest.mark.parametrize("t", list(LH))
def test_half_the_error_of_tweedie_with_fresh_noise(monkeypatch, solver, t):
    first, second = LH[t]
    ours = w2(gains(monkeypatch, LH[t], solver, fill="white"), POWER)
    times = shifted_times(1, t, first.steps, 3)
    theirs = w2(tweedie(solver, times, POWER[:16, :16] / 4, POWER, shifted_times(t, 0, second.steps, 1.5)), POWER)
    assert ours <= 0.5 * theirs


def test_matched_noise_makes_late_switches_possible(monkeypatch):
    white, matched = (w2(gains(monkeypatch, LH[0.3], fill=f), POWER) for f in ("white", "matched"))
    assert matched <= 0.1 * white


@pytest.mark.parametrize("stages", [HLH, LH[0.7], LH[0.5]], ids=["hlh", "lh .7", "lh .5"])
def test_memory_keeps_the_picture_of_the_seed(monkeypatch, stages):
    """Paired error to the full-size run of the same noise at most 0.05 of that with a white band."""
    plain = solved("dpmpp", shifted_times(1, 0, 1000, 3), POWER, np.ones((1, *SIZE)))[0]
    white, memory = (paired(gains(monkeypatch, stages, fill=f), plain) for f in ("white", "memory"))
    assert memory <= 0.05 * white


@pytest.mark.parametrize("t", [0.5, 0.3])
def test_the_certificate_is_what_is_lost(monkeypatch, t):
    """2,000 calls on a smaller field: predicted W2 and missing power against measured, to 1 %."""
    stages = [Stage(0.5, 1000, t_end=t, shift=3), Stage(1, 1000, shift=1.5)]
    found = gains(monkeypatch, stages, size=(12, 12), fill="white")
    power = SPECTRUM.power((12, 12))
    lost, distance = missing(power, (6, 6), 2 * t / (1 - t))
    variance = (found**2).sum(0)
    new = np.ones((12, 12), dtype=bool)
    new[:6, :6] = False
    assert w2(found, power) == pytest.approx(distance, rel=0.01)
    assert 1 - variance[new].sum() / power[new].sum() == pytest.approx(lost, rel=0.01)


def test_carried_history_helps(monkeypatch):
    reset, carry = (w2(gains(monkeypatch, HLH, history=h), POWER) for h in ("reset", "carry"))
    assert carry < 0.9 * reset
    assert w2(gains(monkeypatch, HLH), POWER) == pytest.approx(carry, rel=1e-12)  # the default with memory
    matched = {h: w2(gains(monkeypatch, HLH, fill="memory_matched", history=h), POWER) for h in (None, "reset")}
    assert matched[None] == pytest.approx(matched["reset"], rel=1e-12)


def test_a_split_without_a_change_of_size_changes_nothing():
    """The end of a stage is not taken for the end of the run: two stages of one size are the plain run."""
    base = TableScheduler(path="flow", sampler="dpmpp", sampler_options={"order": 3})
    base.set_timesteps(12)
    grid = [flow_time(n.level) for n in base._runs.need().nodes]
    scheduler = staged([Stage(1, 5, t_end=grid[5]), Stage(1, 7)], base, spectrum=None)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    field = Field(SPECTRUM.power((8, 8)))
    ours = run_field(scheduler, field, x)
    for t, s in zip(grid, base.timesteps, strict=False):
        x = base.step((x - idct(field.clean(dct(x), t))) / t, s, x).prev_sample
    np.testing.assert_allclose(ours, dct(x)[:, 0].numpy(), rtol=0, atol=1e-12)


PATHS = {
    "flow": {},
    "vp": {"prediction_type": "sample"},
    "edm": {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
}


@pytest.mark.parametrize("family", ["vp", "edm"])
@pytest.mark.parametrize("fill", ["memory", "white"])
def test_the_same_run_on_every_path(family, fill):
    """Equal levels give equal y = x/alpha on flow, VP and EDM paths."""
    stages = [Stage(1, 3, t_start=0.9, t_end=0.8, shift=2), Stage(0.5, 5, t_end=0.5, shift=2), Stage(1, 4, shift=1.5)]
    field, y = Field(SPECTRUM.power((16, 12))), 9 * torch.randn(2, 1, 16, 12, dtype=torch.float64)
    found = {}
    for name in ("flow", family):
        base = TableScheduler(path=name, sampler="dpmpp", **PATHS[name])
        scheduler = staged(stages, base, fill=fill, spectrum=None)
        scheduler.set_timesteps(12)
        scheduler.resize_to((16, 12))
        x, noise = scheduler.run.nodes(0)[0].alpha * y, torch.Generator().manual_seed(3)
        for _ in range(12):
            run = scheduler.run
            node = run.nodes(run.stage)[run.counter - run.first]
            x0 = idct(clean_of(field, dct(x / node.alpha), node.level))
            x = scheduler.step(output_for(base, node, x, x0), None, x, generator=noise, return_dict=False)[0]
        found[name] = x
    torch.testing.assert_close(found["flow"], found[family], rtol=0, atol=1e-8)


def clean_of(field, y, rho):
    """E[x0 | y] mode by mode."""
    h, w = y.shape[-2:]
    p = torch.from_numpy(h * w / field.power.size * field.power[:h, :w])
    return p / (p + rho * rho) * y


def output_for(base, node, x, x0):
    """What the model of this scheduler returns where its x0-prediction is x0."""
    u, w = pair(output_of(base.config), "x0", node)
    return (x0 - u * x) / w


# ---------------------------------------------------------------------- what pipelines rely on
def latents_run(scheduler, x, calls=25, seed=None):
    """A run with a cheap stand-in for a model; the states after each call."""
    scheduler.set_timesteps(calls)
    states = [x]
    for t in scheduler.timesteps:
        seen = states[-1]
        states.append(scheduler.step(0.3 * torch.tanh(seen) + 0.001 * float(t) / 1000, t, seen, return_dict=False)[0])
    return states


def test_calls_levels_and_sizes():
    scheduler = staged(HLH, spectrum=None)
    states = latents_run(scheduler, torch.randn(2, 4, 32, 24))
    assert len(scheduler.timesteps) == 25 == scheduler.num_inference_steps and len(scheduler.sigmas) == 26
    assert [tuple(s.shape[-2:]) for s in states] == [(32, 24)] * 4 + [(16, 12)] * 13 + [(32, 24)] * 9
    fed = scheduler.timesteps.tolist()
    assert fed[0] == 1000 and fed[4] < 950 and fed[17] > 500  # the second start is aligned: 2/3 after .5
    assert fed[17] == pytest.approx(1000 * 2 / 3, abs=1e-3) and scheduler.sigmas[-1] == 0
    assert scheduler.sigmas[:-1].tolist() == pytest.approx([t / 1000 for t in fed])
    assert [s.r for s in scheduler.run.switches] == [0.5, 2.0]


def test_levels_follow_the_real_size():
    """17x25 halves to 8x12: the aligned start uses the real ratio, in the tensor that the pipeline iterates over."""
    scheduler = staged(HLH, spectrum=None)
    scheduler.set_timesteps(25)
    held = scheduler.timesteps
    x = torch.randn(1, 4, 17, 25)
    for t in held:
        x = scheduler.step(0.1 * x, t, x, return_dict=False)[0]
    r = math.sqrt(17 * 25 / (8 * 12))
    assert held is scheduler.timesteps
    assert float(held[4]) == pytest.approx(1000 * flow_time(0.95 / 0.05 / r), abs=1e-3)


@pytest.mark.parametrize("fill", ["white", "memory"])
def test_an_image_does_not_depend_on_its_batch(fill):
    x = torch.randn(3, 4, 16, 16)
    together = latents_run(staged(HLH, spectrum=None, fill=fill), x)[-1]
    alone = latents_run(staged(HLH, spectrum=None, fill=fill), x[1:2])[-1]
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)
    again = latents_run(staged(HLH, spectrum=None, fill=fill), x)[-1]
    assert torch.equal(together, again)


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    latents_run(staged(HLH, spectrum=None, fill="white"), x)
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_is_reported_and_let_go():
    scheduler = staged(HLH, spectrum=None)
    latents_run(scheduler, torch.randn(1, 4, 16, 16))
    run = scheduler.run
    assert run.memory is None and run.stored == 8 * (4 * 256 + 256)
    assert not any(s.drew for s in run.switches)
    assert len(run.seconds) == 3 and all(s > 0 for s in run.seconds)


def test_certificate_in_the_run():
    scheduler = staged(HLH, fill="white")
    latents_run(scheduler, torch.randn(1, 1, *SIZE))
    down, up = scheduler.run.switches
    assert down.missing is None and (up.missing, up.w2) == missing(POWER, (16, 16), 2.0)


def test_delta_rule_decides_the_end():
    scheduler = staged([Stage(0.5, 6), Stage(1, 6)])
    scheduler.set_timesteps(12)
    scheduler.resize_to((64, 64))
    t = float(scheduler.run.legs[0].times[-1])
    assert missing(SPECTRUM.power((64, 64)), (32, 32), 2 * t / (1 - t))[0] == pytest.approx(0.01, rel=1e-6)


def test_renoise():
    """Each stage runs to the end; the clean latent is resized and noised to its strength."""
    stages = [Stage(1, 2, shift=9), Stage(0.5, 3, t_start=0.8, shift=6), Stage(1, 2, t_start=0.6, shift=9)]
    for kernel in ("spectral", "bicubic"):
        scheduler = staged(stages, spectrum=None, transition="renoise", resize=kernel)
        states = latents_run(scheduler, torch.randn(1, 4, 16, 16), 7)
        assert scheduler.timesteps[2] == pytest.approx(800) and scheduler.timesteps[5] == pytest.approx(600)
        assert all(s.rho == 0 and s.drew for s in scheduler.run.switches) and torch.isfinite(states[-1]).all()


def test_threads():
    scheduler = staged(HLH, spectrum=None)
    starts = [torch.randn(1, 4, 16, 16) for _ in range(8)]
    serial = [latents_run(scheduler, x)[-1] for x in starts]
    found = {}
    work = [
        threading.Thread(target=lambda i=i: found.update({i: latents_run(scheduler, starts[i])[-1]})) for i in range(8)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert all(torch.equal(found[i], serial[i]) for i in range(8))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_share_no_run(copied):
    scheduler, x = staged(HLH, spectrum=None), torch.randn(1, 4, 16, 16)
    want = latents_run(scheduler, x)[-1]
    twin = copied(scheduler)
    with pytest.raises(RunError, match="call set_timesteps"):
        twin.step(x, 0, x)
    assert torch.equal(latents_run(twin, x)[-1], want)


def test_save_and_load(tmp_path):
    scheduler = staged(HLH, TableScheduler(path="flow", sampler="unipc", sampler_options={"order": 3}, shift=2.0))
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "StagedScheduler"
    loaded = StagedScheduler.from_pretrained(tmp_path)
    x = torch.randn(1, 4, 16, 16)
    assert torch.equal(latents_run(loaded, x)[-1], latents_run(scheduler, x)[-1])
    assert loaded.stages == scheduler.stages and loaded.config.num_train_timesteps == 1000
    assert loaded.base.config.sampler_options == {"order": 3}


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        ([Stage(1, 3, t_end=0.8), Stage(0.5, 3)], {}, "last stage must have scale 1.0"),
        ([Stage(1, 3), Stage(0.5, 3, t_end=0.5), Stage(1, 3)], {}, "stage 0 needs t_end"),
        ([Stage(0.5, 3, t_end=0.5), Stage(1, 3, t_end=0.1)], {}, "leave its t_end out"),
        ([Stage(0.5, 3), Stage(1, 3)], {"spectrum": None}, "need the spectrum"),
        (HLH, {"spectrum": None, "fill": "matched"}, "need the spectrum"),
        (HLH, {"fill": "pink"}, "unknown fill"),
        (HLH, {"history": "keep"}, "unknown history"),
        (HLH, {"resize": "bicubic"}, "resize has an effect only"),
        (HLH, {"transition": "renoise"}, "leave t_end out"),
        ([Stage(0.5, 3), Stage(1, 3)], {"transition": "renoise"}, "needs t_start"),
        ([Stage(0.5, 3), Stage(1, 3, t_start=0.5)], {"transition": "renoise", "fill": "white"}, "have no effect"),
        (HLH, {"spectrum": vars(Spectrum(1.0, 2.0, 8, 8, r2=0.5))}, r"R\^2 = 0.500, below 0.9"),
    ],
)
def test_options_that_make_no_run(stages, options, message):
    with pytest.raises(OptionError, match=message):
        staged(stages, **options)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [Stage(1, 3, t_end=0.2), Stage(0.5, 3, t_start=0.05, t_end=0.01), Stage(1, 3)],
            "going below takes model calls",
        ),
        ([Stage(0.5, 3, t_end=0.5), Stage(1, 3, t_start=0.5)], "going below takes"),
        ([Stage(1, 3, t_end=0.5), Stage(0.5, 3, t_end=0.6), Stage(1, 3)], "must fall"),
    ],
)
def test_levels_that_make_no_run(stages, message):
    scheduler = staged(stages)
    with pytest.raises(OptionError, match=message):
        scheduler.set_timesteps(scheduler.num_inference_steps)


def test_more_noise_than_the_model_knows():
    """Going up raises the level; a VP model knows rho up to 14.6."""
    base = TableScheduler(path="vp", sampler="dpmpp")
    scheduler = staged([Stage(0.5, 3, t_start=0.93, t_end=0.92), Stage(1, 3)], base)
    with pytest.raises(OptionError, match="the most noise that the model was trained on"):
        scheduler.set_timesteps(6)


def test_the_start_of_the_grid_is_named():
    base = TableScheduler(path="vp", sampler="dpmpp", grid="leading")
    with pytest.raises(OptionError, match="the grid 'leading' begins at"):
        staged(HLH, base).set_timesteps(25)


def test_another_number_of_calls():
    with pytest.raises(OptionError, match=r"make 25 model calls .* is 20"):
        staged(HLH).set_timesteps(20)


def test_custom_levels():
    with pytest.raises(OptionError, match="leave sigmas and timesteps out"):
        staged(HLH).set_timesteps(25, sigmas=np.linspace(1, 0.5, 25))
    staged(HLH).set_timesteps(sigmas=np.linspace(1, 1 / 25, 25))


def test_begin_index():
    scheduler = staged(HLH)
    scheduler.set_begin_index(0)
    with pytest.raises(OptionError, match="not at 3"):
        scheduler.set_begin_index(3)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2s"])
def test_samplers_of_several_calls(sampler):
    with pytest.raises(OptionError, match="several calls on an interval"):
        staged(HLH, TableScheduler(path="flow", sampler=sampler))


def test_rewriters_are_refused():
    import diffaccel

    base = TableScheduler(path="vp", sampler="ddim", rewrite=[diffaccel.epsilon_scale(1.01)])
    with pytest.raises(OptionError, match="without rewrite="):
        staged(HLH, base)


def test_a_carry_that_cannot_be():
    scheduler = staged(HLH, TableScheduler(path="flow", sampler="deis"), history="carry", spectrum=None)
    with pytest.raises(RunError, match="use 'reset' here"):
        latents_run(scheduler, torch.randn(1, 4, 16, 16))


def test_tokens_without_the_hook():
    scheduler = staged(HLH, packing=True, spectrum=None)
    scheduler.set_timesteps(25)
    with pytest.raises(RunError, match="wrap the loaded pipeline"):
        scheduler.step(torch.randn(1, 64, 16), 0, torch.randn(1, 64, 16))


def test_a_state_of_another_size():
    scheduler = staged(HLH, spectrum=None)
    scheduler.set_timesteps(25)
    x = torch.randn(1, 4, 16, 16)
    scheduler.step(x, 0, x)
    with pytest.raises(RunError, match="works at latents of 16x16"):
        scheduler.step(x[..., :8], 0, x[..., :8])
