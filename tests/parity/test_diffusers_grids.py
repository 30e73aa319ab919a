"""Our grids against the sigmas and timesteps of diffusers' own classes, number by number.

diffusers keeps alphas_cumprod in float32, which moves sigma/alpha by up to 1.3e-5 (at t = 0, where 1 - alphas_cumprod
cancels). So the classes are given our float64 table first; what is left of their float32 is the final cast. Where a
class is compared with its own table, the bound says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scheduler_cases import LATENT, build

from diffaccel.core.given_nodes import from_sigmas
from diffaccel.core.grid import nodes
from diffaccel.core.path import Nodes, Path
from diffaccel.errors import OptionError
from diffaccel.schedulers.from_config import grid_of, path_of, read

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # diffusers' 0/0 at N = 1
]

CALLS = (1, 2, 3, 4, 5, 7, 8, 10, 13, 16, 20, 25, 26, 30, 33, 48, 50, 60, 61, 96, 100)
FLOW = "FlowMatchEulerDiscreteScheduler"
EULER = ("EulerDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler")
DPM = (
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)


def ours(scheduler: Any, calls: int, mu: float | None = None, grid: str | None = None) -> Nodes:
    """The nodes that the scheduler's own config asks for."""
    settings = read(scheduler).settings
    name, options, final = grid_of(settings)
    return nodes(path_of(settings, mu=mu), calls, grid or name, final=final, **({} if grid else options))


def exact(scheduler: Any) -> Any:
    """The scheduler, with our float64 table in the place of its float32 one."""
    scheduler.alphas_cumprod = torch.as_tensor(read(scheduler).path.alphas_cumprod)
    return scheduler


def one_a_call(scheduler: Any, values: Any) -> np.ndarray:
    """Heun lists every value after the first one twice."""
    found = np.asarray(values, dtype=np.float64)
    return found[::2] if type(scheduler).__name__.startswith("Heun") else found


def levels(found: Nodes) -> np.ndarray:
    return np.array([n.level for n in found])


def sigmas(found: Nodes) -> np.ndarray:
    return np.array([n.sigma for n in found])


def times(found: Nodes) -> np.ndarray:
    return np.array([n.t for n in found[:-1]])


