"""UniPC against the states of its authors' code after every corrector (tests/golden/solvers_calibrated_official)."""

from __future__ import annotations

import re

import golden_data
import numpy as np
import pytest
from golden_calibrated import FOLDER, Mixture, build_nodes

from diffaccel.core.prediction import Prediction
from diffaccel.samplers.registry import get

NAME = re.compile(
    r"traj_unipc_N(?P<n>\d+)_(?P<skip>\w+?)_(?P<variant>bh1|bh2|vary_coeff)_o(?P<order>\d)_(?P<space>x0|eps)_lof(?P<lof>[01])"
)


def unipc_cases():
    """(file, key, options) of every trajectory, but `vary_coeff` of order 2 and more: its corrector is of order 1."""
    for path in golden_data.cases(FOLDER, "unipc_dc_*.npz"):
        with np.load(path) as data:
            names = [NAME.fullmatch(key) for key in data.files if key.startswith("traj_unipc_")]
        assert names and all(names), f"{path.name}: a trajectory whose name does not say its options"
        for m in names:
            if m["variant"] != "vary_coeff" or int(m["order"]) == 1:
                yield pytest.param(path, m, id=f"{path.stem[9:]}-{m[0][11:]}")


def corrected_states(model, x, nodes, options):
    """States after the corrector, (N + 1, ...), from the states at the model calls.

    The corrected state at a node is the one from which the row without corrector reaches the same next state.
    """
    unipc = get("unipc")
    table, plain = unipc.trace(nodes, **options), unipc.trace(nodes, **options, corrector=False)
    outputs = []

    def predict(state, node, space):
        outputs.insert(0, model.predict(state, node, space))
        return outputs[0]

    states = table.apply(x, predict, trajectory=True)
    outputs.reverse()
    found = []
    for i, row in enumerate(plain.rows):
        step = sum(b * outputs[i - j] for j, b in enumerate(row.out.p))
        found.append((states[i + 1] - step) / row.a)
    return np.stack([*found, states[-1]])


@pytest.mark.parametrize(("path", "case"), list(unipc_cases()))
def test_unipc_states(path, case):
    data = golden_data.load(path)
    nodes = build_nodes(path.stem.removeprefix("unipc_dc_"), data[f"t_N{case['n']}_{case['skip']}"])
    options = {
        "order": int(case["order"]),
        "variant": case["variant"],
        "space": case["space"],
        "lower_order_final": case["lof"] == "1",
    }
    model = Mixture(data)
    expected = data[case[0]]
    states = corrected_states(model, data["x_T"], nodes, options)
    np.testing.assert_allclose(states, expected, rtol=0, atol=1e-10)
    space = options["space"]
    final = get("unipc").run(data["x_T"], nodes, lambda x, s: Prediction(model.predict(x, s, space), space), **options)
    np.testing.assert_allclose(final, expected[-1], rtol=0, atol=1e-10)
