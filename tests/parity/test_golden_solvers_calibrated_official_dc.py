"""DC-Solver against both code bases of its authors (tests/golden/solvers_calibrated_official)."""

from __future__ import annotations

import re

import golden_data
import numpy as np
import pytest
from golden_calibrated import FOLDER, Mixture, build_nodes

from diffaccel.core.families import betas
from diffaccel.core.path import Nodes, Path
from diffaccel.core.prediction import Prediction
from diffaccel.samplers.dc import cpr_ratio
from diffaccel.samplers.registry import get

DC = re.compile(
    r"evals_dc_(?P<times>N(?P<n>\d+)_\w+?)_(?P<variant>bh1|bh2)_o(?P<order>\d)_(?P<space>x0|eps)_(?P<r>r\d+)"
)
DC_DIFFUSERS = re.compile(r"evals_dcdiff_N(?P<n>\d+)_(?P<variant>bh1|bh2)_o(?P<order>\d)_dco(?P<k>\d)_(?P<r>r\d+)")


def dc_cases():
    """(file, key) of every run of DC-Solver, in both code bases."""
    found = []
    for path in golden_data.cases(FOLDER, "unipc_dc_*.npz"):
        with np.load(path) as data:
            for key in data.files:
                if key.startswith("evals_dc"):
                    m = DC.fullmatch(key) or DC_DIFFUSERS.fullmatch(key)
                    assert m, f"{path.name}: {key} does not say its options"
                    found.append(pytest.param(path, m, id=f"{path.stem[9:]}-{key[6:]}"))
    assert found, "no run of DC-Solver in the files"
    return found


def dc_run(path, m, data):
    """(nodes, options, ratios) of a reference run."""
    options = {"order": int(m["order"]), "variant": m["variant"]}
    if m.re is DC:
        nodes = build_nodes(path.stem.removeprefix("unipc_dc_"), data[f"t_{m['times']}"])
        return nodes, options | {"space": m["space"]}, data[f"ratios_N{m['n']}_{m['r']}"]
    k = int(m["k"])
    sd = Path.vp(betas("scaled_linear", 0.00085, 0.012, 1000))
    nodes = Nodes([sd.at(float(t)) for t in [*data[f"timesteps_dcdiff_N{m['n']}"], 0]], sd)
    ratios = data.get(f"ratios_N{m['n']}_{m['r']}_dco{k}", data[f"ratios_N{m['n']}_{m['r']}"])
    return nodes, options | {"dc_order": k, "corrector": [0]}, ratios


@pytest.mark.parametrize(("path", "case"), dc_cases())
def test_dc_states(path, case):
    data = golden_data.load(path)
    nodes, options, ratios = dc_run(path, case, data)
    assert np.any(ratios != 1)
    model, space = Mixture(data), options.get("space", "x0")
    table = get("dc").trace(nodes, **options, ratios=ratios.tolist())
    assert len(table) == int(case["n"])
    seen = []

    def predict(x, node, here):
        seen.append(x)
        return model.predict(x, node, here)

    final = table.apply(data["x_T"], predict)
    # The model of this data sees the state that a predictor made; ours is called on the same states.
    np.testing.assert_allclose(np.stack(seen), data[case[0]], rtol=0, atol=1e-10)
    np.testing.assert_allclose(final, data[case[0].replace("evals_", "final_")], rtol=0, atol=1e-10)
    options["ratios"] = ratios.tolist()
    loop = get("dc").run(
        data["x_T"],
        nodes,
        lambda x, s: Prediction(model.predict(x, s, space), space),
        **options,
    )
    np.testing.assert_allclose(loop, final, rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", golden_data.cases(FOLDER, "cpr_*.npz"), ids=golden_data.name)
def test_cascade_polynomial_regression(path):
    data = golden_data.load(path)
    keys = [re.fullmatch(r"rho_cfg(?P<g>[\d.]+)_N(?P<n>\d+)", key) for key in data if key.startswith("rho_")]
    assert keys and all(keys)
    for m in keys:
        n = int(m["n"])
        ours = [cpr_ratio(data["coef"], i, n, float(m["g"])) for i in range(1, n + 1)]
        np.testing.assert_allclose(ours, data[m[0]], rtol=0, atol=1e-9)
