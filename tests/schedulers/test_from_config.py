"""What the configs of published pipelines are read as, row by row, and what the user's own keys do."""

from __future__ import annotations

import json
import warnings
from typing import Any

import diffusers
import diffusers.schedulers
import numpy as np
import pytest
import torch
from scheduler_cases import CONFIGS, LATENT, build, config, table_of

from diffaccel.core.grid import nodes
from diffaccel.core.path import Path
from diffaccel.errors import OptionError, PathError
from diffaccel.schedulers.from_config import KEYS, grid_of, path_of, read

# numpy functions that diffusers calls on tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")


# ---------------------------------------------------------------------- published configs
VP = dict(path="vp", num_train_timesteps=1000, prediction_type="epsilon")
FLOW = dict(path="flow", num_train_timesteps=1000, prediction_type="flow_prediction", use_dynamic_shifting=False)
DYNAMIC = {**FLOW, "use_dynamic_shifting": True}
EXPECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15_pndm": ("row 8", {**VP, **LATENT, "grid": None, "clip_sample": False, "interpolation": "lam"}),
    "sd2_v": ("row 8", {**VP, "prediction_type": "v_prediction", "grid": None}),
    "sdxl_euler": ("row 8", {**VP, "grid": "leading", "grid_options": {"offset": 1}, "interpolation": "sigma"}),
    "pixart_dpmpp": ("row 8", {**VP, "beta_schedule": "linear", "grid": "linspace_open", "thresholding": False}),
    "dit_ddim": ("row 8", {**VP, "beta_end": 0.02, "grid": None}),
    "ddpm": ("row 8", {**VP, "beta_end": 0.02, "clip_sample": True, "clip_sample_range": 1.0}),
    "kolors": ("row 8", {**VP, "num_train_timesteps": 1100, "beta_end": 0.014}),
    "noobai_v": ("row 8", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "grid": "trailing"}),
    "cogvideox": ("row 8", {"snr_shift_scale": 3.0, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    "deepfloyd_if": (
        "row 8",
        {
            **VP,
            "beta_schedule": "squaredcos_cap_v2",
            "thresholding": True,
            "sample_max_value": 1.5,
            "dynamic_thresholding_ratio": 0.95,
            "clip_sample": False,
        },
    ),
    "kandinsky_decoder": ("row 8", {**VP, "beta_schedule": "linear", "beta_start": 0.00085}),
    "kandinsky_prior": ("row 9", {**VP, "prediction_type": "sample", "clip_sample": True, "clip_sample_range": 5.0}),
    "playground25": (
        "row 4",
        {
            "path": "edm",
            "sigma_data": 0.5,
            "edm_time": "log",
            "prediction_type": "epsilon",
            "grid": "karras",
            "grid_options": {"rho": 7.0},
        },
    ),
    "stable_audio": (
        "row 5",
        {
            "path": "edm",
            "sigma_data": 1.0,
            "edm_time": "atan",
            "sigma_max": 500.0,
            "sigma_min": 0.3,
            "grid": "exponential",
            "prediction_type": "v_prediction",
        },
    ),
    "svd": ("row 6", {"path": "edm", "sigma_data": 1.0, "edm_time": "log", "sigma_max": 700.0, "grid": "karras"}),
    "sd3": ("row 2", {**FLOW, "shift": 3.0, "grid": None}),
    "flux_dev": ("row 2", {**DYNAMIC, "time_shift_type": "exponential"}),
    "flux_schnell": ("row 2", {**FLOW, "shift": 1.0}),
    "qwen_image": ("row 2", {**DYNAMIC, "shift_terminal": 0.02}),
    "ltx": ("row 2", {**DYNAMIC, "shift_terminal": 0.1}),
    "z_image": ("row 2", {**FLOW, "shift": 3.0}),
    "hunyuan_video": ("row 2", {**FLOW, "shift": 7.0}),
    "auraflow": ("row 2", {**FLOW, "shift": 1.73}),
    "wan_unipc": ("row 2", {**FLOW, "shift": 3.0, "grid": None}),
    "sana_dpmpp": ("row 2", {**FLOW, "shift": 3.0, "grid": None}),
    "table_scheduler": (
        "row 0",
        {**VP, **LATENT, "grid": "karras", "grid_options": {"rho": 5.0}, "source_class": "EulerDiscreteScheduler"},
    ),
}
REFUSED_CONFIGS = {
    "mochi": r"invert_sigmas is true",
    "ltx_distilled": r"stochastic_sampling is true",
    "consistency_model": r"(?s)row 1.*consistency",
}


def test_every_fixture_is_expected():
    assert {f.stem for f in CONFIGS.glob("*.json")} == set(EXPECTED) | set(REFUSED_CONFIGS)


@pytest.mark.parametrize("name", EXPECTED)
def test_published_configs(name):
    row, expected = EXPECTED[name]
    got = read(config(name))
    assert got.rule.startswith(row + ":"), got.rule
    assert {k: got.settings.get(k) for k in expected} == expected
    assert got.settings["source_class"] == config(name).get("source_class", config(name)["_class_name"])
    assert set(got.settings) <= set(KEYS)
    assert got.path.first.level > got.path.last.level
    mu = 0.8 if got.settings.get("use_dynamic_shifting") else None
    grid, options, final = grid_of(got.settings)
    assert len(nodes(path_of(got.settings, mu=mu), 8, grid, final=final, **options)) == 9


@pytest.mark.parametrize("name", REFUSED_CONFIGS)
def test_published_configs_that_are_refused(name):
    with pytest.raises(PathError, match=REFUSED_CONFIGS[name]) as error:
        read(config(name))
    assert config(name)["_class_name"] in str(error.value)


@pytest.mark.parametrize("name", [n for n, (row, _) in EXPECTED.items() if row == "row 8"])
def test_vp_configs_have_the_table_of_their_class(name):
    scheduler = getattr(diffusers.schedulers, config(name)["_class_name"]).from_config(config(name))
    ours, theirs = read(config(name)).path.alphas_cumprod, table_of(scheduler)
    if name == "noobai_v":  # diffusers' Euler puts 2^-24 in the place of 0
        assert ours[-1] == 0 and theirs[-1] == 2**-24
    assert np.abs(ours - theirs).max() < 1e-6


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler", "CogVideoXDDIMScheduler"])
def test_zero_snr_tables(name):
    scheduler = build(name, **LATENT, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ours = read(scheduler).path.alphas_cumprod
    assert ours[-1] == 0 and np.abs(ours - table_of(scheduler)).max() < 1e-6


# ---------------------------------------------------------------------- rows and modifiers
def test_path_from_config_is_the_public_way():
    path = Path.from_config(config("sd3"))
    assert path.family == "flow" and path == read(config("sd3")).path


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", None])
def test_flow_sigmas_with_another_prediction_contradict(name, kind):
    more = {} if kind is None else {"prediction_type": kind}
    with pytest.raises(PathError, match=r"(?s)row 3.*use_flow_sigmas"):
        read(build(name, use_flow_sigmas=True, **more))
    assert read(build(name, use_flow_sigmas=True, **more), prediction_type="flow_prediction").settings["path"] == "flow"


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_another_prediction_on_a_flow_class(kind):
    with pytest.raises(PathError, match=f"{kind}.* does not belong to a flow path"):
        read({**config("sd3"), "prediction_type": kind})


def test_shift_beside_betas_contradicts():
    with pytest.raises(PathError, match="row 3"):
        read({**LATENT, "shift": 3.0, "prediction_type": "epsilon", "num_train_timesteps": 1000})


def test_edm_keys_without_their_class():
    for drop in ({"_class_name": None}, {"_class_name": "DPMSolverMultistepScheduler"}):
        given = {k: v for k, v in {**config("playground25"), **drop}.items() if v is not None}
        with pytest.raises(PathError, match=r"(?s)rows 4 and 5.*sigma_data.*edm_time"):
            read(given)
    by_hand = read(given, path="edm", edm_time="log").settings
    assert by_hand["sigma_max"] == 80 and by_hand["path"] == "edm"


def test_continuous_euler_needs_its_range():
    with pytest.raises(PathError, match="sigma_min, sigma_max"):
        read(build("EulerDiscreteScheduler", timestep_type="continuous", prediction_type="v_prediction"))
    # with epsilon EulerDiscrete ignores the key
    assert read(build("EulerDiscreteScheduler", timestep_type="continuous")).settings["path"] == "vp"


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, torch.tensor])
def test_trained_betas(kind):
    values = np.linspace(0.001, 0.02, 500).tolist()
    given = {"_class_name": "DDIMScheduler", **LATENT, "trained_betas": kind(values)}
    got = read(given)
    assert got.rule.startswith("row 7") and got.settings["num_train_timesteps"] == 500
    assert isinstance(got.settings["trained_betas"], list) and json.dumps(got.settings)
    assert got.settings["trained_betas"] == pytest.approx(values, rel=1e-6)
    with pytest.raises(PathError, match="trained_betas has 500"):
        read({**given, "num_train_timesteps": 1000})
    # the user's own betas win over the list
    again = read(given, beta_end=0.02)
    assert again.rule.startswith("row 8") and "trained_betas" not in again.settings
    assert again.settings["beta_end"] == 0.02
    with pytest.raises(PathError, match=r"(?s)betas in \(0, 1\).*class: DDIMScheduler"):
        read({**given, "trained_betas": [0.1, 2.0]})


