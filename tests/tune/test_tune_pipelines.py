"""Tuning through pipelines of diffusers: unpacked and packed latents, images and video, static and dynamic shift."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffaccel as da
from diffaccel import models
from diffaccel.calibrate.engine import Engine
from diffaccel.cli import main
from diffaccel.drive import denoiser
from diffaccel.errors import ArtifactError, OptionError
from diffaccel.pipelines.applied import applied
from diffaccel.pipelines.recipe import Choice, Recipe
from diffaccel.schedulers.from_config import read
from diffaccel.testing.pipelines import build, call_kwargs
from diffaccel.tune.candidates import SOURCES, Asked, gather, source
from diffaccel.tune.equal_work import flops
from diffaccel.tune.sources import scheduler

ROOT = Path(__file__).parents[2]
FIXED = ("num_inference_steps", "generator", "output_type", "prompt", "guidance_scale")
pytestmark = pytest.mark.filterwarnings("ignore::diffaccel.errors.ArtifactWarning")  # random weights: what a fit says


@source("pair")
def two(asked):
    return [scheduler(asked.calls, s, {}, ("trailing", {})) for s in ("ddim", "deis")]


@pytest.fixture(autouse=True, scope="module")
def _sources():
    yield
    del SOURCES["pair"]


@pytest.mark.parametrize(
    ("name", "stock"),
    [("sd15", False), ("sdxl", False), ("sd3", False), ("flux", True), ("qwen_image", False), ("wan", True)],
)
def test_tuned_recipe_runs(name, stock, tmp_path):
    pipe, given = build(name), call_kwargs(name)
    before, out = pipe.scheduler, tmp_path / "recipe.json"
    call = {k: v for k, v in given.items() if k not in FIXED}
    options = {"images": 8, "holdout": 8, "teacher_steps": 16, "batch": 8, "progress": False, "stock": stock}
    fit = {"samples": 4, "holdout": 4, "moves": 0, "refine": 0, "grids": "time"}
    recipe = da.tune(
        pipe, ["a red fox", "a hat"], 3, sources=("pair", "fitted"), fit=fit, out=out,
        guidance=given.get("guidance_scale"), **options, **call,
    )  # fmt: skip
    assert pipe.scheduler is before and recipe == Recipe.load(out)
    assert recipe.receipt["search"]["candidates"] >= 2
    assert not set(recipe.receipt.get("left out", {})) & {"ddim(trailing)", "deis(trailing)"}
    assert recipe.receipt["plain run"]["geometric mean"] < 10
    assert not stock or recipe.receipt["best stock scheduler"]["geometric mean"] < 10
    kwargs = {k: v for k, v in given.items() if k != "num_inference_steps"}
    with da.accelerate(pipe, out) as h:
        found = torch.as_tensor(h(**kwargs)[0])
    assert torch.isfinite(found).all() and pipe.scheduler is before


def test_the_command_on_a_trained_model(tmp_path, capsys):
    out = tmp_path / "recipe.json"
    table = ["--table", str(models.fitted("tiny-sd"))]
    size = ["--call", "height=32", "--call", "width=32", "--set", "stock=false", "--cpu", "--no-fit"]
    small = ["--images", "8", "--holdout", "16", "--teacher-steps", "40", "--set", 'sources=("pair","fitted")']
    assert main(["tune", "tiny-sd", "--calls", "8", "--guidance", "4", "--out", str(out), *table, *size, *small]) == 0
    printed = capsys.readouterr().out
    assert "tune: 2 candidates" in printed and f"wrote {out}: fitted(tiny-sd-fit.safetensors)" in printed
    assert "verdict: better than the pipeline's" in printed
    assert main(["tune", "tiny-sd", "--calls", "8", "--out", str(out), "--with", "stagd", *size, *small[:-2]]) == 2
    assert "unknown source of candidates 'stagd'. Did you mean 'staged'?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_example_runs_as_written(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "examples" / "tune.py"),
        "--images",
        "8",
        "--calls",
        "6",
        "--out",
        "recipe.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "verdict:" in done.stdout and (tmp_path / "tuned.png").stat().st_size > 200


# ---------------------------------------------------------------------- at equal work
def asked_of(pipe, calls, call):
    engine = Engine(pipe, ["a red fox"], call=call, guidance=4.0, batch=1, progress=False)

    def run(steps):
        engine.run(engine.batches(0, 1)[0], pipe.scheduler, steps)

    return Asked(pipe, read(pipe.scheduler.config), calls, run=run)


@pytest.mark.filterwarnings("ignore:.*steps. a cache gains little")
@pytest.mark.parametrize(("name", "model"), [("cache", "tiny-sd"), ("cache", "tiny-flow"), ("staged", "tiny-sd")])
def test_candidates_at_equal_work_do_the_work_that_they_state(name, model):
    """Counted again, in runs of the very candidates: never more than the plain run's, and close to it."""
    pipe, size = models.load(model), 64 if name == "staged" else 32
    pipe.set_progress_bar_config(disable=True)
    before = pipe.scheduler
    asked = asked_of(pipe, 10, {"height": size, "width": size} | models.CALL_DEFAULTS.get(model, {}))
    full = flops(pipe, lambda: asked.run(10)) / 10
    found = gather([name], asked)
    assert found and pipe.scheduler is before
    for choice in found[::5]:
        with applied(pipe, choice):
            work = flops(pipe, lambda choice=choice: asked.run(choice.calls)) / full
        assert work == pytest.approx(choice.work, rel=2e-3) and work <= 10.2
        assert choice.calls > 10 and Choice.from_json(choice.to_json()).to_json() == choice.to_json()
    assert pipe.scheduler is before and not hasattr(denoiser(pipe), "_diffusers_hook")


