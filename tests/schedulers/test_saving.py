"""Saving and loading: pipeline folders in a fresh process, configs through JSON and other classes, portable copies."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines import pipeline_loading_utils as loading
from scheduler_runs import PATHS, SD, cases, label, loop, make, noise, sampled, uncalibrated

import diffaccel.schedulers
from diffaccel import TableScheduler, epsilon_scale, restart, time_shift
from diffaccel.core.path import Path
from diffaccel.schedulers import (
    EpsilonScalingScheduler,
    RestartScheduler,
    TimeShiftScheduler,
    UniPCScheduler,
    registration,
)
from diffaccel.testing.pipelines import build, call_kwargs

PRESETS = [c for c in vars(diffaccel.schedulers).values() if isinstance(c, type) and issubclass(c, TableScheduler)]
NAMED = [c for c in PRESETS if c.sampler_name]
# folder -> (pipeline, class, options of from_config)
SAVED = {cls.__name__: ("dit", cls, uncalibrated(cls.sampler_name)) for cls in NAMED} | {
    "sd15": ("sd15", TableScheduler, {"sampler": "dpmpp", "order": 3, "grid": "uniform_lambda"}),
    "flux": ("flux", TableScheduler, {"sampler": "heun", "clock": "flow"}),
    "restart": ("sdxl", RestartScheduler, {"segments": [(3, 1, 1.0, 3.0)], "sampler": "unipc", "order": 3}),
    "time_shift": ("sd15", TimeShiftScheduler, {"window": 40, "cutoff": 300, "sampler": "pndm", "order": 2}),
    "scaled": ("flux", EpsilonScalingScheduler, {"at_end": 1.01, "below": 3.0}),
    "wan": ("wan", UniPCScheduler, {"order": 3, "grid": "karras", "grid_options": {"rho": 5.0}}),
}
CALLS = {"num_inference_steps": 6, "mu": 0.9}
LOAD = """
import json, sys
import diffaccel
from diffusers import DiffusionPipeline
found = {}
for name in sys.argv[2:]:
    scheduler = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/{name}").scheduler
    scheduler.set_timesteps(num_inference_steps=6, mu=0.9)
    found[name] = [type(scheduler).__module__, type(scheduler).__name__, scheduler.table.digest]
print(json.dumps(found))
"""


@pytest.mark.parametrize("path", ["sd15", "flow", "edm"])
@pytest.mark.parametrize(("name", "options"), cases(), ids=label)
def test_every_sampler_comes_back_from_a_file(name, options, path, tmp_path):
    scheduler = make(path, name, **options)
    scheduler.save_pretrained(tmp_path)
    for made in (TableScheduler.from_pretrained(tmp_path), pickle.loads(pickle.dumps(scheduler))):
        for one in (made, scheduler):
            one.set_timesteps(8)
        assert made.table == scheduler.table and made.config.sampler == name


# ---------------------------------------------------------------------- pipelines
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pipelines saved with schedulers of ours, and what their tables were."""
    root, tables = tmp_path_factory.mktemp("saved"), {}
    for name, (pipeline, cls, options) in SAVED.items():
        pipe = build(pipeline)
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)
        pipe.save_pretrained(root / name)
        pipe.scheduler.set_timesteps(**CALLS)
        tables[name] = pipe.scheduler.table
    return root, tables


def test_every_preset_is_saved_under_the_name_of_the_package(folder):
    for name, (_, cls, _) in SAVED.items():
        index = json.loads((folder[0] / name / "model_index.json").read_text())
        assert index["scheduler"] == ["diffaccel", cls.__name__]
        assert getattr(diffaccel, cls.__name__) is cls and cls.__name__ in dir(diffaccel)


