"""Staged sampling against an independent reference in float64 (tests/golden/staged)."""

from __future__ import annotations

import json
from functools import partial

import golden_data
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from staged_field import Field, run_field, unit_noise, unit_start

from diffaccel.core.stages import Spectrum, Stage, level, missing, ratio, shifted_times, switch_time
from diffaccel.schedulers import TableScheduler
from diffaccel.schedulers.resize import Memory, dct, packed, transition, unpacked
from diffaccel.schedulers.staged import StagedScheduler

FOLDER = "staged"
EXACT = 1e-9


@pytest.mark.parametrize("path", golden_data.cases(FOLDER, "delta_rule*.npz"), ids=golden_data.name)
def test_delta_rule(path):
    """When to switch, and what is lost there."""
    data = golden_data.load(path)
    names = [str(name) for name in data["columns"]]
    for row in data["rows"]:
        case = dict(zip(names, (float(v) for v in row), strict=True))
        low, high = (int(case["h"]), int(case["w"])), (int(case["H"]), int(case["W"]))
        field = Spectrum(case["A"], case["beta"], *high)
        t = switch_time(field, low, high, case["delta"])
        assert t == pytest.approx(case["t_end_missing_rule"], abs=EXACT)
        lost, w2 = missing(field.power(high), low, ratio(low, high) * level(t))
        assert lost == pytest.approx(case["missing_at_t_end"], abs=EXACT)
        assert w2 == pytest.approx(case["w2_per_element"], rel=1e-7, abs=EXACT * 1e-3)
        assert switch_time(field, low, high, case["delta"], "speed") == pytest.approx(case["t_speed_rule"], abs=EXACT)


@pytest.mark.parametrize("path", golden_data.cases(FOLDER, "stage_grids*.npz"), ids=golden_data.name)
def test_grids(path):
    data = golden_data.load(path)
    for key in (k for k in data if not k.endswith("_args")):
        start, end, n, shift = data[f"{key}_args"]
        np.testing.assert_allclose(shifted_times(start, end, int(n), shift), data[key], rtol=0, atol=EXACT)


def forms(data):
    """(state, (alpha, sigma)) before and after each change of size, on the paths that the file has."""
    t, t_out = data["t"], data["t_out"]
    rho, rho_out = data["rho"], data["rho_out"]
    yield data["y"], (1.0, rho), data["y_out"], (1.0, rho_out)
    yield data["x_flow"], (1 - t, t), data["x_flow_out"], (1 - t_out, t_out)
    vp, vp_out = 1 / np.sqrt(1 + rho**2), 1 / np.sqrt(1 + rho_out**2)
    yield data["x_vp"], (vp, rho * vp), data["x_vp_out"], (vp_out, rho_out * vp_out)


RESIZED = [path for path in golden_data.cases(FOLDER, "transition_*.npz") if "y_out" in golden_data.load(path)]
BY_NOISE = [path for path in RESIZED if "z" in golden_data.load(path)]
BY_MEMORY = [path for path in RESIZED if "y_before_down" in golden_data.load(path)]


