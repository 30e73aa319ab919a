"""`diffaccel calibrate fit` and the example, on an embedded model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffaccel import models
from diffaccel.artifact import Artifact
from diffaccel.cli import main
from diffaccel.schedulers import FittedScheduler

ROOT = Path(__file__).parents[2]
QUICK = {"samples": 8, "holdout": 16, "teacher_steps": 40, "grids": "gits", "moves": 0, "refine": 1, "rivals": "none"}


@pytest.mark.filterwarnings("ignore::diffaccel.errors.ArtifactWarning")
def test_the_command_writes_an_artifact_that_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trained model, guidance 4, 6 calls: the held-out error falls against every baseline."""
    out = tmp_path / "fit.safetensors"
    sets = [part for key, value in QUICK.items() for part in ("--set", f"{key}={value}")]
    size = ["--call", "height=32", "--call", "width=32"]
    command = ["calibrate", "fit", "tiny-sd", "--calls", "6", "--guidance", "4", "--out", str(out), "--cpu"]
    assert main([*command, *sets, *size]) == 0
    printed = capsys.readouterr().out
    assert printed.index("fit: at most") < printed.index("fit: about ") < printed.index("minutes, by the first run")
    assert "verdict: fitted" in printed
    found = Artifact.load(out, "fit")
    assert found.meta["guidance"] == 4 and found.meta["calls"] == [6]
    pipe = models.load("tiny-sd")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FittedScheduler.from_config(pipe.scheduler.config, artifact=out, pipe=pipe)
    image = pipe("a photo of a red coat", num_inference_steps=6, output_type="latent", height=32, width=32).images
    assert torch.isfinite(image).all()


def test_a_wrong_option_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["calibrate", "fit", "tiny-sd", "--calls", "6", "--out", str(tmp_path / "x.safetensors"), "--cpu"]
    assert main([*command, "--set", "grids=karas"]) == 2
    assert "unknown grid 'karas'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_example_runs_as_written(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "fit_scheduler.py"), "--moves", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "verdict: fitted" in done.stdout and (tmp_path / "fitted.png").stat().st_size > 200
