"""Metrics and resizers against values that other projects and 40-digit arithmetic gave on the same arrays."""

from __future__ import annotations

import re

import golden_data
import numpy as np
import pytest
import torch

from diffaccel.eval import clip, cmmd, fid, frechet, kernel, pairs
from diffaccel.eval.resize import RESIZERS

ALL = {path.stem: golden_data.load(path) for path in golden_data.cases("eval")}
CASES = [(file, key.removesuffix("_fid_mpmath")) for file, data in ALL.items() for key in data if "_fid_mpmath" in key]
WITH = {part: [file for file, data in ALL.items() if part in data] for part in ("img_a", "clip_image", "resize_src")}
# name in the files -> ours, grey levels
RESIZE = {"cleanfid": ("clean", 1e-4), "tf1": ("tf", 1e-3), "torchmetrics": ("torchmetrics", 1e-3)}
RESIZE["pytorchfid"] = ("torch", 1e-3)


def test_there_are_cases() -> None:
    assert CASES and all(WITH.values())


@pytest.mark.parametrize("file, case", CASES)
def test_fid(file: str, case: str) -> None:
    data = ALL[file]
    real, fake, truth = data[f"{case}_real"], data[f"{case}_fake"], float(data[f"{case}_fid_mpmath"])
    singular = min(len(real), len(fake)) <= real.shape[1]
    moments = [frechet.from_moments(x.mean(0), np.cov(x.T)) for x in (fake, real)]
    assert frechet.fid(fake, real) == pytest.approx(truth, rel=1e-12)
    assert fid(fake, real).raw == fid(fake, real, paper=True).value == frechet.fid(fake, real)
    # the eigenvalues of a singular covariance cost half the digits
    assert frechet.fid(*moments) == pytest.approx(truth, rel=3e-8 if singular else 1e-12)


@pytest.mark.parametrize("file, case", CASES)
def test_fid_of_other_projects(file: str, case: str) -> None:
    """They are off by up to 6e-8 themselves."""
    data = ALL[file]
    ours = frechet.fid(data[f"{case}_fake"], data[f"{case}_real"])
    others = {k: float(v) for k, v in data.items() if k.startswith(f"{case}_fid_") and not k.endswith("_mpmath")}
    assert others
    for name, value in others.items():
        assert ours == pytest.approx(value, rel=6e-8), name


@pytest.mark.parametrize("file, case", CASES)
def test_kid(file: str, case: str) -> None:
    """One subset of the first min(n, m) rows of both."""
    data = ALL[file]
    n = min(len(data[f"{case}_real"]), len(data[f"{case}_fake"]))
    ours = kernel.mmd(data[f"{case}_fake"][:n], data[f"{case}_real"][:n], block=37).unbiased
    others = {k: float(v) for k, v in data.items() if k.startswith(f"{case}_kid_")}
    assert others
    for name, value in others.items():
        assert ours == pytest.approx(value, rel=1e-11), name


@pytest.mark.parametrize("file, case", CASES)
def test_cmmd(file: str, case: str) -> None:
    data = ALL[file]
    ours = cmmd(data[f"{case}_fake"], data[f"{case}_real"], features=None, estimator="biased").value
    assert ours == pytest.approx(float(data[f"{case}_cmmd_biased"]), rel=1e-9)


@pytest.mark.parametrize("file", WITH["img_a"])
def test_psnr_and_ssim(file: str) -> None:
    data = ALL[file]
    a, b = torch.from_numpy(data["img_a"]), torch.from_numpy(data["img_b"])
    row = pairs.paired(a, b)
    # torchmetrics, which made the values, has 10 / ln 10 in float32 even for float64 images (4.5e-8 too low)
    rounded = float(np.float32(10) / np.log(np.float32(10))) / (10 / np.log(10))
    assert row.columns["psnr"] * rounded == pytest.approx(data["psnr"], rel=1e-9)
    assert row.columns["ssim"] == pytest.approx(data["ssim"], abs=1e-6)
    assert row.identical == np.isinf(data["psnr"]).sum()


@pytest.mark.parametrize("file", WITH["clip_image"])
def test_clip_score(file: str) -> None:
    data = ALL[file]
    image, text = torch.from_numpy(data["clip_image"]), torch.from_numpy(data["clip_text"])
    per_pair = clip.pair_scores(image, text)
    assert per_pair.numpy() == pytest.approx(data["clip_per_pair"], rel=1e-10)
    assert max(float(per_pair.mean()), 0) == pytest.approx(float(data["clip_torchmetrics"]), rel=1e-10)
    hessel = clip.pair_scores(image, text, "hessel").mean()
    assert float(hessel) == pytest.approx(float(data["clip_hessel_w2.5"]), rel=1e-10)


@pytest.mark.parametrize("file", WITH["resize_src"])
@pytest.mark.parametrize("name", RESIZE)
def test_resize(file: str, name: str) -> None:
    data, (ours, tolerance) = ALL[file], RESIZE[name]
    sizes = [int(m[1]) for k in data if (m := re.fullmatch(rf"resize_{name}_(\d+)", k))]
    assert sizes
    for k in sizes:
        got = RESIZERS[ours](data["resize_src"], k).permute(1, 2, 0).numpy()
        assert np.abs(got - data[f"resize_{name}_{k}"]).max() < tolerance, k