def test_a_fresh_process_needs_import_diffaccel_alone(folder):
    root, tables = folder
    done = subprocess.run([sys.executable, "-c", LOAD, str(root), *SAVED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded == {name: ["diffaccel", SAVED[name][1].__name__, tables[name].digest] for name in SAVED}


def test_images_of_a_loaded_pipeline_are_the_same(folder, tmp_path):
    pipe = build("sd15")
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="unipc", order=3)
    before = pipe(**call_kwargs("sd15")).images
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.allclose(loaded(**call_kwargs("sd15")).images, before, rtol=1e-5, atol=1e-5)
    assert dict(loaded.scheduler.config) == {
        k: v for k, v in pipe.scheduler.config.items() if k in loaded.scheduler.config
    }


def test_a_folder_loads_with_or_without_the_registration(folder, monkeypatch):
    assert "SchedulerMixin" in loading.LOADABLE_CLASSES["diffaccel"]
    monkeypatch.delitem(loading.LOADABLE_CLASSES, "diffaccel")
    assert type(DiffusionPipeline.from_pretrained(folder[0] / "sd15").scheduler) is TableScheduler
    registration.register_library()
    assert loading.LOADABLE_CLASSES["diffaccel"]["SchedulerMixin"] == ["save_pretrained", "from_pretrained"]


def test_registration_is_skipped_where_diffusers_has_no_such_table(monkeypatch):
    monkeypatch.delattr(loading, "LOADABLE_CLASSES")
    registration.register_library()
    assert not hasattr(loading, "LOADABLE_CLASSES")


def test_another_scheduler_can_be_given_while_loading(folder):
    other = DDIMScheduler(**SD)
    assert DiffusionPipeline.from_pretrained(folder[0] / "sd15", scheduler=other).scheduler is other


# ---------------------------------------------------------------------- configs
def reloaded(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    return type(scheduler).from_pretrained(tmp_path)


def same(a, b, **run):
    run = run or {"num_inference_steps": 9}
    a.set_timesteps(**run)
    b.set_timesteps(**run)
    return a.table == b.table


def parts(cls, path):
    """The rewriter or policy that a preset is named after, with options that fit the path."""
    shift = (2.0, -1.0) if path in ("flow", "edm") else (40, 300)
    names = ("window_lam", "cutoff_lam") if path in ("flow", "edm") else ("window", "cutoff")
    known = {
        "restart": {"rewrite": [restart([(3, 1, 1.0, 3.0)])]},
        "epsilon_scale": {"rewrite": [epsilon_scale(1.01)]},
        "time_shift": {"policy": [time_shift(**dict(zip(names, shift, strict=True)))]},
    }
    return known.get(cls.rewriter_name or cls.policy_name, {})


@pytest.mark.parametrize("cls", PRESETS)
@pytest.mark.parametrize("path", PATHS)
def test_config_through_a_file(cls, path, tmp_path):
    scheduler = cls(**PATHS[path], sampler_options=uncalibrated(cls.sampler_name) or None, **parts(cls, path))
    twin = reloaded(scheduler, tmp_path)
    public = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    assert {k: v for k, v in twin.config.items() if k != "_use_default_values"} == public
    assert same(scheduler, twin)
    assert same(pickle.loads(pickle.dumps(scheduler)), twin)
    assert same(cls.from_config(dict(scheduler.config)), twin)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor], ids=lambda k: k.__name__)
def test_trained_betas_of_every_kind(kind, tmp_path):
    betas = np.linspace(1e-4, 0.03, 50)
    scheduler = TableScheduler(num_train_timesteps=50, trained_betas=kind(betas.tolist()), sampler="unipc")
    assert isinstance(scheduler.config.trained_betas, list)
    twin = reloaded(scheduler, tmp_path)
    assert same(scheduler, twin)
    assert np.allclose(twin.betas, betas, rtol=1e-6)


def test_infinite_lambda_survives(tmp_path):
    stock = DPMSolverMultistepScheduler(**SD, lambda_min_clipped=-math.inf)
    scheduler = TableScheduler.from_config(stock.config)
    twin = reloaded(scheduler, tmp_path)
    assert same(scheduler, twin)
    clipped = TableScheduler.from_config(
        DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1).config
    )
    assert clipped.config.lambda_min_clipped == -5.1
    assert same(clipped, reloaded(clipped, tmp_path))