def test_trained_betas_equal_the_class():
    values = np.linspace(0.001, 0.02, 1000)
    scheduler = build("DDIMScheduler", trained_betas=values)
    for given in (scheduler, scheduler.config):
        assert np.abs(read(given).path.alphas_cumprod - table_of(scheduler)).max() < 1e-6


def test_zero_snr_needs_another_prediction():
    given = {**config("noobai_v"), "prediction_type": "epsilon"}
    with pytest.raises(PathError, match=r"(?s)zero SNR needs v_prediction or sample.*class: EulerDiscreteScheduler"):
        read(given)
    assert read(given, prediction_type="sample").settings["prediction_type"] == "sample"


def test_zero_snr_warns_where_the_last_step_is_never_fed():
    with pytest.warns(UserWarning, match="trailing"):
        read({**config("noobai_v"), "timestep_spacing": "leading"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read({**config("noobai_v"), "timestep_spacing": "leading"}, grid="trailing")
        read(config("noobai_v"))


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear"])
def test_lambda_min_clipped_takes_the_noisiest_steps_away(schedule):
    scheduler = build("DPMSolverMultistepScheduler", beta_schedule=schedule, lambda_min_clipped=-3.0)
    scheduler.set_timesteps(10)
    path = read(scheduler).path
    assert path.first.lam >= -3.0 and path.first.t == float(scheduler.timesteps[0])
    short = len(path.alphas_cumprod)
    assert np.abs(path.alphas_cumprod - table_of(scheduler)[:short]).max() < 1e-6
    assert [n.t for n in nodes(path, 10)[:-1]] == scheduler.timesteps.tolist()


def test_snr_shift_scale_counts_in_any_class():
    given = {**config("cogvideox"), "_class_name": "DDIMScheduler"}  # DDIM drops it in silence
    assert read(given).path == read(config("cogvideox")).path


def test_policies_count_only_if_somebody_asked():
    hop = diffusers.DDIMScheduler.from_config({k: v for k, v in config("sd15_pndm").items() if k != "clip_sample"})
    assert hop.config.clip_sample is True  # DDIM's default, which would clip latents
    assert "clip_sample" not in read(hop).settings and "clip_sample" not in read(hop.config).settings
    assert read(hop, clip_sample=True).settings["clip_sample_range"] == 1.0


# ---------------------------------------------------------------------- nothing proved
def test_nothing_proved_lists_seen_and_missing():
    with pytest.raises(PathError) as error:
        read({"beta_start": 0.001, "num_train_timesteps": 1000, "someones_key": 3})
    text = str(error.value)
    for part in ("row 10", "beta_start", "someones_key", "missing: _class_name, beta_schedule", "path='vp'"):
        assert part in text


def test_unknown_classes_have_no_defaults():
    live = diffusers.DDIMScheduler().config
    with pytest.raises(PathError, match=r"(?s)SomeonesScheduler.*at their defaults: beta_end"):
        read({**live, "_class_name": "SomeonesScheduler"})
    stated = {**LATENT, "_class_name": "SomeonesScheduler", "num_train_timesteps": 1000}
    with pytest.raises(PathError, match="prediction_type"):
        read(stated)
    assert read(stated, prediction_type="epsilon").settings["source_class"] == "SomeonesScheduler"


@pytest.mark.parametrize("given", [None, "stabilityai/some-model", 3])
def test_what_is_no_config(given):
    with pytest.raises(PathError, match="a dict or a scheduler"):
        read(given)


@pytest.mark.parametrize("key", ["beta_start", "sigma_max", "shift", "num_train_timesteps"])
def test_values_that_are_no_numbers(key):
    base = {"beta_start": "sd15_pndm", "sigma_max": "svd", "shift": "sd3", "num_train_timesteps": "sd3"}[key]
    with pytest.raises(PathError, match=key):
        read({**config(base), key: "many"})


# ---------------------------------------------------------------------- the user's own keys
def test_a_path_by_hand():
    settings = read({}, path="vp", **LATENT, num_train_timesteps=1000, prediction_type="epsilon").settings
    assert settings["path"] == "vp" and "source_class" not in settings
    assert read({}, path="flow", shift=3.0).settings["prediction_type"] == "flow_prediction"
    with pytest.raises(PathError, match="beta_start, beta_end"):
        read({}, path="vp", beta_schedule="linear", prediction_type="epsilon")
    with pytest.raises(PathError, match="sigma_data"):
        read({}, path="edm", sigma_min=0.002, sigma_max=80.0, prediction_type="epsilon")
    with pytest.raises(OptionError, match="unknown path"):
        read(config("sd3"), path="rectified")


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("sd3", dict(beta_start=0.1), "beta_start would have no effect"),
        ("sd15_pndm", dict(edm_time="log"), "edm_time would have no effect"),
        ("sd15_pndm", dict(sigma_data=0.5), "sigma_data"),
        ("flux_dev", dict(shift=3.0), "shift would have no effect"),
        ("sd15_pndm", dict(clip_sample_range=2.0), "clip_sample_range would have no effect"),
        ("sd15_pndm", dict(timestep_spacing="trailing"), "grid='trailing'"),
        ("sd15_pndm", dict(use_karras_sigmas=True), "grid='karras'"),
        ("wan_unipc", dict(flow_shift=5.0), "shift="),
        ("sd15_pndm", dict(betta_end=0.5), "beta_end"),
        ("sd15_pndm", dict(grid="karas"), "karras"),
        ("flux_dev", dict(mu=0.5), "set_timesteps"),
    ],
)
def test_keys_without_effect_are_errors(name, given, text):
    with pytest.raises((OptionError, PathError), match=text):
        read(config(name), **given)


