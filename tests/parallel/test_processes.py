"""The command with a real pipeline: the same bytes from any number of processes, also after a SIGKILL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import outcome

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def codes(work) -> dict:
    return outcome(HERE / "pipeline_jobs.py", work, 400)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder; of the lines all but the seconds, which are measured."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    lines = [json.loads(line) for line in found["images.jsonl"].splitlines()]
    found["images.jsonl"] = json.dumps([{**line, "seconds": None} for line in lines]).encode()
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_number_of_processes_changes_nothing(codes, work, size):
    assert codes["w1"] == [0] and codes[f"w{size}"] == [0] * size, (work / f"w{size}.log").read_text()
    alone, many = contents(work / "w1"), contents(work / f"w{size}")
    assert len(alone) == 20 + 2  # images, recipe, lines
    assert alone == many


def test_seeds_and_prompts_change_images(codes, work):
    lines = [json.loads(line) for line in (work / "w1" / "images.jsonl").read_text().splitlines()]
    assert [r["index"] for r in lines] == list(range(20)) == [r["seed"] for r in lines]
    assert [r["prompt"] for r in lines[:4]] == ["a red fox", "a blue coat", "a green hat", "a red fox"]
    assert len({r["sha256"] for r in lines}) == 20
    assert {r["calls"] for r in lines} == {3}
    assert all(r["seconds"] > 0 and r["scheduler"].startswith("PNDMScheduler-") for r in lines)


def test_killed_and_resumed_by_another_number_of_processes(codes, work):
    assert codes["killed"] == [-9, -9] and codes["killed_again"] == [-9, -9, -9]
    assert 5 <= codes["left_after_kill"] < 20
    assert codes["resumed"] == [0, 0, 0], (work / "broken.log").read_text()
    assert codes["resumed_again"] == [0], (work / "broken2.log").read_text()
    undisturbed = contents(work / "w1")
    assert contents(work / "broken") == undisturbed
    assert contents(work / "broken2") == undisturbed


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_outlives_the_other_says_so_once_and_leaves_what_can_be_resumed(codes, work, victim):
    found = codes[f"without{victim}"]
    assert found["codes"][victim] == -9 and found["codes"][1 - victim] == 2, found
    assert found["text"].count("diffaccel: rank") == 1 and "Traceback" not in found["text"], found["text"]
    why = "lost the store" if victim == 0 else "for rank 1 (last image); rank 1 was last alive"
    assert why in found["text"] and 5 <= found["left"] < 20, found
    assert found["resumed"] == [0, 0, 0], (work / f"without{victim}.log").read_text()
    assert contents(work / f"without{victim}") == contents(work / "w1")


def test_a_failing_chunk_is_listed_once_and_the_rest_is_made(codes, work):
    """By two processes, and once more by one, which finds nothing else left to do."""
    assert codes["failing2"] == [3, 3] and codes["failing1"] == [3], (work / "failing2.log").read_text()
    for size in (1, 2):
        text = (work / f"failing{size}.log").read_text()
        assert text.count("1 of 6 images failed; the other 5 are there") == 1 and "Traceback" not in text, text
        assert "chunk 3 (images 3 to 3; first prompt '5000', seed 3): IndexError" in text
    found = contents(work / "failing")
    assert [json.loads(line)["images"] for line in found["failed.jsonl"].splitlines()] == [[3]]
    assert len(found) == 5 + 3  # images, recipe, lines, failures


def test_another_recipe_is_refused_once_and_changes_nothing(codes, work):
    assert codes["stranger"] == [2, 2]
    text = (work / "w2.log").read_text()
    assert text.count("holds images of another recipe") == 1
    assert "call.guidance_scale: the folder has null, this run has 2.0" in text
    assert contents(work / "w2") == contents(work / "w1")


@pytest.mark.slow
def test_torchrun(codes, work):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "diffaccel",
    ]
    command += [
        "generate",
        str(work / "model"),
        "--prompts",
        str(work / "prompts.txt"),
        "--out",
        str(work / "launched"),
    ]
    command += ["--calls", "3", "--batch", "2", "--seeds", "0-19", "--height", "32", "--width", "32", "--cpu"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    env.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes on cpu" in done.stderr
    assert contents(work / "launched") == contents(work / "w1")