# ---------------------------------------------------------------------- VP: spacing
SPACED = [
    (name, spacing, offset)
    for name in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", *EULER, *DPM)
    for spacing, offset in (("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0))
]


@pytest.mark.parametrize(("name", "spacing", "offset"), SPACED)
def test_spacing(name, spacing, offset):
    more = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    scheduler = build(name, **LATENT, timestep_spacing=spacing, steps_offset=offset, **more)
    for calls in CALLS:
        found = ours(scheduler, calls)
        if calls == 1 and found[0].t == 999 and spacing == "linspace" and name not in DPM:
            continue  # np.linspace(0, 999, 1) is [0]: diffusers' only call is at the clean end
        scheduler.set_timesteps(calls)
        stock = one_a_call(scheduler, scheduler.timesteps)
        if name == "PNDMScheduler":
            stock = np.unique(stock)[::-1]  # it visits the second timestep twice
        if calls == 61 and spacing == "trailing":
            assert len(stock) == 62  # np.arange gives one time too many
            stock = stock[:61]
        assert len(found) == calls + 1
        assert np.abs(times(found) - stock).max() < (1e-4 if spacing == "linspace" else 1e-6)  # float32 timesteps


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_levels_of_spaced_times(name, spacing):
    scheduler = exact(build(name, **LATENT, timestep_spacing=spacing))
    for calls in (5, 8, 20, 33):
        scheduler.set_timesteps(calls)
        found = levels(ours(scheduler, calls))
        # float32 timesteps of `linspace` move the level by another 1e-7
        assert np.allclose(found, one_a_call(scheduler, scheduler.sigmas), rtol=1e-6)


# ---------------------------------------------------------------------- VP: functions of sigma
@pytest.mark.parametrize("switch", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "LMSDiscreteScheduler", *DPM])
def test_functions_of_sigma(name, switch):
    for spacing in ("linspace", "leading", "trailing"):
        scheduler = exact(build(name, **LATENT, timestep_spacing=spacing, steps_offset=1, **{switch: True}))
        for calls in (2, 3, 5, 8, 20, 50):
            scheduler.set_timesteps(calls)
            found = ours(scheduler, calls)
            assert np.allclose(levels(found)[:-1], np.asarray(scheduler.sigmas)[:-1], rtol=1e-6), (spacing, calls)
            # DPM-Solver's family feeds rounded or truncated times; the Euler family does not
            atol = 1.0 if name in DPM else 1e-3
            assert np.abs(times(found) - np.asarray(scheduler.timesteps, dtype=np.float64)).max() <= atol


def test_functions_of_sigma_against_the_float32_table():
    for switch in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        scheduler = build("EulerDiscreteScheduler", **LATENT, **{switch: True})
        scheduler.set_timesteps(20)
        assert np.allclose(levels(ours(scheduler, 20))[:-1], scheduler.sigmas[:-1], rtol=1.4e-5)


def test_uniform_lambda_is_dpm_solvers_lu():
    scheduler = exact(build("DPMSolverMultistepScheduler", **LATENT, use_lu_lambdas=True))
    for calls in (2, 8, 20):
        scheduler.set_timesteps(calls)
        assert np.allclose(levels(ours(scheduler, calls))[:-1], scheduler.sigmas[:-1], rtol=1e-6)


def test_the_users_range():
    more = dict(use_karras_sigmas=True, sigma_min=0.1, sigma_max=10.0)
    scheduler = build("EulerDiscreteScheduler", **LATENT, **more)
    scheduler.set_timesteps(8)
    assert np.allclose(levels(ours(scheduler, 8)), scheduler.sigmas, rtol=1e-6)


@pytest.mark.parametrize(("switch", "law"), [("use_karras_sigmas", "karras"), ("use_beta_sigmas", "beta")])
def test_one_call_starts_at_the_noisy_end(switch, law):
    """Where diffusers' one call is at the clean end of the range, ours is not."""
    found = ours(build("EulerDiscreteScheduler", **LATENT, **{switch: True}), 1)
    assert len(found) == 2 and found[0].t == 999 and found[1].sigma == 0
    inside = nodes(Path.vp(np.linspace(1e-4, 0.02, 1000)), 1, law, within="leading", offset=1)
    assert inside[0].t == pytest.approx(1.0)  # leading counts from the clean end


# ---------------------------------------------------------------------- EDM
@pytest.mark.parametrize(
    ("name", "keys", "rtol"),
    [
        ("EDMEulerScheduler", {}, 1e-6),
        ("EDMEulerScheduler", {"rho": 5.0}, 4e-6),  # float32 powers
        ("EDMEulerScheduler", {"sigma_schedule": "exponential"}, 4e-6),  # float32 exponentials
        ("EDMDPMSolverMultistepScheduler", {}, 4e-6),
        ("EDMDPMSolverMultistepScheduler", {"sigma_schedule": "exponential"}, 4e-6),
        ("CosineDPMSolverMultistepScheduler", {}, 4e-6),
        ("CosineDPMSolverMultistepScheduler", {"sigma_schedule": "karras"}, 4e-6),
    ],
)
def test_edm_classes(name, keys, rtol):
    scheduler = build(name, **keys)
    for calls in (2, 5, 8, 20, 50):
        scheduler.set_timesteps(calls)
        found = ours(scheduler, calls)
        assert np.allclose(levels(found), scheduler.sigmas, rtol=rtol)
        assert np.abs(times(found) - np.asarray(scheduler.timesteps, dtype=np.float64)).max() < 2e-6


def test_stable_video_diffusion():
    keys = dict(sigma_min=0.002, sigma_max=700.0, use_karras_sigmas=True, timestep_type="continuous")
    scheduler = build("EulerDiscreteScheduler", **LATENT, prediction_type="v_prediction", **keys)
    for calls in (1, 2, 8, 25):
        scheduler.set_timesteps(calls)
        found = ours(scheduler, calls)
        assert np.allclose(levels(found), scheduler.sigmas, rtol=1e-6)
        assert np.allclose(times(found), scheduler.timesteps, atol=1e-6)


# ---------------------------------------------------------------------- flow
@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_flow_stock_shifts_twice(shift):
    scheduler = build(FLOW, shift=shift)
    for calls in CALLS:
        scheduler.set_timesteps(calls)
        found = ours(scheduler, calls, grid="flow_stock")
        assert np.abs(sigmas(found) - np.asarray(scheduler.sigmas)).max() < 1e-6
        assert np.allclose(times(found), scheduler.timesteps, rtol=1e-6)


def test_flow_stock_by_its_published_number():
    found = nodes(Path.flow(3.0), 10, "flow_stock")
    assert found[-2].sigma == pytest.approx(0.00893, abs=5e-6)  # and not 0.00299
    assert nodes(Path.flow(3.0), 10, "trailing")[-2].sigma == pytest.approx(0.25)


SHIFTS: list[tuple[dict[str, Any], float | None]] = [
    ({"shift": 1.0}, None),
    ({"shift": 3.0}, None),
    ({"shift": 3.0, "shift_terminal": 0.1}, None),
    ({"use_dynamic_shifting": True}, 0.8),
    ({"use_dynamic_shifting": True, "shift": 3.0}, 1.15),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 2.5),
    ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, 0.7),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1}, 0.8),
]