@pytest.mark.parametrize("path", BY_NOISE, ids=golden_data.name)
def test_transition(path):
    data = golden_data.load(path)
    size = tuple(int(n) for n in data["hw"])
    assert ratio(data["y"].shape[-2:], size) == pytest.approx(float(data["r"]), rel=1e-14)
    for x, node, out, to in forms(data):
        got = transition(
            torch.from_numpy(x), tuple(map(float, node)), tuple(map(float, to)), size,
            draw=lambda shape: torch.from_numpy(data["z"]).clone(),
        )  # fmt: skip
        np.testing.assert_allclose(got.numpy(), out, rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", BY_MEMORY, ids=golden_data.name)
def test_transition_with_memory(path):
    """Down, a change of the low state, and up again from the stored coefficients."""
    data = golden_data.load(path)
    y, rho_d = torch.from_numpy(data["y_before_down"]), float(data["rho_d"])
    low, high = tuple(int(n) for n in data["hw_low"]), tuple(y.shape[-2:])

    def never(shape):
        raise AssertionError("memory covers the whole band")

    down = transition(y, (1.0, rho_d), (1.0, ratio(high, low) * rho_d), low, draw=never)
    np.testing.assert_allclose(down.numpy(), data["y_low"], rtol=0, atol=1e-10)
    later, rho = torch.from_numpy(data["y_low_later"]), float(data["rho_low_later"])
    np.testing.assert_allclose(later.numpy(), float(data["gain"]) * down.numpy(), rtol=0, atol=1e-10)
    to = (1.0, float(data["rho_out"]))
    up = transition(later, (1.0, rho), to, high, fill="memory", memory=Memory.of(dct(y), rho_d), draw=never)
    np.testing.assert_allclose(up.numpy(), data["y_out"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", golden_data.cases(FOLDER, "packing*.npz"), ids=golden_data.name)
def test_packing(path):
    data = golden_data.load(path)
    x = torch.from_numpy(data["x"])
    np.testing.assert_array_equal(packed(x).numpy(), data["packed"])
    np.testing.assert_array_equal(unpacked(torch.from_numpy(data["packed"]), tuple(x.shape[-2:])).numpy(), data["x"])


# ---------------------------------------------------------------------- whole runs on the exact Gaussian field
def staged(stages, base, settings, **options):
    h, w, a, beta = settings["field"]
    made = [Stage(s, n, t_end=t or None, shift=shift).to_config() for s, n, t, shift in stages]
    spectrum = {"a": a, "beta": beta, "height": int(h), "width": int(w)}
    return StagedScheduler(base_config=dict(base.config), stages=made, spectrum=spectrum, **options)


def own(solver):
    return TableScheduler(path="flow", sampler=solver, check_finite="never")


def of_diffusers():
    """What `bottleneck` makes of a pipeline's DPMSolverMultistepScheduler."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2}
    theirs = DPMSolverMultistepScheduler(**flow, final_sigmas_type="zero", lower_order_final=True)
    return TableScheduler.from_config(theirs.config, check_finite="never")


def settings_of(path):
    return json.loads((path.parent / "gauss_settings.json").read_text())


def variance_cases():
    for path in golden_data.cases(FOLDER, "gauss.npz"):
        with np.load(path) as data:
            for key in data.files:
                if key.endswith("__var"):
                    yield pytest.param(path, key, id=key.removesuffix("__var"))


@pytest.mark.parametrize("base", [partial(own, "dpmpp"), of_diffusers], ids=["own", "diffusers"])
@pytest.mark.parametrize(("path", "key"), list(variance_cases()))
def test_variance_of_every_mode(path, key, base, monkeypatch):
    """Start noise in image 0; the draw of transition k in image k, as the unit matrix of independent noises."""
    _, name, fill, history, _ = key.split("__")
    data, settings = golden_data.load(path), settings_of(path)
    stages = settings["stages"][name]
    scheduler = staged(stages, base(), settings, fill=fill, history=history)
    unit_noise(monkeypatch)
    gains = run_field(scheduler, Field(data["P"]), unit_start(len(stages), data["P"].shape))
    np.testing.assert_allclose((gains**2).sum(0), data[key], rtol=EXACT, atol=EXACT)


def seed_cases():
    for path in golden_data.cases(FOLDER, "gauss_seed_fill*.npz"):
        with np.load(path) as data:
            for key in data.files:
                if key.endswith("__gain"):
                    yield pytest.param(path, key, id=key.removesuffix("__gain"))


@pytest.mark.parametrize(("path", "key"), list(seed_cases()))
def test_low_first_from_the_seed(path, key):
    """The result belongs to the full-size start noise: gain * E, whatever the noise."""
    name, history, _ = key.split("__")
    data, settings = golden_data.load(path), settings_of(path)
    stages, gain = settings["stages"][name], data[key]
    noise = torch.randn(3, 1, *gain.shape, dtype=torch.float64)
    scheduler = staged(stages, own("dpmpp"), settings, history=history)
    field = Field(Spectrum.of(scheduler.spectrum).power(gain.shape))
    out = run_field(scheduler, field, noise)
    np.testing.assert_allclose(out, gain * dct(noise)[:, 0].numpy(), rtol=0, atol=EXACT)
    assert not any(switch.drew for switch in scheduler.run.switches)