def test_the_user_wins():
    got = read(config("sdxl_euler"), grid="karras", num_train_timesteps=500, beta_end=0.02, interpolation="lam")
    assert got.settings["grid"] == "karras" and got.settings["grid_options"] == {}
    assert (got.settings["num_train_timesteps"], got.settings["beta_end"]) == (500, 0.02)
    assert read(config("flux_dev"), use_dynamic_shifting=False, shift=2.0).path.factor == 2.0
    assert read(config("table_scheduler"), grid="trailing").settings["grid_options"] == {}
    assert read(config("table_scheduler"), grid_options={"rho": 3.0}).settings["grid_options"] == {"rho": 3.0}


# ---------------------------------------------------------------------- grids that configs ask for
@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("DDIMScheduler", dict(timestep_spacing="leading", steps_offset=1), ("leading", {"offset": 1})),
        ("PNDMScheduler", dict(timestep_spacing="linspace"), ("linspace", {})),
        ("EulerDiscreteScheduler", dict(timestep_spacing="linspace"), ("linspace", {"rounded": False})),
        ("EulerDiscreteScheduler", dict(timestep_spacing="leading"), ("leading", {})),
        ("UniPCMultistepScheduler", dict(timestep_spacing="leading"), ("leading", {"open_end": True})),
        ("DEISMultistepScheduler", dict(timestep_spacing="linspace"), ("linspace_open", {})),
        ("DDPMScheduler", dict(timestep_spacing="trailing"), ("trailing", {})),
        ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True), ("karras", {})),
        ("DPMSolverMultistepScheduler", dict(use_lu_lambdas=True), ("uniform_lambda", {})),
        ("UniPCMultistepScheduler", dict(use_exponential_sigmas=True), ("exponential", {})),
        ("EulerDiscreteScheduler", dict(use_beta_sigmas=True), ("beta", {})),
        (
            "EulerDiscreteScheduler",
            dict(use_karras_sigmas=True, timestep_spacing="leading", steps_offset=1),
            ("karras", {"within": "leading", "offset": 1}),
        ),
        ("EulerDiscreteScheduler", dict(use_karras_sigmas=True, sigma_max=9.0), ("karras", {"sigma_max": 9.0})),
        ("FlowMatchEulerDiscreteScheduler", dict(use_karras_sigmas=True), ("karras", {"within": "trailing"})),
        ("EDMEulerScheduler", dict(sigma_schedule="exponential"), ("exponential", {})),
        ("EDMEulerScheduler", dict(rho=5.0), ("karras", {"rho": 5.0})),
        ("DDIMScheduler", {}, ("linspace_open", {})),
        ("FlowMatchEulerDiscreteScheduler", {}, ("trailing", {})),
    ],
)
def test_grids_that_are_asked_for(name, keys, expected):
    settings = read(build(name, **keys)).settings
    assert grid_of(settings)[:2] == expected
    assert grid_of(settings)[2] == "zero"


def test_two_grids_at_once():
    with pytest.raises(OptionError, match="use_karras_sigmas and use_beta_sigmas"):
        read({**config("sd15_pndm"), "use_karras_sigmas": True, "use_beta_sigmas": True})


def test_where_the_run_ends():
    assert read(build("DDIMScheduler", set_alpha_to_one=False)).settings["final_sigmas_type"] == "zero"
    assert read(build("EulerDiscreteScheduler", final_sigmas_type="sigma_min")).settings["final_sigmas_type"] == (
        "sigma_min"
    )


def test_dynamic_shift_belongs_to_a_run():
    settings = read(config("flux_dev")).settings
    assert "mu" not in settings
    shifted = nodes(path_of(settings, mu=1.15), 4, "trailing")
    s = np.array([1.0, 0.75, 0.5, 0.25])
    assert np.allclose([n.sigma for n in shifted[:-1]], np.exp(1.15) / (np.exp(1.15) + 1 / s - 1), atol=1e-12)
