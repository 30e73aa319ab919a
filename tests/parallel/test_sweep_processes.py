"""A sweep by one process or two, undisturbed or killed, makes the same report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from jobs import outcome

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def codes(work) -> dict:
    return outcome(HERE / "sweep_jobs.py", work, 900)


def plain(folder: Path) -> dict:
    """report.json without seconds, and what is said of them."""
    found = json.loads((folder / "report.json").read_text())
    for row in found["rows"]:
        row["seconds"] = None
    found["warnings"] = [w for w in found["warnings"] if not w.startswith("some seconds are")]
    return {k: v for k, v in found.items() if k != "command"}


def blocks(folder: Path) -> dict[str, dict]:
    """The images, latents and measurements of every block, to the bit."""
    found = {}
    for path in sorted(folder.glob("cells/*/*.npz")):
        with np.load(path) as data:
            found[str(path.relative_to(folder))] = {k: data[k].tobytes() for k in data.files if k != "counted"}
    return found


def test_two_processes_make_what_one_makes(codes, work):
    assert codes["w1"] == [0] and codes["w2"] == [0, 0], (work / "w2.log").read_text()
    alone = blocks(work / "w1")
    assert sum("." not in Path(name).stem for name in alone) == 26
    assert blocks(work / "w2") == alone
    assert plain(work / "w2") == plain(work / "w1")


def test_a_killed_sweep_goes_on(codes, work):
    assert codes["killed"] == [-9, -9] and 6 <= codes["left_after_kill"] < 26
    assert codes["resumed"] == [0], (work / "broken.log").read_text()
    assert blocks(work / "broken") == blocks(work / "w1")
    assert plain(work / "broken") == plain(work / "w1")


def test_a_wrong_option_is_said_once(codes, work):
    assert codes["stranger"] == [2, 2]
    text = (work / "bad.log").read_text()
    assert text.count("no file or folder nowhere") == 1 and "Traceback" not in text
