"""`sweep` on an embedded pipeline: a copy is no benefit, noise is worse, calls are counted, a stopped run goes on."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, UNet2DModel

from diffaccel import models
from diffaccel.errors import DiffaccelError, OptionError, RunError
from diffaccel.eval import cells, report, sweep, sweep_run
from diffaccel.eval.rivals import Setting
from diffaccel.models.pixel import ClassConditionalPipeline
from diffaccel.parallel import folder

DPM = {"solver_order": 2, "timestep_spacing": "trailing", "final_sigmas_type": "zero"}
OPTIONS = {"options": {"guidance_scale": 4.0}, "clip": "tiny-clip", "progress": False, "block": 8, "batch": 8}
SMALL = {**OPTIONS, "clip": None, "images": 12, "teacher_calls": 8, "teacher_images": 8, "stock": True}


class Copy(DPMSolverMultistepScheduler):
    """Diffusers' own, under a name of ours."""


class Noisy(DPMSolverMultistepScheduler):
    """Adds noise to its last step: as many calls, worse images, the same noise every time."""

    def step(self, *args, **kw):
        x, *rest = super().step(*args, **{**kw, "return_dict": False})
        if self.step_index == len(self.timesteps):
            x = x + 1.0 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return (x, *rest)


@pytest.fixture(scope="module")
def pipe():
    found = models.load("tiny-sd")
    found.set_progress_bar_config(disable=True)
    return found


def plain(file: Path) -> dict:
    """A report without what is measured by the clock."""
    found = json.loads(file.read_text())
    for row in found["rows"]:
        row["seconds"] = None
    found["warnings"] = [w for w in found["warnings"] if not w.startswith("some seconds are")]
    return found


# ---------------------------------------------------------------------- what a report says
@pytest.fixture(scope="module")
def made(pipe, tmp_path_factory):
    config = pipe.scheduler.config
    ours = {
        "copy": Copy.from_config(config, **DPM),
        "noisy": Noisy.from_config(config, **DPM),
        "heun": HeunDiscreteScheduler.from_config(config),
    }
    out = tmp_path_factory.mktemp("sweep") / "report"
    before = pipe.scheduler
    options = {**OPTIONS, "images": 24, "teacher_calls": 12, "teacher_images": 16}
    found = sweep(pipe, ours, [4, 6], models.prompts(24), "tiny-fashion", out, name="tiny-sd", **options)
    assert pipe.scheduler is before
    return found


def test_every_row_is_there(made):
    rows = {(r["name"], r["calls"]): r for r in made.data["rows"]}
    names = ["DDIMScheduler (own)", "DPM++ 2M", "UniPC", "copy", "noisy", "heun"]
    assert list(rows) == [("teacher", 12), ("teacher", 6), *((n, c) for n in names for c in (3, 4, 6))]
    assert made.missing == [] == [r for r in rows.values() if r["images_missing"]] and made.data["floor"]["n"] >= 100
    own = rows["DPM++ 2M", 6]
    assert (own["images"], own["fid"]["n"], own["clip"]["n"], own["errors"]["n"]) == (24, 24, 24, 16)
    assert "not Inception" in own["fid"]["label"] and own["fid"]["low"] is own["fid"]["high"] is None
    few = "DPM++ 2M, 6 calls: these images: too few images: 24 for 128 features, 256 needed"
    assert any(w.startswith(few) for w in made.data["warnings"])
    assert own["seconds"]["total"] > own["seconds"]["denoiser"] > 0 and "PSNR" in made.data["teacher_gap"]
    assert {w["name"] for w in made.data["fewer"]} == set(names) == {w["name"] for w in made.data["separation"]}


def test_roles_come_from_where_a_class_lives(made):
    roles = {role: {r["name"] for r in made.data["rows"] if r["role"] == role} for role in ("stock", "candidate")}
    assert roles == {"stock": {"heun", "DPM++ 2M", "UniPC", "DDIMScheduler (own)"}, "candidate": {"copy", "noisy"}}


def test_a_copy_is_no_benefit(made):
    own = [v for v in made.data["verdicts"] if v["name"] == "copy"]
    assert {v["metric"] for v in own} == {"fid", "latent", "psnr", "ssim", "clip"} and len(own) == 10
    assert not any(v["benefit"] for v in own) and all("no benefit found" in v["text"] for v in own)
    assert any(v["text"].endswith("the same images as DPM++ 2M") for v in own)
    assert made.row("copy", 6)["fid"] == made.row("DPM++ 2M", 6)["fid"]


