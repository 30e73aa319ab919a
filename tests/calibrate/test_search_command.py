"""`diffaccel calibrate search`, `align`, `ays` and the example, on an embedded model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffaccel import models
from diffaccel.artifact import Artifact
from diffaccel.cli import main
from diffaccel.schedulers import FittedScheduler, TableScheduler

ROOT = Path(__file__).parents[2]
QUICK = {"samples": 4, "holdout": 8, "teacher_steps": 24, "rivals": "none", "progress": False}
MORE = {"search": {"trials": 4, "beam_width": 1, "spaces": "x0"}, "align": {"rounds": 1}, "ays": {"until": 0.2}}

pytestmark = pytest.mark.filterwarnings("ignore::diffaccel.errors.ArtifactWarning")


def command(kind: str, out: Path, model: str = "tiny-sd", **options: object) -> list[str]:
    sets = [part for k, v in {**QUICK, **MORE[kind], **options}.items() for part in ("--set", f"{k}={v}")]
    size = ["--call", "height=32", "--call", "width=32", "--guidance", "4", "--cpu"]
    return ["calibrate", kind, model, "--calls", "4", "--out", str(out), *size, *sets]


def test_tables_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A searched table, the same aligned, images with it."""
    searched, aligned = tmp_path / "search.safetensors", tmp_path / "align.safetensors"
    assert main(command("search", searched)) == 0
    assert main(command("align", aligned, base=searched)) == 0
    printed = capsys.readouterr().out
    assert "rows: [{'order'" in printed and "fed t: [" in printed and "verdict: " in printed
    pipe = models.load("tiny-sd")
    for file, kind in ((searched, "search"), (aligned, "align")):
        assert Artifact.load(file, kind).meta["calls"] == [4]
        scheduler = TableScheduler.from_config(pipe.scheduler.config, artifact=file, pipe=pipe)
        assert scheduler.config.sampler == "fitted"
        FittedScheduler.from_config(pipe.scheduler.config, artifact=file).set_timesteps(4)
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red bag\n")
    generate = ["generate", "tiny-sd", "--prompts", str(prompts), "--calls", "4", "--guidance", "4", "--cpu"]
    assert main([*generate, "--artifact", str(aligned), "--out", str(tmp_path / "i")]) == 0
    assert len(list((tmp_path / "i").rglob("*.png"))) == 1


def test_a_grid_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ays.safetensors"
    assert main(command("ays", out)) == 0
    printed = capsys.readouterr().out
    assert "for stochastic samplers" in printed and "bound on held-out images" in printed
    pipe = models.load("tiny-sd")
    scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="dpmpp_2m_sde", grid=out, pipe=pipe)
    scheduler.set_timesteps(4)
    assert len(scheduler.timesteps) == 4


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("search", {"spaces": "flow"}, "unknown space 'flow'"),
        ("align", {"base": "heun"}, "one call an interval"),
        ("ays", {"until": 1000}, "until must be a level"),
        ("ays", {"rounds": 2}, "rounds"),
    ],
)
def test_wrong_options_are_refused(
    kind: str, options: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(kind, tmp_path / "x.safetensors", **options)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_example_runs_as_written(tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "examples" / "search_scheduler.py"), "--trials", "1", "--calls", "3"]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rows:" in done.stdout and "fed t:" in done.stdout
    assert (tmp_path / "searched.png").stat().st_size > 200