def test_caches_that_few_steps_do_not_allow_are_left_out_by_name():
    pipe = models.load("tiny-flow")
    asked = asked_of(pipe, 6, {"height": 32, "width": 32} | models.CALL_DEFAULTS["tiny-flow"])
    found = gather(["cache"], asked)
    assert all(choice.settings["cache"]["interval"] == 2 or choice.calls > 8 for choice in found)
    assert any("every(3" in name and "an interval of 2 is the largest" in why for name, why in asked.left_out.items())


def test_a_cache_in_a_recipe_runs_as_the_wrapper_does():
    pipe = models.load("tiny-sd")
    pipe.set_progress_bar_config(disable=True)
    before, cache = pipe.scheduler, da.Cache.every(2, forecast=1)
    call = {"height": 32, "width": 32, "guidance_scale": 4.0, "output_type": "latent"}
    plain = scheduler(12, "deis", {"order": 2}, ("trailing", {}))
    pipe.scheduler = da.TableScheduler.from_config(before.config, **plain.settings)
    with da.quant_cache(pipe, cache=cache) as h:
        wanted = h("a photo of a red coat", num_inference_steps=12, generator=seeded(), **call).images
    pipe.scheduler = before
    settings = {"scheduler": dict(plain.settings), "cache": cache.to_dict()}
    choice = Choice.from_json(Choice("cached", "cached", settings, 12, 10.0).to_json())
    handle = applied(pipe, choice)
    found = handle("a photo of a red coat", num_inference_steps=12, generator=seeded(), **call).images
    assert torch.equal(found, wanted) and handle.report().cache.steps == 12
    with pytest.raises(ArtifactError, match="a recipe for 12 model calls, and this run has 8"):
        pipe("a photo of a red coat", num_inference_steps=8, **call)
    with pytest.raises(OptionError, match="wrapped by"):
        applied(pipe, choice)
    handle.remove()
    handle.remove()
    assert pipe.scheduler is before and not hasattr(pipe.unet, "_diffusers_hook")


def seeded():
    return torch.Generator().manual_seed(1)