@pytest.mark.parametrize(("keys", "mu"), SHIFTS)
def test_flow_sigmas_given(keys, mu):
    """What FLUX, Qwen-Image and others pass; our `trailing` is the same grid."""
    scheduler = build(FLOW, **keys)
    for calls in CALLS:
        given = np.linspace(1, 1 / calls, calls)
        for grid in ("trailing", "flow_stock"):
            asked = {"sigmas": given.tolist()} if grid == "trailing" else {"num_inference_steps": calls}
            scheduler.set_timesteps(**asked, mu=mu)
            found = ours(scheduler, calls, mu, grid)
            stock = np.asarray(scheduler.sigmas, dtype=np.float64)
            if calls == 1 and "shift_terminal" in keys:
                assert np.isnan(stock[0]) and sigmas(found).tolist() == [1.0, 0.0]  # 0/0: no stretch of one node
                continue
            assert np.abs(sigmas(found) - stock).max() < 1e-6
            assert np.abs(times(found) - np.asarray(scheduler.timesteps)).max() < 1e-3  # 1000 x 1e-6
        again = from_sigmas(path_of(read(scheduler).settings, mu=mu), given)
        assert np.allclose(sigmas(again), sigmas(ours(scheduler, calls, mu, "trailing")), atol=1e-12)


@pytest.mark.parametrize("switch", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("keys", [{"shift": 3.0}, {"shift": 3.0, "shift_terminal": 0.02}])
def test_flow_functions_of_sigma(switch, keys):
    scheduler = build(FLOW, **keys, **{switch: True})
    for calls in (2, 3, 8, 20, 50):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / calls, calls).tolist())
        assert np.abs(sigmas(ours(scheduler, calls)) - np.asarray(scheduler.sigmas)).max() < 1e-6


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm_flow(name, shift):
    keys = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
    scheduler = build(name, **keys)
    for calls in CALLS:
        scheduler.set_timesteps(calls)
        found = ours(scheduler, calls, grid="flow_dpmpp")
        assert np.abs(sigmas(found)[:-1] - np.asarray(scheduler.sigmas)[:-1]).max() < 1e-6
        # diffusers cuts the fraction off; the model was trained with 1000 sigma
        cut = times(found) - np.asarray(scheduler.timesteps)
        assert cut.min() > -1e-9 and cut.max() < 1 + 1e-9
    with pytest.raises(OptionError, match="for flow paths"):
        nodes(Path.vp(np.linspace(1e-4, 0.02, 1000)), 8, "flow_dpmpp")


@pytest.mark.parametrize("keys", [{"flow_shift": 1.0}, {"flow_shift": 3.0}, {"shift_terminal": 0.1}])
def test_unipc_flow_is_linspace_open(keys):
    scheduler = build("UniPCMultistepScheduler", use_flow_sigmas=True, prediction_type="flow_prediction", **keys)
    for calls in CALLS:
        if calls == 1 and "shift_terminal" in keys:
            continue
        scheduler.set_timesteps(calls)
        found, stock = sigmas(ours(scheduler, calls, grid="linspace_open")), np.asarray(scheduler.sigmas)
        assert stock[0] == pytest.approx(1 - 1e-6, abs=1e-7) and found[0] == 1.0  # UniPC avoids the logarithm of 0
        assert np.abs(found[1:] - stock[1:]).max() < 1e-6


def test_flow_map_euler_is_trailing():
    scheduler = build("FlowMapEulerDiscreteScheduler", shift=5.0)
    for calls in CALLS:
        scheduler.set_timesteps(calls)
        found = ours(scheduler, calls)
        assert np.abs(sigmas(found) - np.asarray(scheduler.sigmas)).max() < 1e-12


@pytest.mark.parametrize("name", ["leading", "trailing", "flow_stock"])
def test_ranges_within_a_spacing(name):
    path = Path.flow(3.0) if name == "flow_stock" else Path.vp(np.linspace(1e-4, 0.02, 1000))
    spaced, curved = nodes(path, 8, name), nodes(path, 8, "karras", within=name)
    assert curved[0].level == pytest.approx(spaced[0].level) and curved[-2].level == pytest.approx(spaced[-2].level)
    with pytest.raises(OptionError, match="leading"):
        nodes(path, 8, "karras", within="lagging")
