"""Tuning through pipelines of diffusers: unpacked and packed latents, images and video, static and dynamic shift."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffaccel as da
from diffaccel import models
from diffaccel.cli import main
from diffaccel.pipelines.recipe import Recipe
from diffaccel.testing.pipelines import build, call_kwargs
from diffaccel.tune.candidates import SOURCES, scheduler, source

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
    fit = {"samples": 4, "holdout": 4, "moves": 0, "grids": "time"}
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