def test_noise_makes_a_row_worse(made):
    for calls in (4, 6):
        noisy, copy = made.row("noisy", calls), made.row("copy", calls)
        assert noisy["fid"]["raw"] > copy["fid"]["raw"]  # so few images that the correction is mostly noise
        assert noisy["errors"]["psnr"] < copy["errors"]["psnr"] - 3
        assert noisy["errors"]["latent"] > copy["errors"]["latent"]
    worse = [v for v in made.data["verdicts"] if v["name"] == "noisy" and v["metric"] == "psnr"]
    assert all(v["high"] < 0 and re.search(r"no benefit found \(.* dB worse than", v["text"]) for v in worse)


def test_calls_are_counted_at_the_model(made):
    assert [made.row("heun", n)["calls_made"] for n in (3, 4, 6)] == [3, 3, 5]
    assert "heun, 6 calls: 5 calls were counted at the model" in made.data["warnings"]
    assert [made.row("copy", n)["calls_made"] for n in (3, 4, 6)] == [3, 4, 6]


def test_the_page_stands_alone(made):
    text = made.page.read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', text) == [] and "http" not in text and "<script" not in text
    assert text.count("data:image/png;base64,") == 3
    assert "no benefit found" in text and 'name="viewport"' in text and "not Inception" in text
    for name in ("quality_calls.png", "quality_seconds.png", "grid.png"):
        assert (made.folder / name).read_bytes()[:4] == b"\x89PNG"


def test_the_table_as_csv(made):
    lines = list(csv.DictReader((made.folder / "report.csv").open()))
    assert len(lines) == len(made.data["rows"])
    for line, row in zip(lines, made.data["rows"]):
        assert (line["name"], int(line["calls"])) == (row["name"], row["calls"])
        assert float(line["fid"]) == row["fid"]["value"] and float(line["clip"]) == row["clip"]["value"]


def test_more_calls_are_nearer_to_the_teacher(made):
    """The report's own control: PSNR rises with calls, and the paired interval says so."""
    rise = [w for w in made.data["separation"] if w["name"] in ("DDIMScheduler (own)", "DPM++ 2M", "UniPC")]
    assert len(rise) == 3 and all(w["against"] == 4 and w["calls"] == 6 and w["psnr"]["low"] > 0 for w in rise)


def test_a_row_by_name(made):
    with pytest.raises(OptionError, match="no row 'copy' with 7 calls; there are teacher 12"):
        made.row("copy", 7)
    assert "noisy" in str(made) and "index.html" in str(made)


# ---------------------------------------------------------------------- stopping and going on
def run(pipe, out, calls=(3,), **changes):
    return sweep(pipe, {}, list(calls), models.prompts(12), "tiny-fashion", out, **{**SMALL, **changes})


def counted_blocks(monkeypatch, stop_after=10**6):
    """How many blocks are painted; the run is stopped when it begins the one after `stop_after`."""
    seen, paint = [], sweep_run.paint

    def watched(driver, setting, cell, plan, block, first):
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append((cell.label, block.name))
        return paint(driver, setting, cell, plan, block, first)

    monkeypatch.setattr(sweep_run, "paint", watched)
    return seen


