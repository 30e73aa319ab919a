"""Staged sampling against an independent reference in float64 (tests/golden/staged)."""

from __future__ import annotations

import golden_data
import numpy as np
import pytest
import torch

from diffaccel.core.stages import Spectrum, level, missing, ratio, shifted_times, switch_time
from diffaccel.schedulers.resize import Memory, dct, packed, transition, unpacked

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
