"""`diffaccel eval sweep` and `eval report`: what is typed."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from diffaccel import models
from diffaccel.cli import main
from diffaccel.errors import OptionError
from diffaccel.sweep_command import parse_calls, parse_schedulers


def test_schedulers_as_typed():
    text = (
        "deis:order=2:grid=karras:grid_options={'rho': 4.0}, unipc,DPMSolverMultistepScheduler:use_karras_sigmas=true"
    )
    assert parse_schedulers(text) == {
        "deis:order=2:grid=karras:grid_options={'rho': 4.0}": (
            "deis",
            {"order": 2, "grid": "karras", "grid_options": {"rho": 4.0}},
        ),
        "unipc": ("unipc", {}),
        "DPMSolverMultistepScheduler:use_karras_sigmas=true": (
            "DPMSolverMultistepScheduler",
            {"use_karras_sigmas": True},
        ),
    }
    assert parse_schedulers("") == {}
    with pytest.raises(OptionError, match="unipc is given twice"):
        parse_schedulers("unipc,unipc")


def test_budgets_as_typed():
    assert parse_calls("5, 8,10") == [5, 8, 10]
    for bad in ("", "5,", "5,x", "0", "-3"):
        with pytest.raises(OptionError, match=r"budgets are written 5,8,10,20"):
            parse_calls(bad)


@pytest.mark.parametrize("name", models.names())
def test_the_embedded_models(name, tmp_path, capsys):
    given = ["eval", "sweep", name, "--cpu", "--calls", "2", "--schedulers", "dpmpp:order=2", "--images", "4"]
    assert main([*given, "--batch", "4", "--teacher-calls", "4", "--out", str(tmp_path / "out")]) == 0
    assert "no benefit found" in capsys.readouterr().out
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    ours = [r for r in data["rows"] if r["name"] == "dpmpp:order=2"]
    assert [r["calls_made"] for r in ours] == [2] and all(r["fid"] for r in data["rows"])
    assert all(bool(r["clip"]) == (name != "tiny-pixel") for r in data["rows"])
    assert data["model"]["options"].get("guidance_scale") == (None if name == "tiny-pixel" else 4.0)
    names = {r["name"] for r in data["rows"]}
    assert ("flow Euler with all sigmas" in names) == (name == "tiny-flow") and {"DPM++ 2M", "UniPC"} <= names
    assert main(["eval", "report", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    "more, message",
    [
        (("--schedulers", "unipcc"), "unknown scheduler 'unipcc'. Did you mean 'unipc'?"),
        (("--schedulers", "unipc:ordre=3"), "ordre"),
        (("--stock", "Uni"), "unknown stock scheduler 'Uni'. Did you mean 'UniPC'? Known: DPM++ 2M, UniPC, own"),
        (("--calls", "five"), "budgets are written"),
        (("--prompts", "nowhere.txt"), "nowhere.txt: cannot read the prompts"),
        (("--block", "0"), "block is 1 or more, got 0"),
        (("--images", "0"), "--images is 2 or more, got 0"),
        (("--batch", "0"), "--batch is 1 or more, got 0"),
        (("--seed", "-1"), "seeds are 0 or more and below 2**63, got -1"),
        (("--seed", "9" * 20), "seeds are 0 or more and below 2**63"),
        (("--threads", "0"), "--threads is 1 or more"),
        (("--processes", "2"), "--processes 2 was asked for but 1 run"),
    ],
)
def test_wrong_commands(tmp_path, capsys, more, message):
    given = ["eval", "sweep", "tiny-sd", "--cpu", "--calls", "3", "--images", "4", "--out", str(tmp_path / "out")]
    assert main([*given, *more]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert main(["eval", "report", str(tmp_path / "none")]) == 2


def test_the_example(tmp_path, capsys, monkeypatch):
    script = Path(__file__).resolve().parents[1] / "examples" / "sweep.py"
    options = ["--images", "8", "--calls", "3", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [str(script), *options])
    runpy.run_path(str(script), run_name="__main__")
    assert "index.html" in capsys.readouterr().out and (tmp_path / "out" / "index.html").exists()
