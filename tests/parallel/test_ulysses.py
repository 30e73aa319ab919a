"""Exact sharing by diffusers' context parallelism: what one process computes, with our checks around it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jobs import outcome

from diffaccel.errors import OptionError
from diffaccel.parallel.world_emulated import EmulatedWorld
from diffaccel.pipelines.patch_parallel import patch_parallel
from diffaccel.testing.pipelines import build, call_kwargs


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """What the ranks of each scenario of ulysses_jobs.py did."""
    work = tmp_path_factory.mktemp("ulysses")
    return outcome(Path(__file__).parent / "ulysses_jobs.py", work, 400) | {"folder": work}


@pytest.mark.parametrize("name", ["qwen_image", "wan", "flux"])
def test_processes_compute_what_one_computes(runs, name):
    assert runs["same"]["codes"] == [0, 0], runs["same"]["text"]
    for rank in range(2):
        found = torch.load(runs["folder"] / f"{name} {rank}.pt")
        first, again = found["shared"]
        scale = found["before"].abs().max()
        assert 0 < (first - found["before"]).abs().max() <= 1e-5 * scale, "shared, and hardly different"
        assert torch.equal(first, again)
        assert torch.equal(found["after"], found["before"]) and found["traces"] == []
        assert found["calls"] > 0
        if name != "flux":
            assert "diffusers' context parallelism (Ulysses)" in found["text"]
            assert f"{found['calls']} calls, 0 of them with late messages" in found["text"]


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("prompt", "the ranks are not about to make the same image"),
        ("heads", "the 2 attention heads of QwenImageTransformer2DModel cannot be divided among 3 ranks"),
        ("late", "WanTransformer3DModel can be shared with mode='sync' only"),
        ("split", "without guidance='split'"),
        ("twice", "as it should: this pipeline is wrapped by 'ulysses' already"),
    ],
)
def test_every_rank_is_told(runs, scenario, message):
    found = runs[scenario]
    lines = [text for text in found["text"].splitlines() if text.startswith("RANK")]
    assert set(found["codes"]) == {2} and len(lines) == len(found["codes"]), found["text"]
    assert all(message in text for text in lines), found["text"]


def test_a_rank_that_fails_ends_the_others_with_its_reason(runs):
    found = runs["raises"]
    assert found["codes"] == [2, 2] and found["seconds"] < 80
    assert "RANK 1 MemoryError: out of memory" in found["text"]
    assert "RANK 0" in found["text"]


def test_emulated_ranks_cannot_use_it():
    with pytest.raises(OptionError, match="between launched processes"):
        patch_parallel(build("wan"), "sync", world=EmulatedWorld(2))


def test_one_process_needs_nothing_of_it():
    pipe = build("wan")
    kwargs = {**call_kwargs("wan"), "output_type": "latent"}
    before = pipe(**kwargs)[0]
    with patch_parallel(pipe, "sync", world=EmulatedWorld(1)) as h:
        assert torch.equal(h(**{**call_kwargs("wan"), "output_type": "latent"})[0], before)
