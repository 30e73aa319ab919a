"""`set_timesteps`: who decides the nodes, in which form, and which contradictions are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_runs import PATHS, SD, cases, generator, loop, make, model, noise, sampled

from diffaccel import TableScheduler
from diffaccel.core.grid import GRIDS
from diffaccel.errors import DiffaccelError, OptionError, PathError, RunError

X = noise(1, 4, 4, 4)
FORMS = {
    "list": list,
    "tuple": tuple,
    "numpy": np.array,
    "float32": lambda v: np.array(v, np.float32),
    "tensor": torch.tensor,
}


def dynamic(**changes):
    config = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, **changes}
    return TableScheduler.from_config(FlowMatchEulerDiscreteScheduler(**config).config, sampler="ddim")


# ---------------------------------------------------------------------- lists of the user
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_timesteps_in_every_form(form):
    scheduler = make()
    scheduler.set_timesteps(timesteps=form([900, 500, 200, 20]))
    assert scheduler.timesteps.tolist() == [900, 500, 200, 20]
    assert scheduler.num_inference_steps == 4
    acp = scheduler.alphas_cumprod.double()[[900, 500, 200, 20]]
    assert torch.allclose(scheduler.sigmas[:-1].double(), ((1 - acp) / acp).sqrt(), rtol=1e-6)
    assert scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_sigmas_in_every_form_with_or_without_the_closing_zero(form):
    one, two, three = make(), make(), make()
    one.set_timesteps(sigmas=form([10.0, 3.0, 0.5]))
    two.set_timesteps(3, sigmas=form([10.0, 3.0, 0.5, 0.0]))
    assert one.sigmas.tolist() == [10.0, 3.0, 0.5, 0.0]
    assert one.table == two.table
    three.set_timesteps(timesteps=one.timesteps)
    assert torch.allclose(three.sigmas, one.sigmas, rtol=1e-5)


def test_flow_sigmas_are_shifted_and_flow_timesteps_are_not():
    scheduler = make("flow")
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.1])
    assert np.allclose(scheduler.sigmas, [3 * s / (1 + 2 * s) for s in (0.9, 0.5, 0.1)] + [0.0])
    assert np.allclose(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    scheduler.set_timesteps(timesteps=[900.0, 500.0, 100.0])
    assert np.allclose(scheduler.sigmas, [0.9, 0.5, 0.1, 0.0])
    assert np.allclose(scheduler.timesteps, [900, 500, 100])


@pytest.mark.parametrize("path", PATHS)
def test_sigmas_and_timesteps_together(path):
    """The sigmas place the nodes, the timesteps are what the model is fed, as in FlowMatchEuler and AnyFlow."""
    both, alone = make(path), make(path)
    sigmas = [0.8, 0.4, 0.1]
    both.set_timesteps(3, sigmas=sigmas, timesteps=[7, 5, 3])
    alone.set_timesteps(sigmas=sigmas)
    assert both.timesteps.tolist() == [7, 5, 3]
    assert torch.equal(both.sigmas, alone.sigmas)
    fed = []
    loop(both, X, predict=lambda x, t: fed.append(float(t)) or model(x, t))
    assert fed == [7, 5, 3]
    constant = dict(predict=lambda x, t: model(x, 0.0))
    both.set_timesteps(sigmas=sigmas, timesteps=[7, 5, 3])
    assert torch.equal(loop(both, X, **constant), loop(alone, X, **constant))


def test_ramp_of_flow_pipelines_leaves_the_choice_to_the_grid():
    ramp = np.linspace(1.0, 1 / 6, 6)
    scheduler = make("flow", settings={"grid": "karras"})
    scheduler.set_timesteps(6)
    by_grid = scheduler.table
    scheduler.set_timesteps(sigmas=ramp)
    assert scheduler.table == by_grid
    scheduler.set_timesteps(sigmas=ramp * 0.99)
    assert np.allclose(scheduler.sigmas[:-1], 3 * 0.99 * ramp / (1 + 2 * 0.99 * ramp))


# ---------------------------------------------------------------------- contradictions and bad values
@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({}, "needs num_inference_steps, sigmas or timesteps"),
        ({"num_inference_steps": 0}, "integer of 1 or more, got 0"),
        ({"num_inference_steps": -3}, "integer of 1 or more, got -3"),
        ({"num_inference_steps": 2.5}, "integer of 1 or more, got 2.5"),
        ({"num_inference_steps": True}, "integer of 1 or more, got True"),
        (
            {"num_inference_steps": 4, "timesteps": [900, 500, 100]},
            "disagree.*'timesteps': 3.*'num_inference_steps': 4",
        ),
        ({"num_inference_steps": 2, "sigmas": [3.0, 2.0, 1.0]}, "disagree.*'sigmas': 3"),
        ({"sigmas": [3.0, 1.0], "timesteps": [900]}, "disagree"),
        ({"timesteps": []}, "1 or more"),
        ({"sigmas": []}, "1 or more"),
        ({"timesteps": [100, 500, 900]}, "noise must fall.*t = 100.*t = 500"),
        ({"sigmas": [1.0, 2.0]}, "noise must fall"),
        ({"sigmas": [1.0, 0.0, 0.0]}, "positive, but for one 0 at the end"),
        ({"sigmas": [1.0, -1.0]}, "finite values of 0 or more"),
        ({"sigmas": [math.inf, 1.0]}, "finite"),
        ({"timesteps": [math.nan]}, "finite"),
        ({"timesteps": [1000]}, r"t = 1000.* outside the training steps 0\.\.999"),
        ({"timesteps": [[900, 500]]}, "one-dimensional"),
        ({"sigmas": "karras"}, "numbers"),
        ({"num_inference_steps": 1001}, "1000 training steps"),
    ],
    ids=str,
)
def test_bad_arguments_say_what_is_wrong(given_, message):
    with pytest.raises((OptionError, PathError), match=message):
        make(settings={"grid": "trailing"}).set_timesteps(**given_)


def test_flow_values_outside_the_path():
    with pytest.raises(OptionError, match=r"flow sigmas lie in \(0, 1\], got 1.5"):
        make("flow").set_timesteps(sigmas=[1.5, 0.5])
    with pytest.raises(PathError, match=r"t = 1500.* lies outside 0..1000"):
        make("flow").set_timesteps(timesteps=[1500.0, 500.0])


# ---------------------------------------------------------------------- mu
def test_dynamic_shift_needs_mu():
    with pytest.raises(OptionError, match=r"mu.*base_image_seq_len, max_image_seq_len, base_shift and max_shift"):
        dynamic().set_timesteps(4)
    scheduler = dynamic()
    scheduler.set_timesteps(4, mu=0.8)
    u = np.linspace(1, 1 / 4, 4)
    assert np.allclose(scheduler.sigmas[:-1], math.exp(0.8) / (math.exp(0.8) + 1 / u - 1))
    assert scheduler.config.shift == 1.0 and "mu" not in scheduler.config


def test_mu_is_ignored_without_dynamic_shift_and_belongs_to_its_run():
    static = make("flow")
    static.set_timesteps(4, mu=0.8)
    with_mu = static.table
    static.set_timesteps(4)
    assert static.table == with_mu
    scheduler = dynamic()
    scheduler.set_timesteps(4, mu=0.8)
    first = scheduler.table
    scheduler.set_timesteps(4, mu=1.1)
    assert scheduler.table != first
    with pytest.raises(OptionError, match="mu"):
        scheduler.set_timesteps(4)


# ---------------------------------------------------------------------- values written into `sigmas`
def test_sigmas_edited_in_place_are_honoured():
    """Cosmos 2 writes `sigmas[-1] = sigmas[-2]` after set_timesteps."""
    edited, whole = make("edm", "ddim"), make("edm", "ddim")
    edited.set_timesteps(5)
    edited.sigmas[-1] = edited.sigmas[-2]
    out = loop(edited, X)
    assert "sigmas were edited after set_timesteps; compiled again" in edited.explain()
    whole.set_timesteps(5)
    x = X
    for t in whole.timesteps[:4]:
        x = whole.step(model(whole.scale_model_input(x, t), t), t, x)[0]
    assert torch.allclose(out, x, atol=1e-6)  # the last call changes nothing any more


@pytest.mark.parametrize("path", ["sd15", "flow", "edm"])
def test_an_edited_level_moves_its_node(path):
    scheduler = make(path)
    scheduler.set_timesteps(5)
    value = 0.5 * float(scheduler.sigmas[2] + scheduler.sigmas[3])
    scheduler.sigmas[2] = value
    loop(scheduler, X)
    node = scheduler.table.rows[2].node
    assert math.isclose(node.sigma if path == "flow" else node.level, value, rel_tol=1e-6)


def test_edits_that_no_run_can_have():
    scheduler = make()
    scheduler.set_timesteps(4)
    scheduler.sigmas[1] = scheduler.sigmas[0] * 2
    with pytest.raises(OptionError, match="edited sigmas: noise must fall"):
        scheduler.step(X, scheduler.timesteps[0], X)
    heun = make(sampler="heun")
    heun.set_timesteps(5)
    heun.sigmas[2] = heun.sigmas[3]
    with pytest.raises(OptionError, match="pass sigmas= to set_timesteps"):
        heun.step(X, heun.timesteps[0], X)
    scheduler.set_timesteps(4)
    with pytest.raises(RunError, match="5 values"):
        scheduler.sigmas = torch.ones(3)


@pytest.mark.parametrize("origin", ["config", "pipeline"])
def test_final_sigmas_type_of_cosmos(origin):
    """Its `__init__` registers `final_sigmas_type` after the scheduler was made: read in set_timesteps, not before."""
    scheduler = make("edm", settings={"final_sigmas_type": "sigma_min"} if origin == "config" else None)
    scheduler.register_to_config(final_sigmas_type="sigma_min", sigma_max=40.0)
    scheduler.set_timesteps(5)
    assert scheduler.sigmas[0] == 40 and math.isclose(scheduler.sigmas[-1], 0.002, rel_tol=1e-6)
    assert torch.isfinite(loop(scheduler, X)).all()


# ---------------------------------------------------------------------- duplicates
@pytest.mark.parametrize("path", PATHS)
def test_repeated_timesteps_spend_a_call_and_change_nothing(path):
    double, single = make(path), make(path)
    single.set_timesteps(5)
    t = single.timesteps.tolist()
    double.set_timesteps(timesteps=[t[0], t[0], t[1], t[2], t[2], t[2], t[3], t[4]])
    single.set_timesteps(timesteps=t)
    assert torch.allclose(loop(double, X), loop(single, X), rtol=1e-5, atol=1e-5)
    assert double.step_index == 8


@pytest.mark.parametrize(("calls", "grid"), [(60, "leading"), (60, "trailing"), (1000, "linspace")])
def test_grids_whose_rounding_repeats_a_step(calls, grid):
    scheduler = make(settings={"grid": grid, "trained_betas": [0.02] * 1000})
    scheduler.set_timesteps(calls)
    assert len(scheduler.timesteps) == calls == len(scheduler.sigmas) - 1


# ---------------------------------------------------------------------- what pipelines read
def test_attributes_before_and_after():
    scheduler = make()
    assert len(scheduler.timesteps) == 1000 and len(scheduler.sigmas) == 1001 and len(scheduler) == 1000
    assert scheduler.num_inference_steps is scheduler.step_index is scheduler.begin_index is None
    scheduler.set_timesteps(7, device="cpu")
    assert scheduler.timesteps.shape == (7,) and scheduler.timesteps.dtype == torch.int64
    assert scheduler.sigmas.shape == (8,) and scheduler.sigmas.dtype == torch.float32
    assert scheduler.sigmas.device.type == "cpu"
    assert (scheduler.num_inference_steps, scheduler.step_index, scheduler.begin_index) == (7, None, None)
    assert torch.allclose(scheduler.alphas_cumprod, EulerDiscreteScheduler(**SD).alphas_cumprod)
    for path in ("flow", "edm"):
        with pytest.raises(AttributeError, match="alphas_cumprod"):
            make(path).alphas_cumprod  # noqa: B018
        assert not hasattr(make(path), "betas")


def test_initial_level():
    for path, sigma in (("sd15", 1.0), ("flow", 1.0), ("edm", math.hypot(80.0, 1.0))):
        scheduler = make(path)
        scheduler.set_timesteps(4)
        assert math.isclose(scheduler.init_noise_sigma, sigma)


SAMPLERS = cases(variants=False)
OPEN = sorted(set(GRIDS) - {"ays", "beta", "listed", "by_calls"})


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.sampled_from(sorted(PATHS)), st.sampled_from(OPEN), st.sampled_from(SAMPLERS), st.data())
def test_every_run_makes_its_calls_and_stays_finite(calls, path, grid, case, data):
    final = data.draw(st.sampled_from(["zero", "sigma_min"]))
    begin = data.draw(st.integers(0, calls - 1))
    try:
        scheduler = make(path, case[0], {"grid": grid, "final_sigmas_type": final}, **case[1])
        scheduler.set_timesteps(calls)
    except DiffaccelError as error:
        assert (grid.startswith("flow_") and path != "flow") or "cannot do a run" in str(error), error
        return
    scheduler.set_begin_index(begin)
    seen = []
    out = loop(scheduler, X, begin, predict=lambda x, t: seen.append(t) or model(x, t), generator=generator())
    assert len(seen) == calls - begin == len(scheduler.timesteps) - begin
    assert torch.isfinite(out).all()
    assert float(out.abs().max()) < 1e4


def test_a_run_does_not_touch_the_config():
    for path in PATHS:
        scheduler = make(path)
        before = dict(scheduler.config)
        sampled(scheduler, X, 3)
        assert dict(scheduler.config) == before
