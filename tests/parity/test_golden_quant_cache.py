"""Forecasts and cached trajectories against an independent float64 reference (see the folder's README)."""

from __future__ import annotations

import json

import golden_data
import numpy as np
import pytest
import torch

from diffaccel.denoiser.cache import Cache
from diffaccel.denoiser.cache_forecast import History, weights

pytestmark = pytest.mark.golden

FORECAST = golden_data.cases("quant_cache", "forecast.npz")[0]
TRAJECTORIES = golden_data.cases("quant_cache", "cache.npz")[0]
SETTINGS = json.loads((golden_data.folder("quant_cache") / "settings.json").read_text())
ORDERS = sorted(int(name[1:]) for name in golden_data.load(FORECAST) if name[0] == "w" and name[1:].isdigit())
CASES = sorted(name.removesuffix("__mask") for name in golden_data.load(TRAJECTORIES) if name.endswith("__mask"))


@pytest.mark.parametrize("order", ORDERS)
def test_weights_and_forecasts(order):
    data = golden_data.load(FORECAST)
    nodes, values = data["u"].tolist(), data["f"]
    for k, target in enumerate(data["x"].tolist()):
        found = weights(nodes, target, order, largest=float("inf"))
        np.testing.assert_allclose(found, data[f"w{order}"][k], rtol=0, atol=1e-12)
        np.testing.assert_allclose(found @ values[-order - 1 :], data[f"out{order}"][k], rtol=0, atol=1e-12)


def test_a_parabola_is_exact_where_the_taylor_recursion_is_not():
    data = golden_data.load(FORECAST)
    nodes = data["quad_nodes"].tolist()
    squares = [s * s for s in nodes]
    for k, target in enumerate(data["quad_eval"].tolist()):
        second = np.dot(weights(nodes, target, 2), squares)
        first = np.dot(weights(nodes, target, 1), squares[-2:])
        assert second == pytest.approx(data["quad_exact"][k], abs=1e-12)
        assert first == pytest.approx(data["quad_taylor1"][k], abs=1e-12)
        assert abs(second - data["quad_taylor2"][k]) > 1


def denoised(x: torch.Tensor, data: dict, i: int) -> torch.Tensor:
    """E[x0|x] under the mixture at level i."""
    alpha, sigma = float(data["alpha"][i]), float(data["sigma"][i])
    means, std = torch.tensor(data["means"]), float(data["std"])
    spread = alpha**2 * std**2 + sigma**2
    off = x[:, None] - alpha * means
    share = torch.softmax(torch.tensor(np.log(data["weights"])) - (off**2).sum(-1) / (2 * spread), dim=1)
    return (share[..., None] * (means + alpha * std**2 / spread * off)).sum(1)


@pytest.mark.parametrize("case", CASES)
def test_trajectories(case):
    data = golden_data.load(TRAJECTORIES)
    plan, order, variable, error = SETTINGS[case]
    mask = [bool(m) for m in data[f"{case}__mask"]]
    if isinstance(plan, list) and len(plan) == 3:
        settings = Cache.every(plan[0], warmup=plan[1], tail=plan[2], forecast=order)
    else:
        settings = Cache.mask(plan, forecast=order)
    assert list(settings.full_steps(len(mask))) == mask
    nodes = list(range(len(mask))) if variable == "step" else (-np.log(data["rho"][:-1])).tolist()
    x = torch.tensor(data["x_T"])
    history, rows = History(order, largest=float("inf")), len(x)
    for i, full in enumerate(mask):
        if full:
            history.push([denoised(x, data, i)], nodes[i], None, rows)
        value = history.predict(nodes[i])[0] if not full else denoised(x, data, i)
        alpha, after = float(data["alpha"][i]), float(data["alpha"][i + 1])
        x = after * value + float(data["sigma"][i + 1] / data["sigma"][i]) * (x - alpha * value)
        np.testing.assert_allclose(x.numpy(), data[f"{case}__traj"][i + 1], rtol=0, atol=1e-9)
    assert float(((x.numpy() - data["full"][-1]) ** 2).mean()) == pytest.approx(error, rel=1e-9)
