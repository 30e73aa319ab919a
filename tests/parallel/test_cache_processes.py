"""A cache that two processes calibrated is the one that a single process calibrated, up to rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from jobs import outcome

from diffaccel.artifact import Artifact

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def codes(work) -> dict:
    return outcome(HERE / "cache_jobs.py", work, 600)


def made(work: Path, name: str) -> Artifact:
    return Artifact.load(work / f"{name}.safetensors", "cache")


def test_two_processes_learn_what_one_learns(codes, work):
    assert codes["w1"] == [0] and codes["w2"] == [0, 0], (work / "w2.log").read_text()
    one, two = made(work, "w1"), made(work, "w2")
    assert one.meta["key"] == two.meta["key"] and one.meta["mask"] == two.meta["mask"] and sum(one.meta["mask"]) == 4
    for a, b in zip(one.meta["runs"], two.meta["runs"], strict=True):
        assert a["decisions"] == b["decisions"] and a["compensated"] == b["compensated"]
        assert b["error"] == pytest.approx(a["error"], rel=1e-3)
        kept, same = (r.receipt[a["name"]] for r in (one, two))
        told = "choice (root mean square error)"
        assert kept.get(told, {}).get("masks tried") == same.get(told, {}).get("masks tried")
        calls = next(key for key in kept if "as many full calls" in key)
        assert same[calls] == pytest.approx(kept[calls], rel=1e-3)
        interval = (r["compensation"]["held-out error"] for r in (kept, same))
        first, second = interval
        assert first["images"] == second["images"] == 8
        assert second["difference"] == pytest.approx(first["difference"], rel=0.05, abs=1e-5)
    assert one.tensors.keys() == two.tensors.keys()
    for name, values in one.tensors.items():
        np.testing.assert_allclose(two.tensors[name], values, rtol=1e-4, atol=1e-5)
    for key in ("0.1", "0.3", "quartiles of d"):
        assert one.receipt["first_block"][key] == two.receipt["first_block"][key]


def test_the_work_is_shared(codes, work):
    one, two = made(work, "w1").meta["cost"]["calls"], made(work, "w2").meta["cost"]["calls"]
    assert one <= two < 1.15 * one  # of both together: timing is done by each
    assert sorted(p.name for p in work.iterdir() if "partial" in p.name) == []


def test_weighted_compensation_is_the_same_of_two(codes, work):
    assert codes["tac"] == [0, 0] and codes["tac alone"] == [0], (work / "tac.log").read_text()
    one, two = made(work, "tac alone"), made(work, "tac")
    (a,), (b,) = one.meta["runs"], two.meta["runs"]
    gains = (r.receipt[r.meta["runs"][0]["name"]]["compensation"]["gains"] for r in (one, two))
    assert len(set(gains)) == 1 and a["compensated"] == b["compensated"]


def test_too_few_images_for_the_processes_are_refused(codes, work):
    assert codes["few"] == [2, 2, 2]
    text = (work / "few.log").read_text()
    assert text.count("3 process(es)") == 1 and "Traceback" not in text