@pytest.mark.parametrize("other", ["DDIMScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"])
@pytest.mark.parametrize("path", ["sd15", "zero_snr", "cosine"])
def test_ours_to_diffusers_and_back_keeps_the_path(path, other):
    ours = make(path)
    foreign = getattr(diffusers, other).from_config(ours.config)
    back = TableScheduler.from_config(foreign.config)
    assert Path.from_config(back.config).digest == Path.from_config(ours.config).digest
    assert back.config.prediction_type == ours.config.prediction_type


def test_foreign_keys_survive():
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0, base_image_seq_len=99, max_shift=1.25)
    ours = TableScheduler.from_config(stock.config)
    assert ours.config.base_image_seq_len == 99 and ours.config["max_shift"] == 1.25
    back = FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    assert back.config.max_shift == 1.25 and back.config.shift == 3.0
    preset = UniPCScheduler.from_config(ours.config, order=3)
    assert preset.config.max_shift == 1.25 and preset.config.sampler_options == {"order": 3}


# ---------------------------------------------------------------------- portable copies
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan", "pixart", "dit", "ddpm"])
def test_portable_is_the_scheduler_that_the_model_came_with(name):
    pipe = build(name)
    source = pipe.scheduler
    portable = TableScheduler.from_config(source.config, sampler="deis").portable()
    assert type(portable) is type(source)
    assert type(portable).__module__.startswith("diffusers.")
    changed = {k for k, v in source.config.items() if not k.startswith("_") and portable.config[k] != v}
    assert changed <= {"clip_sample", "thresholding"}  # where the class clips by default, ours was told not to
    pipe.scheduler = portable
    assert torch.isfinite(torch.as_tensor(np.asarray(pipe(**call_kwargs(name))[0]))).all()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "dit", "sd3", "wan"])
def test_a_config_of_ours_read_again_means_the_same_grid(name):
    """`timestep_spacing` in it is only what the origin's class had; it did not count the first time either."""
    pipe = build(name)
    first = TableScheduler.from_config(pipe.scheduler.config, sampler="unipc")
    assert same(first, TableScheduler.from_config(first.config))
    changed = TableScheduler.from_config(first.config, grid="karras", grid_options={"rho": 3.0})
    assert changed.config.grid == "karras" and same(changed, TableScheduler.from_config(changed.config))
    assert TableScheduler.from_config(changed.config, grid_options={"rho": 4.0}).config.grid_options == {"rho": 4.0}
    assert TableScheduler.from_config(changed.config, grid="linspace").config.grid_options is None


def test_options_of_a_preset_belong_to_its_sampler(tmp_path):
    preset = UniPCScheduler(**SD, sampler_options={"order": 3, "variant": "bh1"})
    assert same(preset, reloaded(preset, tmp_path))
    assert same(preset, UniPCScheduler.from_config(preset.config))
    general = TableScheduler.from_config(preset.config)
    assert same(preset, general) and general.config.sampler == "unipc"
    assert TableScheduler.from_config(preset.config, sampler="dpmpp").config.sampler_options is None
    assert UniPCScheduler.from_config(preset.config, order=2).config.sampler_options == {"order": 2, "variant": "bh1"}


@pytest.mark.parametrize("path", PATHS)
def test_portable_of_a_path_by_hand(path):
    ours = make(path)
    portable = ours.portable()
    assert TableScheduler.from_config(portable.config).config.path == ours.config.path
    if path == "flow":
        assert portable.config.shift == 3.0
    if path == "edm":
        assert (portable.config.sigma_max, portable.config.sigma_data) == (80.0, 0.5)
    assert Path.from_config(portable.config).digest == Path.from_config(ours.config).digest


def test_a_run_after_loading_equals_the_run_before(tmp_path):
    scheduler, x = make("zero_snr", "ghvb"), noise(1, 4, 4, 4)
    twin = reloaded(scheduler, tmp_path)
    before = sampled(scheduler, x, 5)
    twin.set_timesteps(5)
    assert torch.equal(loop(twin, x), before)
