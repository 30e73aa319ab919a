"""Patches on real ranks (gloo): the bits of the emulated ones, and one named error whatever happens to a rank."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from jobs import outcome

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """What the ranks of each scenario of patch_jobs.py did."""
    work = tmp_path_factory.mktemp("patch")
    return outcome(HERE / "patch_jobs.py", work, 300) | {"folder": work}


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_compute_the_bits_of_emulated_ranks(runs, ranks):
    found = runs[f"same {ranks}"]
    assert found["codes"] == [0] * ranks, found["text"]
    emulated = list(runs["folder"].glob("* emulated.pt"))
    assert len(emulated) >= 8
    for file in (f for f in emulated if f" {ranks} " in f.name):
        want = torch.load(file)
        for rank in range(ranks):
            got = torch.load(file.with_name(file.name.replace("emulated", str(rank))))
            assert all(torch.equal(a, b) for a, b in zip(got["outputs"], want["outputs"], strict=True)), file.name
            assert got["bytes"] == want["bytes"][rank], file.name


def test_all_ranks_make_the_same_image_and_the_same_one_twice(runs):
    assert runs["image"]["codes"] == [0, 0, 0], runs["image"]["text"]
    found = [torch.load(runs["folder"] / f"image 3 {r}.pt") for r in range(3)]
    for images in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(images, found[0], strict=True))
    without, first, again = found[0]
    assert torch.equal(first, again) and not torch.equal(first, without)


def said(found: dict) -> dict[int, str]:
    """What each rank was told."""
    return {int(r): text for r, text in re.findall(r"^RANK (\d) (.*)$", found["text"], re.MULTILINE)}


def test_an_error_on_one_rank_reaches_all_with_its_name_and_layer(runs):
    found = runs["raises"]
    assert found["codes"] == [2, 2, 2]
    texts = said(found)
    assert sorted(texts) == [0, 1, 2], found["text"]
    assert "MemoryError" in texts[1]
    for rank in (0, 2):
        assert "WorldError" in texts[rank] and "rank 1 failed: MemoryError: out of memory" in texts[rank]
        assert "down_blocks.1" in texts[rank] and "call 0" in texts[rank]
    assert found["seconds"] < 30


def test_a_rank_that_is_killed_is_named_by_all_others(runs):
    found = runs["dies"]
    assert found["codes"] == [2, -9, 2]
    texts = said(found)
    assert sorted(texts) == [0, 2], found["text"]
    assert all("rank 1" in text and "last seen at" in text and "call 2" in text for text in texts.values())


def test_a_rank_that_hangs_is_named_within_the_time_out(runs):
    found = runs["hangs"]
    assert found["codes"] == [2, 2]
    texts = said(found)
    assert all("rank 0 waited 4 s for rank 1, last seen at" in text for text in texts.values())
    assert found["seconds"] < 60


@pytest.mark.parametrize(
    "scenario, names",
    [
        ("seed", "latents: rank 0 has .*generator=torch.Generator"),
        ("prompt", "arguments.encoder_hidden_states"),
        ("size", "size: rank 0 has"),
        ("steps", "timesteps: rank 0 has"),
        ("mode", 'settings.mode: rank 0 has "sync", rank 1 has "displaced"'),
    ],
)
def test_ranks_that_would_make_different_images_all_say_in_what(runs, scenario, names):
    found = runs[scenario]
    assert found["codes"] == [2, 2], found["text"]
    texts = said(found)
    assert sorted(texts) == [0, 1], found["text"]
    assert all(re.search(names, text) for text in texts.values()), texts
