"""Errors against a teacher's images, and their differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eval_nets import coloured

from diffaccel.errors import OptionError
from diffaccel.eval import paired, paired_difference
from diffaccel.eval.pairs import ssim

T = coloured(40, 1, size=32)


def noisy(scale: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, scale, T.shape)
    return (T + noise).clip(0, 255).astype(np.uint8)


def test_columns_and_summary() -> None:
    a = noisy(5)
    a[3] = T[3]
    z = torch.randn(40, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    row = paired(a, T, latents=1.1 * z, teacher_latents=z)
    assert row.identical == 1 and np.isinf(row.columns["psnr"][3])
    assert row.columns["ssim"][3] == pytest.approx(1)
    assert row.columns["latent"] == pytest.approx(np.full(40, 0.1), rel=1e-5)
    error = ((a.astype(float) - T) / 255) ** 2
    want = -10 * np.log10(np.delete(error.reshape(40, -1).mean(1), 3))
    s = row.summary()
    assert s["psnr"] == pytest.approx(want.mean(), rel=1e-12)
    assert s["latent_median"] == pytest.approx(0.1, rel=1e-5) and s["identical"] == 1
    assert "lpips" in s and "identical 1" in str(row)
    assert paired(T, T).summary()["psnr"] == "all images are identical"
    assert paired(T, T).summary()["latent"] == "no latents were given"


def test_a_missing_package_is_a_reason_in_the_column(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from diffaccel.eval import pairs

    found = importlib.util.find_spec
    absent = ("lpips", "torchvision")
    monkeypatch.setattr(pairs.importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    s = paired(noisy(5), T).summary()
    assert s["lpips"].startswith("not installed") and s["ssim"] > 0.5 and s["psnr"] > 20


@pytest.mark.parametrize("height, width", [(11, 11), (32, 32), (40, 23)])
def test_ssim_equals_torchmetrics(height: int, width: int) -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure as theirs

    g = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (5, 3, height, width), dtype=torch.uint8, generator=g)
    b = (a.int() + torch.randint(-40, 41, a.shape, generator=g)).clamp(0, 255).to(torch.uint8)
    a[3], b[3], a[4], b[4] = 255, 255, 255, 0  # flat: alike, and not
    want = theirs(a.double() / 255, b.double() / 255, data_range=1.0, reduction="none")
    assert ssim(a, b) == pytest.approx(want.numpy(), abs=1e-12) and float(ssim(a, b)[3]) == pytest.approx(1)


def test_difference() -> None:
    """Paired: images that share their noise separate where the means alone hardly would."""
    a, b = paired(noisy(5), T), paired(noisy(5.3), T)
    d = paired_difference(a, b)
    assert 0 < d.low < d.value < d.high and d.n == 40
    assert d.value == pytest.approx((a.columns["psnr"] - b.columns["psnr"]).mean())
    same = paired_difference(a, a, "ssim")
    assert same.value == same.low == same.high == 0
    x = noisy(5)
    x[0] = T[0]
    assert paired_difference(paired(x, T), b).left_out == 1
    with pytest.raises(OptionError, match="no pair has a finite value"):
        paired_difference(paired(T, T), b)
    with pytest.raises(OptionError, match="no latents"):
        paired_difference(a, b, "latent")
    with pytest.raises(OptionError, match="40 and 3"):
        paired_difference(a, paired(T[:3], T[:3]))
    with pytest.raises(OptionError, match="unknown column 'fid'"):
        paired_difference(a, b, "fid")


def test_what_is_refused() -> None:
    with pytest.raises(OptionError, match=r"has 40, .* 39"):
        paired(T, T[1:])
    with pytest.raises(OptionError, match="32x16, 32x32"):
        paired(T, T[:, :, :16])
    with pytest.raises(OptionError, match="at least 11x11, got 8x8"):
        paired(T[:, :8, :8], T[:, :8, :8])
    with pytest.raises(OptionError, match="or neither"):
        paired(T, T, latents=torch.zeros(40, 2))
    with pytest.raises(OptionError, match="differ in shape"):
        paired(T, T, latents=torch.zeros(40, 2), teacher_latents=torch.zeros(40, 3))
    with pytest.raises(OptionError, match="40 images have 3 latents"):
        paired(T, T, latents=torch.ones(3, 2), teacher_latents=torch.ones(3, 2))