def test_stopped_and_started_again_equals_uninterrupted(pipe, tmp_path, monkeypatch):
    whole = run(pipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        first = counted_blocks(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run(pipe, tmp_path / "broken")
    partial = report(tmp_path / "broken")
    assert "UniPC, 3 calls: 0 of 12 images" in partial.missing
    assert "Not complete" in partial.page.read_text()
    with monkeypatch.context() as patch:
        second = counted_blocks(patch)
        run(pipe, tmp_path / "broken")
    assert len(first) == 5 and not set(first) & set(second)  # nothing is made twice
    assert len(first) + len(second) == 2 + 2 * 3 * 2  # teacher and half; three schedulers at 2 and 3 calls, 2 blocks
    assert plain(tmp_path / "broken" / "report.json") == plain(tmp_path / "whole" / "report.json")
    with monkeypatch.context() as patch:
        third = counted_blocks(patch)
        assert plain(run(pipe, tmp_path / "broken").folder / "report.json") == plain(whole.folder / "report.json")
    assert third == []


def test_another_option_makes_new_cells_and_more_images_go_on(pipe, tmp_path, monkeypatch):
    few = {"teacher_calls": 0, "images": 8}
    run(pipe, tmp_path / "out", **few)
    with monkeypatch.context() as patch:
        added = counted_blocks(patch)
        run(pipe, tmp_path / "out", **{**few, "images": 16})
    assert {name for _, name in added} == {"000008-000015"}
    with monkeypatch.context() as patch:
        other = counted_blocks(patch)
        found = run(pipe, tmp_path / "out", **few, options={"guidance_scale": 1.0})
    assert {name for _, name in other} == {"000000-000007"} and len(other) == len(added)
    assert found.missing == [] and {r["images"] for r in found.data["rows"]} == {8}


def test_other_versions_are_a_warning(pipe, tmp_path, monkeypatch):
    few = {"teacher_calls": 0, "images": 8, "stock": ["own"]}
    assert not any("versions" in w for w in run(pipe, tmp_path / "out", **few).data["warnings"])
    monkeypatch.setattr("diffaccel.__version__", "99.0")
    found = run(pipe, tmp_path / "out", **{**few, "images": 16})
    assert any(w.startswith("blocks were made with different versions of diffaccel: ") for w in found.data["warnings"])


def test_a_scheduler_that_is_being_worked_on_makes_new_cells(pipe):
    """Its class and config stay the same while its code changes."""
    config = pipe.scheduler.config
    one, other = (Setting("x", kind.from_config(config)).recipe["source"] for kind in (Copy, Noisy))
    assert one and other and one != other
    assert "source" not in Setting("x", pipe.scheduler).recipe


def test_a_damaged_block_is_made_again(pipe, tmp_path, monkeypatch):
    found = run(pipe, tmp_path / "out", teacher_calls=0)
    before = plain(found.folder / "report.json")
    block = next((tmp_path / "out" / "cells").glob("UniPC-3-*/000000-000007.npz"))
    block.write_bytes(block.read_bytes()[:-40])  # a disk that filled up under another writer, a lost machine
    again = counted_blocks(monkeypatch)
    run(pipe, tmp_path / "out", teacher_calls=0)
    assert again == [("UniPC, 3 calls", "000000-000007")]
    assert plain(found.folder / "report.json") == before


def test_a_full_disk_keeps_what_is_done(pipe, tmp_path, monkeypatch):
    real, written = folder.Folder.replace, []

    def full(self, path, data):
        if len(written) == 12:  # the plan, the cells, and some blocks
            raise OSError(28, "No space left on device")
        written.append(path)
        return real(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(folder.Folder, "replace", full)
        with pytest.raises(DiffaccelError, match=r"No space left on device.*repair this and run the same"):
            run(pipe, tmp_path / "out")
    kept = {p for p in written if p.suffix == ".npz"}
    assert kept and all(p.exists() for p in kept)
    again = counted_blocks(monkeypatch)
    assert run(pipe, tmp_path / "out").missing == []
    assert len(again) == 2 + 2 * 3 * 2 - len(kept)


def test_a_failed_batch_is_named(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(type(pipe.unet), "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(RunError, match=r"teacher, 8 calls, images 0 to 7: ZeroDivisionError"):
        run(pipe, tmp_path / "out")


# ---------------------------------------------------------------------- schedulers that draw noise, broken images
def test_stochastic_rows_have_no_errors_and_say_why(pipe, tmp_path):
    from diffusers import EulerAncestralDiscreteScheduler

    class Mine(EulerAncestralDiscreteScheduler):
        pass

    mine = {"mine": Mine.from_config(pipe.scheduler.config)}
    few = {**SMALL, "images": 8}
    found = sweep(pipe, mine, [3], models.prompts(8), "tiny-fashion", tmp_path / "out", **few)
    row = found.row("mine", 3)
    assert row["stochastic"] and "stochastic" in row["errors"]["psnr"] and row["fid"] is not None
    assert not any(r["stochastic"] for r in found.data["rows"] if r["name"] != "mine")
    assert any("not compared: stochastic" in v for v in found.verdicts)
    assert found.page.read_text().count("stochastic") >= 1


def test_black_images_are_counted(pipe, tmp_path, monkeypatch):
    class Broken(DPMSolverMultistepScheduler):
        def step(self, *args, **kw):
            x, *rest = super().step(*args, **{**kw, "return_dict": False})
            x[0] = float("nan")
            return (x, *rest)

    broken = {"broken": Broken.from_config(pipe.scheduler.config)}
    few = {**SMALL, "images": 8, "teacher_calls": 0, "stock": False}
    found = sweep(pipe, broken, [2], models.prompts(8), "tiny-fashion", tmp_path / "out", **few)
    assert found.row("broken", 2)["bad"] == [0]
    assert "broken, 2 calls: 1 images are black or hold a NaN, first: 0" in found.data["warnings"]
    assert any("no stock row" in v for v in found.verdicts)


# ---------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"calls": []}, "budgets of 1 model call or more"),
        ({"calls": [0, 3]}, "budgets of 1 model call or more"),
        ({"calls": [5]}, "a teacher of 8 calls is none for 5 calls"),
        ({"images": 1}, "images is 2 or more, got 1"),
        ({"batch": 3}, "a block of 8 images cannot be made in batches of 3"),
        ({"schedulers": {"UniPC": None}}, "cannot be called 'UniPC'"),
        ({"schedulers": {"x": 7}}, "x: a scheduler object is needed, got int"),
        ({"schedulers": {}, "stock": False}, "nothing to sweep"),
        ({"prompts": None}, "StableDiffusionPipeline makes images of texts: give prompts"),
        ({"prompts": []}, "holds no prompts"),
        ({"prompts": "nowhere.txt"}, "cannot read the prompts"),
        ({"options": {"guidance": 4}}, "takes no option 'guidance'"),
        ({"reference": "nowhere"}, "no file or folder nowhere"),
        ({"reference": None, "features": "tiny-fashion"}, "for FID, which needs a reference"),
        ({"features": "clip:tiny-clip"}, "has features 'tiny-fashion', not 'clip:tiny-clip"),
        ({"clip": "no/such-model"}, "cannot load the CLIP model"),
    ],
)
def test_refused_before_the_first_image(pipe, tmp_path, changes, message):
    given = {"schedulers": {}, "calls": [3], "prompts": models.prompts(4), "reference": "tiny-fashion", **SMALL}
    with pytest.raises(DiffaccelError, match=message):
        sweep(pipe, out=tmp_path / "out", **{**given, **changes})
    assert not list(tmp_path.rglob("*.npz"))


def test_without_matplotlib_nothing_begins(pipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptionError, match=r"need matplotlib: pip install diffaccel\[eval\]"):
        run(pipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_refused(pipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OptionError, match="holds no sweep"):
        run(pipe, tmp_path)
    with pytest.raises(OptionError, match=r"holds no sweep: cannot read sweep\.json"):
        report(tmp_path / "nowhere")


def test_prompts_that_clip_cuts_and_empty_ones_are_counted(pipe, tmp_path):
    few = {"teacher_calls": 0, "reference": None, "images": 4, "stock": ["own"], "clip": "tiny-clip"}
    words = ["a red bag", "", "a red bag on a grey background " * 4, "a blue coat"]
    found = sweep(pipe, {}, [1], words, out=tmp_path / "out", **{**SMALL, **few})
    assert "1 of 4 prompts are empty" in found.data["warnings"]
    assert any(w.startswith("1 different prompts are longer than the CLIP model reads") for w in found.data["warnings"])


def test_fewer_stock_rows_are_noted(pipe, tmp_path):
    few = {"teacher_calls": 0, "reference": None, "images": 4}
    found = sweep(pipe, {}, [2], models.prompts(4), out=tmp_path / "out", **{**SMALL, **few, "stock": ["own", "UniPC"]})
    assert [r["name"] for r in found.data["rows"]] == ["DDIMScheduler (own)"] * 1 + ["UniPC"] * 1
    assert found.data["notes"][0] == "stock schedulers left out on request: DPM++ 2M"
    assert found.data["fid_label"] and all(r["fid"] is None for r in found.data["rows"])


def test_a_model_of_classes(tmp_path):
    """Class numbers in turn instead of prompts; pixels are the latents."""
    sizes = {"sample_size": 16, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    net = UNet2DModel(**sizes, **blocks, num_class_embeds=3).eval()
    pixel = ClassConditionalPipeline(net, DDIMScheduler())
    pixel.set_progress_bar_config(disable=True)
    options = {"images": 4, "block": 4, "batch": 4, "teacher_calls": 6, "progress": False, "stock": ["own"]}
    found = sweep(pixel, {}, [2], out=tmp_path / "out", **options)
    row = found.row("DDIMScheduler (own)", 2)
    assert row["calls_made"] == 2 and row["clip"] is None and row["errors"]["latent"] > 0
    assert cells.Store(tmp_path / "out").plan().prompts == ["0", "1", "2"]
    assert "class labels instead of texts: no CLIP score" in found.data["notes"]
    with pytest.raises(OptionError, match="a prompt must be a number, got 'a hat'"):
        sweep(pixel, {}, [2], ["a hat"], out=tmp_path / "other", **options)


def test_blocks_are_dealt_so_that_a_partial_run_can_be_compared(pipe, tmp_path, monkeypatch):
    seen = counted_blocks(monkeypatch)
    run(pipe, tmp_path / "out", teacher_calls=0)
    assert [name for _, name in seen] == ["000000-000007"] * 6 + ["000008-000011"] * 6
    assert cells.Store(tmp_path / "out").plan().images == 12
