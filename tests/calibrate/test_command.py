"""`diffaccel calibrate`: from the command line to an artifact, by one process or several."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from parallel.ranks import LATER, free_port

from diffaccel.artifact import Artifact
from diffaccel.cli import main
from diffaccel.testing.pipelines import build

SMALL = ["--calls", "4", "--guidance", "4", "--grid", "linspace", "--batch", "4", "--cpu"]
SMALL += ["--set", "pairs=8", "--set", "held_out=8", "--set", "teacher_calls=8", "--set", "progress=False"]


def started(command):
    """Two ranks of a command."""
    own = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    found = []
    for rank in ("0", "1"):
        env = {**os.environ, **own, "RANK": rank, "LOCAL_RANK": rank}
        found.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        time.sleep(LATER)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("calibrated") / "dc.safetensors"
    assert main(["calibrate", "dc", "tiny-sd", "--out", str(out), *SMALL]) == 0
    return out


def test_it_writes_an_artifact_and_prints_its_receipt(alone, tmp_path, capsys):
    made = Artifact.load(alone, "dc")
    assert made.meta["scheduler"]["grid"] == "linspace" and made.meta["guidance"] == 4.0
    assert made.meta["seeds"] == {"calibration": [0, 7], "held_out": [8, 15]}
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red bag\n")
    generate = ["generate", "tiny-sd", "--prompts", str(prompts), "--artifact", str(alone), "--cpu"]
    assert main([*generate, "--out", str(tmp_path / "i"), "--calls", "4", "--guidance", "4"]) == 0
    assert main([*generate, "--out", str(tmp_path / "j"), "--calls", "5"]) == 2
    assert "holds no ratios for this run" in capsys.readouterr().err
    assert main(["generate", "tiny-flow", *generate[2:], "--out", str(tmp_path / "k"), "--calls", "4"]) == 2
    assert "another path" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["4", "16"], ids=["several batches", "one batch for all"])
def test_two_processes_find_the_same_ratios(alone, tmp_path, batch):
    out = tmp_path / "dc.safetensors"
    command = [sys.executable, "-m", "diffaccel", "calibrate", "dc", "tiny-sd", "--out", str(out), *SMALL]
    ranks = started([*command, "--batch", batch])
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    both, one = Artifact.load(out, "dc"), Artifact.load(alone, "dc")
    np.testing.assert_allclose(both.tensors["ratios_0"], one.tensors["ratios_0"], atol=1e-3)
    label = "4 calls, guidance 4"
    for key in ("held-out error", "best stock scheduler"):
        for name, value in one.receipt[label][key].items():
            assert both.receipt[label][key][name] == (
                pytest.approx(value, rel=1e-2, abs=1e-4) if isinstance(value, float) else value
            )
    assert [p.name for p in tmp_path.iterdir()] == ["dc.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "pears=3"], "takes no option 'pears'"),
        (["--set", "pairs"], "key=value"),
        (["--sampler", "heun"], "unknown sampler 'heun'"),
        (["--call", "steps=3"], "steps"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    out = str(tmp_path / "x.safetensors")
    assert main(["calibrate", "dc", "tiny-sd", "--calls", "4", "--out", out, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert main(["calibrate", "ems", "tiny-sd", "--out", out, "--set", "pears=3"]) == 2
    assert "calibrate ems takes no option 'pears'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--guidance", "4", "7"], "several scales for dc alone; calibrate fit takes one"),
        (["cache", "--guidance", "4", "7"], "several scales for dc alone; calibrate cache takes one"),
        (["fit", "--set", "batch=4"], "--set batch=... has an argument of its own: give --batch B"),
        (["ems", "--set", "pipe=4"], "give MODEL"),
        (["ays", "--set", "until=zzz"], "until must be a level"),
    ],
)
def test_arguments_that_are_refused_leave_nothing(arguments, message, tmp_path, capsys):
    kind, *rest = arguments
    out = str(tmp_path / "x.safetensors")
    assert main(["calibrate", kind, "tiny-sd", "--calls", "4", "--out", out, "--cpu", *rest]) == 2
    said = capsys.readouterr()
    assert message in said.err and "at most" not in said.out and not list(tmp_path.iterdir())


def test_a_model_of_ones_own_needs_prompts(tmp_path, capsys):
    build("sd15").save_pretrained(tmp_path / "m")
    assert main(["calibrate", "dc", str(tmp_path / "m"), "--calls", "4", "--out", str(tmp_path / "x")]) == 2
    assert "--prompts FILE is needed" in capsys.readouterr().err


EAGER = """
import sys
from diffaccel.calibrate import checkpoint
checkpoint.EVERY = 0.0
from diffaccel.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_that_were_killed_go_on_to_the_same_ratios(alone, tmp_path):
    out = tmp_path / "dc.safetensors"
    arguments = [sys.executable, "-c", EAGER, "calibrate", "dc", "tiny-sd", "--out", str(out), *SMALL]
    ranks, marks = started(arguments), [tmp_path / f"dc.safetensors.partial.{r}of2" for r in range(2)]
    end = time.monotonic() + 200
    while not all(m.exists() and b"/sums" in m.read_bytes()[:20000] for m in marks):
        assert time.monotonic() < end and all(r.poll() is None for r in ranks), "killed too late"
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()
        rank.communicate()
    assert not out.exists()
    ranks = started(arguments)
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    both, one = Artifact.load(out, "dc"), Artifact.load(alone, "dc")
    np.testing.assert_allclose(both.tensors["ratios_0"], one.tensors["ratios_0"], atol=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == ["dc.safetensors"]
