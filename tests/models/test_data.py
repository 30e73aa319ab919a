"""Words, captions and the colouring rule."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from diffaccel.models import data, words


def test_meanings_and_captions() -> None:
    assert len(words.all_captions()) == len(set(words.all_captions())) + 2 * 60  # the silent pattern repeats thrice
    assert all(words.meaning(*words.parts(m)) == m for m in range(180))
    assert words.caption(words.meaning(0, 4, 2), 0) == "a photo of a blue t-shirt on a black background"
    assert words.caption(words.meaning(9, 0, 1), 3) == "a red ankle boot"
    assert words.draw(5, 1) == words.draw(9, 1)[:5] != words.draw(5, 2)


def test_batch_rows_are_those_of_the_captions(fake_data: Path) -> None:
    train = data.load(fake_data, "train")
    batch = data.draw(train, 20, torch.Generator().manual_seed(0))
    captions = words.all_captions()
    for i in range(20):
        thing, colour = words.THINGS[batch.thing[i]], list(words.COLOURS)[batch.colour[i]]
        assert f"{colour} {thing}" in captions[batch.caption[i]]
        assert words.parts(int(batch.meaning[i])) == (batch.thing[i], batch.colour[i], batch.background[i])


@pytest.mark.parametrize("size", [32, 64])
def test_colouring_rule(size: int) -> None:
    grey = torch.zeros(1, 28, 28, dtype=torch.uint8)
    grey[:, 10:18, 10:18] = 255
    x = data.render(grey, torch.tensor([0]), torch.tensor([1]), size)
    assert x.shape == (1, 3, size, size) and x.dtype == torch.uint8
    assert x[0, :, 0, 0].tolist() == [128] * 3  # background grey
    assert x[0, :, size // 2, size // 2].tolist() == [200, 30, 40]  # full light: the colour itself
    grey[:] = 128
    g = 128 / 255
    want = [round((0.35 + 0.65 * g) * c) for c in (200, 30, 40)]
    assert data.render(grey, torch.tensor([0]), torch.tensor([1]), size)[0, :, size // 2, size // 2].tolist() == want
    with pytest.raises(ValueError, match="48"):
        data.render(grey, torch.tensor([0]), torch.tensor([1]), 48)


def test_reference_is_fixed(fake_data: Path) -> None:
    test = data.load(fake_data, "test")
    a, b = data.reference(test), data.reference(test, 64)
    assert torch.equal(a.images, data.reference(test).images)
    assert torch.equal(a.meaning, b.meaning)
    g = torch.Generator().manual_seed(0)  # all colours first, then all backgrounds
    assert torch.equal(a.colour, torch.randint(6, (40,), generator=g))
    assert torch.equal(a.background, torch.randint(3, (40,), generator=g))


def test_missing_data_says_what_to_get(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="dataset-fashion-mnist") as error:
        data.load(tmp_path, "train")
    assert all(name in str(error.value) for pair in data.FILES.values() for name in pair)


@pytest.mark.parametrize("damage", ["truncated", "other kind"])
def test_damaged_data_is_named(fake_data: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(fake_data, tmp_path / "d")
    images, labels = data.FILES["train"]
    if damage == "truncated":
        (folder / images).write_bytes((fake_data / images).read_bytes()[:50])
    else:
        shutil.copy(fake_data / labels, folder / images)
    with pytest.raises(data.DataError, match=images):
        data.load(folder, "train")


def test_float_range() -> None:
    assert data.to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    assert data.to_float(torch.tensor([128], dtype=torch.uint8)).item() == pytest.approx(128 / 127.5 - 1, abs=1e-6)
