"""Staged sampling against an independent reference in float64 (tests/golden/staged)."""

from __future__ import annotations

import math

import golden_data
import numpy as np
import pytest

from diffaccel.core.stages import Spectrum, flow_time, level, missing, ratio, shifted_times, switch_time

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
