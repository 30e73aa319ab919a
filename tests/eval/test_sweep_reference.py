"""What a sweep makes of its reference: measured once, known by its content, with what was said of its images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel import models
from diffaccel.errors import OptionError
from diffaccel.eval import frechet, open_images, report, sweep
from diffaccel.eval.features import get
from diffaccel.eval.stats_file import Stats

FEW = {"images": 8, "block": 8, "batch": 8, "teacher_calls": 0, "clip": None, "stock": ["own"], "progress": False}


class Means:
    """Mean colours."""

    id = "means"
    num_features = 3

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((2, 3))


@pytest.fixture(scope="module")
def pipe():
    found = models.load("tiny-sd")
    found.set_progress_bar_config(disable=True)
    return found


def images(seed: int, below: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, (20, 32, 32, 3), dtype=np.uint8)


def fill(folder: Path, of: np.ndarray, suffix: str = "png") -> Path:
    folder.mkdir(exist_ok=True)
    for i, x in enumerate(of):
        Image.fromarray(x).save(folder / f"{i}.{suffix}")
    return folder


def run(pipe, reference, out: Path):
    return sweep(pipe, {}, [2], models.prompts(8), reference, out, features=Means(), **FEW)


def raw(found) -> float:
    return found.row("DDIMScheduler (own)", 2)["fid"]["raw"]


def blocks(out: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in out.glob("cells/*/*.npz")}


def test_a_reference_of_images_is_measured_once(pipe, tmp_path):
    out = tmp_path / "out"
    found = run(pipe, images(1), out)
    assert found.row("DDIMScheduler (own)", 2)["fid"]["features"] == "means"
    (kept,) = out.glob("reference-*.npz")
    before = kept.stat().st_mtime_ns
    assert raw(run(pipe, images(1), out)) == raw(found) and kept.stat().st_mtime_ns == before
    with pytest.raises(OptionError, match="unknown features 'means'"):
        report(out)
    assert report(out, features=Means()).data["features"] == "means"


def test_other_images_are_another_reference(pipe, tmp_path):
    """Of the same form, at the same path, with the same mean: nothing old is used, and no image is made again."""
    out, folder = tmp_path / "out", tmp_path / "real"
    values = Means()(torch.from_numpy(images(3)).permute(0, 3, 1, 2)).double().numpy()
    moments = (values.mean(0), np.cov(values.T))
    wide = (moments[0], 100 * moments[1])
    one, other = (Stats("s", "means", 20, moments=m) for m in (moments, wide))
    for first, second in (
        (lambda: images(1), lambda: images(1, 100)),
        (lambda: fill(folder, images(1)), lambda: fill(folder, images(1, 100))),
        (lambda: one, lambda: other),
    ):
        before = raw(run(pipe, first(), out))
        made = blocks(out)
        after = raw(run(pipe, second(), out))
        assert blocks(out) == made
        assert after == raw(run(pipe, second(), tmp_path / "fresh")) != before


def test_what_is_doubtful_of_a_reference_is_in_the_report(pipe, tmp_path):
    """Once, not for every row."""
    folder = fill(tmp_path / "jpg", images(1), "jpg")
    (folder / "3.jpg").write_bytes(b"no image")
    reference = open_images(folder, unreadable="skip")
    for _ in range(2):  # measured, then read
        found = run(pipe, reference, tmp_path / "out").data["warnings"]
        assert sum(w.startswith("FID of all rows: ") and "19 JPEG files, these images none" in w for w in found) == 1
        assert sum("1 unreadable images skipped, first: 3.jpg" in w for w in found) == 1
        assert sum("JPEG" in w or "unreadable" in w for w in found) == 2


def test_the_metric_separates_budgets(pipe, tmp_path):
    """Guidance 4, the same seeds, 5 against 20 calls of a stock scheduler: FID and PSNR both see it. On 24 directions
    of the embedded features, for which 96 images are enough."""
    net, known = get("tiny-fashion"), models.reference()
    mu, sigma = (torch.from_numpy(known[k]).double() for k in ("mu", "sigma"))
    leading = torch.linalg.eigh(sigma).eigenvectors[:, -24:]

    class Leading:
        id = "leading"
        num_features = 24

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return net.net(x).double() @ leading

    reference = frechet.from_moments(leading.T @ mu, leading.T @ sigma @ leading, known["n"])
    options = {"images": 96, "block": 48, "batch": 48, "teacher_images": 16, "teacher_calls": 40, "stock": ["UniPC"]}
    options |= {"options": {"guidance_scale": 4.0}, "features": Leading()}
    found = sweep(pipe, {}, [5, 20], models.prompts(96), reference, tmp_path / "out", **{**FEW, **options})
    (one,) = found.data["separation"]
    assert (one["calls"], one["against"], one["fid"]["n"]) == (20, 5, 96)
    assert one["fid"]["better_by"] > 0 and one["fid"]["z"] > 3 and one["psnr"]["low"] > 0


def test_another_config_of_a_component_is_another_pipeline(tmp_path):
    pipe = models.load("tiny-sd")
    pipe.set_progress_bar_config(disable=True)
    run(pipe, images(0), tmp_path)
    before, scale = blocks(tmp_path), pipe.vae.config.scaling_factor
    pipe.vae.register_to_config(scaling_factor=0.5)
    with pytest.raises(OptionError, match=r"configs.vae.scaling_factor: the folder has .*, this pipeline has 0.5"):
        run(pipe, images(0), tmp_path)
    pipe.vae.register_to_config(scaling_factor=scale)
    run(pipe, images(0), tmp_path)
    assert blocks(tmp_path) == before
