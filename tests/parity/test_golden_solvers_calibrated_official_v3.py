"""DPM-Solver-v3 against the states of its authors' code after every corrector (tests/golden/...)."""

from __future__ import annotations

import re

import golden_data
import numpy as np
import pytest
from golden_calibrated import FOLDER, Mixture, build_nodes

from diffaccel.core.prediction import Prediction, convert
from diffaccel.core.quad import Ems
from diffaccel.samplers.registry import get

V3 = get("dpm_v3")
NAME = re.compile(
    r"traj_N(?P<n>\d+)_(?P<skip>\w+?)_o(?P<order>\d)_pp(?P<pp>[01])_c(?P<c>[01])_cp(?P<cp>[01])_lof(?P<lof>[01])"
    r"_half(?P<half>[01])_deg(?P<deg>[01])"
)


def v3_cases():
    for path in golden_data.cases(FOLDER, "dpm_v3_*.npz"):
        with np.load(path) as data:
            names = [NAME.fullmatch(key) for key in data.files if key.startswith("traj_")]
        assert names and all(names), f"{path.name}: a trajectory whose name does not say its options"
        for m in names:
            yield pytest.param(path, m, id=f"{path.stem[7:]}-{m[0][5:]}")


def family(path):
    return path.stem.removeprefix("dpm_v3_")


def statistics(data, degenerate):
    l, s, b = data["l"], data["s"], data["b"]
    return Ems(data["lam_stat"], 0 * l + 1, 0 * s, 0 * b) if degenerate else Ems(data["lam_stat"], l, s, b)


def options_of(case, data, nodes, times):
    """The code's flags in our words: c_pseudo is one order more and pseudo derivatives; half: where t > 0.5."""
    found = {
        "order": int(case["order"]),
        "corrector": ("plus" if case["cp"] == "1" else "same") if case["c"] == "1" else None,
        "lower_order_final": case["lof"] == "1",
        "snap": True,
        "quadrature": "trapezoid",
        "statistics": statistics(data, case["deg"] == "1"),
    }
    found["pseudo"] = ["predictor"] * (case["pp"] == "1") + ["corrector"] * (case["cp"] == case["c"] == "1")
    if case["half"] == "1":
        late = [node.lam for node, t in zip(nodes, times, strict=True) if t > 0.5]
        found["corrector_range"] = [-100.0, late[-1] + 1e-9]
    return found


def corrected_states(model, x, nodes, options):
    """States after the corrector: from them the row without corrector reaches the same next state."""
    plain = options | {"corrector": None, "corrector_range": None}
    plain["pseudo"] = [v for v in options["pseudo"] if v == "predictor"]
    rows, outputs = V3.trace(nodes, **plain).rows, []

    def predict(state, node, space):
        outputs.append(convert(Prediction(model.eps(state, node), "eps"), space, state, node))
        return outputs[-1]

    states = V3.trace(nodes, **options).apply(x, predict, trajectory=True)
    found = []
    for i, row in enumerate(rows):
        added = sum(b * outputs[i - j] for j, b in enumerate(row.out.p)) + row.out.one
        found.append((states[i + 1] - added) / row.a)
    return np.stack([*found, states[-1]])


@pytest.mark.parametrize(("path", "case"), list(v3_cases()))
def test_v3_states(path, case):
    data = golden_data.load(path)
    times = data[f"t_N{case['n']}_{case['skip']}"]
    nodes = build_nodes(family(path), times)
    np.testing.assert_allclose([n.lam for n in nodes], data[f"lam_N{case['n']}_{case['skip']}"], atol=1e-10)
    options = options_of(case, data, nodes, times)
    model = Mixture(data)
    states = corrected_states(model, data["x_T"], nodes, options)
    np.testing.assert_allclose(states, data[case[0]], rtol=0, atol=1e-10)
    final = V3.run(data["x_T"], nodes, lambda x, s: Prediction(model.eps(x, s), "eps"), **options)
    np.testing.assert_allclose(final, data[case[0]][-1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", golden_data.cases(FOLDER, "dpm_v3_*.npz"), ids=golden_data.name)
def test_snapped_nodes(path):
    """A grid uniform in lam falls on the nodes of the statistics that the code took."""
    data = golden_data.load(path)
    grid, ends = data["lam_stat"], build_nodes(family(path), [float(data["t_start"]), float(data["t_end"])])
    found = [re.fullmatch(r"idx_N(\d+)_logSNR", key) for key in data]
    if not any(found):
        pytest.skip("no grid uniform in lam in this file")
    for m in filter(None, found):
        nodes = type(ends)((ends.path.at_lam(v) for v in np.linspace(grid[0], grid[-1], int(m[1]) + 1)), ends.path)
        moved = V3.placed(nodes, V3.options({"snap": True, "statistics": statistics(data, False)}))
        np.testing.assert_allclose([n.lam for n in moved], grid[data[m[0]]], atol=1e-9)
        assert all(a is b for a, b in zip(V3.placed(moved, V3.options({})), moved, strict=True))
