"""`generate` with a painter of one line: resuming, damage, full disks, flaws."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
import torch

from diffaccel.errors import OptionError, RunError
from diffaccel.parallel.chunk import ChunkError, usable
from diffaccel.parallel.folder import Folder, FolderError, locked
from diffaccel.parallel.generate import (
    MOST,
    FailedImages,
    Painted,
    generate,
    parse_seeds,
    status,
    tasks_for,
    to_pixels,
)
from diffaccel.parallel.world import WorldError

TASKS = tasks_for([f"prompt {i}" for i in range(10)])


class Paint:
    """Images that depend on the tasks alone; `made` lists what was asked for."""

    def __init__(self, fail_at: int | None = None, error: Exception | None = None) -> None:
        self.made: list[int] = []
        self.fail_at, self.error = fail_at, error

    def __call__(self, tasks):
        if self.fail_at in [t.index for t in tasks]:
            raise self.error or ValueError("no such colour\nlong story")
        self.made += [t.index for t in tasks]
        images = [torch.rand(8, 8, 3, generator=t.generator()).numpy() for t in tasks]
        return Painted(np.stack(images), 5)


def run(out, paint=None, **more):
    given = {"batch": 3, "recipe": {"calls": 5}, "progress": False, **more}
    return generate(paint or Paint(), given.pop("tasks", TASKS), out, **given)


def files(out) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.png")}


def test_a_whole_run(tmp_path):
    report = run(tmp_path / "a")
    assert (report.images, report.made, report.nan, report.black) == (10, 10, [], [])
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["000000", "images.jsonl", "manifest.json"]
    found = status(tmp_path / "a", verify="full")
    assert (found["images"], found["done"], found["missing"], found["damaged"]) == (10, 10, [], [])


def test_nothing_is_made_twice(tmp_path):
    run(tmp_path)
    again = Paint()
    assert run(tmp_path, again).made == 0
    assert again.made == []


def test_damage_is_repaired_a_chunk_at_a_time(tmp_path):
    run(tmp_path)
    whole = files(tmp_path)
    (tmp_path / "000000/000001.png").unlink()
    (tmp_path / "000000/000009.png").write_bytes(whole["000000/000009.png"][:-5])
    lines = (tmp_path / "images.jsonl").read_bytes()
    (tmp_path / "images.jsonl").write_bytes(lines[:-20])  # torn: the last line is no line
    (tmp_path / "000000/000004.png.77.tmp").write_bytes(b"half")
    assert status(tmp_path)["missing"] == [9] and status(tmp_path)["damaged"] == [1]
    paint = Paint()
    run(tmp_path, paint)
    assert paint.made == [0, 1, 2, 9]
    assert files(tmp_path) == whole
    assert not list(tmp_path.rglob("*.tmp"))


def test_changed_pixels_are_found_by_a_full_look(tmp_path):
    run(tmp_path)
    whole = files(tmp_path)
    data = bytearray(whole["000000/000004.png"])
    data[60] ^= 255
    (tmp_path / "000000/000004.png").write_bytes(data)
    assert status(tmp_path)["done"] == 10
    assert status(tmp_path, verify="full")["damaged"] == [4]
    paint = Paint()
    run(tmp_path, paint, verify="full")
    assert paint.made == [3, 4, 5] and files(tmp_path) == whole
    with pytest.raises(OptionError, match=r"'fast'.*'full'.*not 'hard'"):
        status(tmp_path, verify="hard")


def test_a_failed_chunk_fails_alone_and_is_tried_again(tmp_path):
    run(tmp_path / "whole")
    paint = Paint(fail_at=4)
    with pytest.raises(FailedImages) as error:
        run(tmp_path / "a", paint)
    assert paint.made == [0, 1, 2, 6, 7, 8, 9] and error.value.images == [3, 4, 5]
    assert "3 of 10 images failed; the other 7 are there" in str(error.value)
    assert "chunk 1 (images 3 to 5; first prompt 'prompt 3', seed 3): ValueError: no such colour\n" in str(error.value)
    line = json.loads((tmp_path / "a" / "failed.jsonl").read_text())
    assert line["chunk"] == 1 and line["images"] == [3, 4, 5] and "no such colour" in line["error"]
    found = status(tmp_path / "a")
    assert found["done"] == 7 and found["missing"] == found["failed"] == [3, 4, 5]
    with pytest.raises(FailedImages):  # also where nothing else is left to do
        run(tmp_path / "a", Paint(fail_at=4))
    paint = Paint()
    run(tmp_path / "a", paint)
    assert paint.made == [3, 4, 5] and files(tmp_path / "a") == files(tmp_path / "whole")
    assert status(tmp_path / "a")["failed"] == [] and not (tmp_path / "a" / "failed.jsonl").exists()


def test_an_error_before_the_first_image_ends_the_run(tmp_path):
    paint = Paint(fail_at=1)
    with pytest.raises(ChunkError, match=r"chunk 0 \(images 0 to 2; first prompt 'prompt 0', seed 0\): ValueError: no"):
        run(tmp_path, paint)
    assert paint.made == [] and not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), WorldError("rank 1 failed")], ids=repr)
def test_what_concerns_the_whole_run_ends_it(tmp_path, error):
    paint = Paint(fail_at=4, error=error)
    with pytest.raises(type(error)):
        run(tmp_path, paint)
    assert paint.made == [0, 1, 2] and status(tmp_path)["failed"] == []


def test_a_device_that_computes_no_more_ends_the_run_and_comes_last_in_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr("diffaccel.parallel.generate.usable", lambda device: False)
    first, second = Paint(fail_at=4), Paint(fail_at=4)
    for paint in (first, second):
        with pytest.raises(ChunkError, match="no such colour"):
            run(tmp_path, paint)
        assert status(tmp_path)["failed"] == [3, 4, 5]
    assert (first.made, second.made) == ([0, 1, 2], [6, 7, 8, 9])


def test_a_device_is_asked_whether_it_still_computes(monkeypatch):
    asked = []

    def synchronize(device):
        asked.append(device)
        if len(asked) > 1:
            raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    assert [usable(torch.device(d)) for d in ("cpu", "cuda:1", "cuda:1")] == [True, True, False]
    assert asked == [torch.device("cuda:1")] * 2


def test_a_list_of_failures_has_an_end(tmp_path):
    def paint(tasks):
        if tasks[0].index:
            raise ValueError("broken")
        return Paint()(tasks)

    with pytest.raises(FailedImages, match=r"29 of 30 images failed") as error:
        run(tmp_path, paint, tasks=tasks_for([f"prompt {i}" for i in range(30)]), batch=1)
    assert str(error.value).count("broken") == 10 and "and 19 chunks more, see" in str(error.value)


def test_memory_advice(tmp_path):
    with pytest.raises(RunError, match="smaller --batch and a new --out"):
        run(tmp_path, Paint(0, torch.OutOfMemoryError("CUDA out of memory")))


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch, call):
    """The disk fills up while an image (replace) or a line (fsync) is written."""
    real, seen = getattr(os, call), []

    def full(*args):
        seen.append(args)
        if len(seen) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(FolderError, match=r"No space left on device. Finished images are kept"):
        run(tmp_path, tasks=tasks_for([f"prompt {i}" for i in range(30)]))
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.tmp"))
    assert run(tmp_path, tasks=tasks_for([f"prompt {i}" for i in range(30)])).images == 30
    assert status(tmp_path, verify="full")["done"] == 30


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FolderError, match="cannot write to"):
        run(tmp_path / "file" / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FolderError, match=r"is not empty and has no manifest\.json"):
        run(tmp_path / "mine")
    with pytest.raises(FolderError, match="cannot be read"):
        status(tmp_path / "nowhere")
    run(tmp_path / "ok")
    (tmp_path / "ok" / "manifest.json").write_text("{")
    with pytest.raises(FolderError, match="cannot be read"):
        run(tmp_path / "ok")


def test_two_recipes_are_never_mixed(tmp_path, capsys):
    run(tmp_path, environment={"torch": "1"})
    before = files(tmp_path)
    for change in ({"recipe": {"calls": 6}}, {"batch": 2}, {"tasks": TASKS[:9]}):
        with pytest.raises(FolderError, match=r"the folder has .*, this run has"):
            run(tmp_path, **change)
    run(tmp_path, environment={"torch": "2"}, progress=True)
    assert 'torch: the folder has "1", this run has "2"' in capsys.readouterr().err
    assert files(tmp_path) == before


def test_the_first_changed_prompt_is_named(tmp_path):
    run(tmp_path)
    changed = tasks_for([f"prompt {i}" if i < 4 else f"other {i}" for i in range(10)])
    with pytest.raises(FolderError, match=r"differs is 4: the folder has prompt 'prompt 4' .* has 'other 4' with seed"):
        run(tmp_path, tasks=changed)
    with pytest.raises(FolderError) as error:
        run(tmp_path, recipe={"calls": 6})
    assert "first image" not in str(error.value)


@pytest.mark.parametrize("bare", [False, True])
def test_infinite_values_are_valid_json(tmp_path, bare):
    """Also folders in which an earlier version wrote them bare go on."""
    recipe = {"calls": 5, "clipped": float("-inf"), "nan": [float("nan")]}
    run(tmp_path, recipe=recipe)
    text = (tmp_path / "manifest.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    if bare:
        (tmp_path / "manifest.json").write_text(text.replace('"-Infinity"', "-Infinity").replace('"NaN"', "NaN"))
    assert run(tmp_path, recipe=recipe).made == 0
    with pytest.raises(FolderError, match=r'clipped: the folder has "-Infinity", this run has -5'):
        run(tmp_path, recipe=recipe | {"clipped": -5.0})


def test_a_recipe_without_an_image_binds_nobody(tmp_path):
    with pytest.raises(RunError):
        run(tmp_path, Paint(fail_at=0))
    assert run(tmp_path, recipe={"calls": 6}).images == 10


def test_a_second_run_is_kept_out(tmp_path):
    run(tmp_path)
    with locked(Folder(tmp_path)), pytest.raises(FolderError, match="another run is writing"):
        run(tmp_path)


def test_broken_images_are_counted(tmp_path):
    def paint(tasks):
        images = np.full((len(tasks), 4, 4, 1), 0.5)
        for t, image in zip(tasks, images, strict=True):
            image[:] = {2: np.nan, 5: 0.0, 6: 0.001}.get(t.index, 0.5)
        return Painted(images, 5)

    report = run(tmp_path, paint)
    assert (report.nan, report.black) == ([2], [5, 6])
    flaws = [json.loads(line)["flaw"] for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    assert flaws == [None, None, "nan", None, None, "black", "black", None, None, None]
    with pytest.raises(RunError, match=r"expected \(3, H, W, 3\) images, got shape \(3, 4, 4\)"):
        run(tmp_path / "flat", lambda tasks: Painted(np.zeros((3, 4, 4)), 5))


def test_pixels():
    pixels, flaw = to_pixels(np.array([[[0.0, 0.5, 1.0]], [[-1.0, 2.0, 0.2]]]))
    assert pixels.tolist() == [[[0, 128, 255]], [[0, 255, 51]]] and flaw is None
    assert to_pixels(np.full((1, 1, 3), np.inf))[1] == "nan"


# ---------------------------------------------------------------------- seeds and prompts
def test_seeds():
    assert list(parse_seeds("0-3")) == [0, 1, 2, 3]
    assert list(parse_seeds("7")) == [7]
    assert list(parse_seeds("0-1, 5,8-9")) == [0, 1, 5, 8, 9]
    bad = {"": "no seed", "a": "no seed", "-3": "no seed", "3-": "no seed", "1.5": "no seed", "0-3-5": "no seed"}
    bad |= {"9-3": "backwards; write 3-9", str(2**63): "below", f"0-{MOST}": "at most"}
    for text, message in bad.items():
        with pytest.raises(OptionError, match=message):
            parse_seeds(text)


def test_prompts_take_turns():
    assert [(t.prompt, t.seed) for t in tasks_for(["a", "b"], [4, 5, 6])] == [("a", 4), ("b", 5), ("a", 6)]
    with pytest.raises(OptionError, match="the last 2 prompts would never be used"):
        tasks_for(["a", "b", "c"], [0])
    with pytest.raises(OptionError, match="images 0 and 2 would be the same: prompt 'a' with seed 1"):
        tasks_for(["a", "b"], [1, 2, 1])
    with pytest.raises(OptionError, match="no prompt"):
        tasks_for([])
    with pytest.raises(OptionError, match="batch = 0"):
        run("unused", batch=0)
