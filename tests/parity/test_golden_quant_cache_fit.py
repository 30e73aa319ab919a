"""Variance compensation, shortest paths and TAP's affinity against tests/golden/quant_cache."""

from __future__ import annotations

import golden_data
import numpy as np
import pytest
import torch

from diffaccel.calibrate.schedule import shortest
from diffaccel.calibrate.tap import affinity, laplacian
from diffaccel.core.extrapolation import lagrange
from diffaccel.denoiser.compensate import Fit, fit_row

pytestmark = pytest.mark.golden
FOLDER = "quant_cache"
CACHE = golden_data.load(golden_data.cases(FOLDER, "cache.npz")[0])
VC = golden_data.load(golden_data.cases(FOLDER, "vc.npz")[0])
DP = golden_data.load(golden_data.cases(FOLDER, "schedule_dp.npz")[0])
TAP = golden_data.cases(FOLDER, "tap_affinity*.npz")
COMPENSATIONS = sorted(name.removesuffix("__K") for name in VC if name.endswith("__K") and "oneshot" not in name)
SCHEDULES = sorted(name.removesuffix("_E") for name in DP if name.endswith("_E"))


# ---------------------------------------------------------------------- the problem of the golden data
def posterior_mean(x, i):
    """E[x0|x] of the Gaussian mixture at level i, (B, d)."""
    alpha, sigma = CACHE["alpha"][i], CACHE["sigma"][i]
    v = (alpha * CACHE["std"]) ** 2 + sigma**2
    away = x[:, None] - alpha * CACHE["means"][None]
    logs = np.log(CACHE["weights"]) - (away**2).sum(-1) / (2 * v)
    share = np.exp(logs - logs.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    each = CACHE["means"][None] + alpha * CACHE["std"] ** 2 / v * away
    return (share[..., None] * each).sum(1)


def accelerated(x, mask, order, correct):
    """The cached run of the golden data, `correct(i, x)` after each step; (N + 1, B, d)."""
    nodes, values, states = [], [], [x]
    for i, full in enumerate(mask):
        if full:
            nodes, values = [*nodes, float(i)], [*values, posterior_mean(x, i)]
            d = values[-1]
        else:
            last = min(order, len(nodes) - 1) + 1
            d = (
                sum(w * v for w, v in zip(lagrange(nodes[-last:], float(i)), values[-last:]))
                if last > 1
                else values[-1]
            )
        ratio = CACHE["sigma"][i + 1] / CACHE["sigma"][i]
        x = correct(i, CACHE["alpha"][i + 1] * d + ratio * (x - CACHE["alpha"][i] * d))
        states.append(x)
    return np.stack(states)


def channels(x):
    return torch.from_numpy(x).unflatten(-1, (int(VC["C"]), -1))


def case_of(name):
    """(kind, mask, order) of `std_o0`: compensation std of the cache case with interval 3 and that order."""
    kind, order = name.split("_o")
    return kind, CACHE[f"every3_o{order}__mask"], int(order)


@pytest.mark.parametrize("name", COMPENSATIONS)
def test_compensation_is_fitted_and_applied_as_in_the_reference(name):
    kind, mask, order = case_of(name)
    half = len(CACHE["x_T"]) // 2
    fit = Fit(channels(CACHE["full"][1:, :half]), kind, axis=1)
    fitted = accelerated(CACHE["x_T"][:half], mask, order, lambda i, x: fit.correct(i, channels(x)).flatten(1).numpy())
    made = fit.done()
    for mine, theirs in ((made.gain, "K"), (made.mu_ref, "mr"), (made.mu_acc, "ma")):
        np.testing.assert_allclose(mine, VC[f"{name}__{theirs}"], atol=1e-8)
    np.testing.assert_allclose(fitted, VC[f"{name}__fit_traj"], atol=1e-8)
    applied = accelerated(CACHE["x_T"][half:], mask, order, lambda i, x: made.apply(i, channels(x)).flatten(1).numpy())
    np.testing.assert_allclose(applied, VC[f"{name}__applied_traj"], atol=1e-8)
    assert (
        np.square(applied[-1] - CACHE["full"][-1, half:]).mean()
        < np.square(accelerated(CACHE["x_T"][half:], mask, order, lambda i, x: x)[-1] - CACHE["full"][-1, half:]).mean()
    )


@pytest.mark.parametrize("name", COMPENSATIONS)
def test_rows_fitted_all_at_once_are_the_known_wrong_ones(name):
    _, mask, order = case_of(name)  # the reference's one-shot rows are those of std, whatever the case
    half = len(CACHE["x_T"]) // 2
    states = accelerated(CACHE["x_T"][:half], mask, order, lambda i, x: x)[1:]
    pairs = zip(CACHE["full"][1:, :half], states, strict=True)
    gains = np.stack([fit_row(channels(ref), channels(acc), "std", 1)[2] for ref, acc in pairs])
    np.testing.assert_allclose(gains, VC[f"{name}__oneshot_K"], atol=1e-8)
    assert np.abs(gains - VC[f"{name}__K"]).max() > 1e-3


# ---------------------------------------------------------------------- schedules
@pytest.mark.parametrize("name", SCHEDULES)
def test_shortest_path(name):
    cost = DP[f"{name}_E"]
    found = shortest(np.broadcast_to(cost, (len(cost), *cost.shape)), int(DP[f"{name}_budget"]), window=len(cost))
    assert found.cost == pytest.approx(float(DP[f"{name}_cost"]), abs=1e-9)
    np.testing.assert_array_equal(found.mask, DP[f"{name}_mask"])


# ---------------------------------------------------------------------- TAP
@pytest.mark.parametrize("path", TAP, ids=golden_data.name)
def test_affinity(path):
    data = golden_data.load(path)
    a = affinity(data["x"], data["step"])
    np.testing.assert_allclose(a, data["A"], atol=1e-12)
    np.testing.assert_allclose(laplacian(a), data["L"], atol=1e-12)
    np.testing.assert_allclose(np.linalg.eigvalsh(laplacian(a))[::-1], data["eigvals_desc"], atol=1e-10)
