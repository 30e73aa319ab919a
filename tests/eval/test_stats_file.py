"""Files of statistics: ours, and those of pytorch-fid, clean-fid, ADM and EDM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from eval_nets import Pooled, coloured
from PIL import Image

from diffaccel.errors import OptionError
from diffaccel.eval import fid, kid, open_images, stats, stats_file
from diffaccel.eval.pixels import ImageError
from diffaccel.eval.stats_file import Stats

X, Y = coloured(40, 1), coloured(50, 2, shift=10)


def moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    f = Pooled()(torch.from_numpy(images).permute(0, 3, 1, 2)).double().numpy()
    return f.mean(0), np.cov(f.T)


def test_ours_there_and_back(tmp_path: Path) -> None:
    made = stats(Y, tmp_path / "new" / "y.npz", features=Pooled())
    with np.load(tmp_path / "new" / "y.npz") as data:
        assert set(data.files) == {"mu", "sigma", "n", "features", "version", "remarks", "jpeg"}
        assert int(data["n"]) == 50 and str(data["features"]) == "pooled"
        for got, want in zip((data["mu"], data["sigma"]), moments(Y)):
            assert got == pytest.approx(want, rel=1e-12, abs=1e-10)
    assert not list(tmp_path.rglob("*.partial"))
    score = fid(X, tmp_path / "new" / "y.npz", features=Pooled())
    assert score.raw == pytest.approx(fid(X, made, features=Pooled()).raw, rel=1e-10)
    assert score.n_b == 50 and any("taken as exact" in n for n in score.notes)


def test_kept_features_serve_everything(tmp_path: Path) -> None:
    stats(Y, tmp_path / "y.npz", features=Pooled(), keep_features=True)
    for metric in (fid, kid):
        want, got = metric(X, Y, features=Pooled()), metric(X, str(tmp_path / "y.npz"), features=Pooled())
        assert (got.value, got.low, got.n_b) == (want.value, want.low, 50)


def test_what_was_said_of_the_images_stays_in_the_file(tmp_path: Path) -> None:
    """JPEG on one side, files left out: the score from a file of statistics says it as that from the images does."""
    (tmp_path / "y").mkdir()
    for i, x in enumerate(Y):
        Image.fromarray(x).save(tmp_path / "y" / f"{i}.jpg", quality=90)
    (tmp_path / "y" / "3.jpg").write_bytes(b"no image")
    made = stats(tmp_path / "y", tmp_path / "y.npz", features=Pooled(), unreadable="skip")
    read = stats(tmp_path / "y.npz")
    assert (read.jpeg, read.notes, read.warnings) == (49, made.notes, made.warnings)
    said = fid(stats(X, features=Pooled()), tmp_path / "y.npz").warnings
    assert sum("49 JPEG files, " in w or "1 unreadable images skipped, first: 3.jpg" in w for w in said) == 2
    np.savez(tmp_path / "bad.npz", mu=np.zeros(2), sigma=np.eye(2), features="pooled", remarks="so so")
    with pytest.raises(OptionError, match=r"bad\.npz: remarks are not those of diffaccel"):
        stats(tmp_path / "bad.npz")


def test_a_digest_is_of_the_content(tmp_path: Path) -> None:
    """Files count by their bytes wherever they lie, arrays by their pixels; statistics by all their numbers."""
    for name, images in (("a", X), ("b", X), ("c", Y[:40])):
        (tmp_path / name).mkdir()
        for i, x in enumerate(images):
            Image.fromarray(x).save(tmp_path / name / f"{i}.png")
    a, b, c = (open_images(tmp_path / name).digest() for name in "abc")
    assert a == b != c
    with pytest.raises(ImageError, match=r"absent\.png of list of 1: .*No such file"):
        open_images([tmp_path / "absent.png"]).digest()
    assert open_images(X).digest() == open_images(list(X)).digest() != open_images(Y[:40]).digest()
    mu, sigma = moments(X)
    near = [Stats("s", "pooled", 40, moments=(mu, s)) for s in (sigma, sigma, 2 * sigma)]
    assert near[0].digest() == near[1].digest() != near[2].digest()
    assert stats(X, features=Pooled()).digest() == stats(X, features=Pooled()).digest() != near[0].digest()


def test_pytorch_fid_edm_and_clean_fid(tmp_path: Path) -> None:
    """mu and sigma only: the user names the features; n is not known."""
    mu, sigma = moments(Y)
    np.savez(tmp_path / "y.npz", mu=mu, sigma=sigma)
    with pytest.raises(OptionError, match=r"does not tell its features.*--features.*inception-v3:torch"):
        fid(X, tmp_path / "y.npz")
    score = fid(X, tmp_path / "y.npz", features=Pooled())
    assert score.raw == pytest.approx(fid(X, Y, features=Pooled()).raw, rel=1e-9)
    assert score.n_b is None and any("an unknown number of images" in n for n in score.notes)
    with pytest.raises(OptionError, match="only mu and sigma"):
        kid(X, tmp_path / "y.npz", features=Pooled())
    np.savez(tmp_path / "kid.npz", feats=Pooled()(torch.from_numpy(Y).permute(0, 3, 1, 2)).numpy())
    want = kid(X, Y, features=Pooled())
    assert kid(X, tmp_path / "kid.npz", features=Pooled()).value == pytest.approx(want.value, rel=1e-12)


def test_adm(tmp_path: Path) -> None:
    """arr_0 images with mu, sigma (pool3) and mu_s, sigma_s (spatial): statistics for FID, images for KID."""
    mu, sigma = moments(Y)
    np.savez(tmp_path / "adm.npz", arr_0=Y, mu=mu, sigma=sigma, mu_s=np.zeros(3), sigma_s=np.eye(3))
    assert fid(X, tmp_path / "adm.npz", features=Pooled()).n_b is None
    want = kid(X, Y, features=Pooled())
    assert kid(X, tmp_path / "adm.npz", features=Pooled()).value == pytest.approx(want.value, rel=1e-12)


def test_the_reference_factor_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats(Y, tmp_path / "y.npz", features=Pooled())
    calls = []
    original = stats_file.frechet.from_moments
    monkeypatch.setattr(stats_file.frechet, "from_moments", lambda *a: calls.append(1) or original(*a))
    for _ in range(3):
        fid(X, tmp_path / "y.npz", features=Pooled())
    assert len(calls) == 1


def test_contradictions_and_broken_files(tmp_path: Path) -> None:
    stats(Y, tmp_path / "y.npz", features=Pooled())
    with pytest.raises(OptionError, match="made with features 'pooled', not 'tiny-fashion'"):
        fid(X, tmp_path / "y.npz", features="tiny-fashion")
    mu, sigma = moments(Y)
    np.savez(tmp_path / "bad.npz", mu=mu, sigma=sigma - 9999 * np.eye(12))
    with pytest.raises(OptionError, match=r"bad\.npz: corrupt statistics.*eigenvalue"):
        fid(X, tmp_path / "bad.npz", features=Pooled())
    np.savez(tmp_path / "new.npz", mu=mu, sigma=sigma, version=9)
    with pytest.raises(OptionError, match=r"version 9.*update"):
        fid(X, tmp_path / "new.npz", features=Pooled())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "y.npz").read_bytes()[:300])
    with pytest.raises(OptionError, match=r"cannot read.*cut\.npz"):
        fid(X, tmp_path / "cut.npz", features=Pooled())
    with pytest.raises(OptionError, match=r"written as \.npz"):
        stats(Y, tmp_path / "y.pkl", features=Pooled())
    with pytest.raises(OptionError, match="takes no option 'keep'"):
        stats(Y, features=Pooled(), keep=True)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"mu": np.array(1.0)}, r"mu is no array of 1 dimensions: it has the shape \(\)"),
        ({"feats": np.zeros(3)}, "feats is no array of 2 dimensions"),
        ({"n": np.array("many")}, "n is no number"),
        ({"version": np.array("new")}, "version is no number"),
    ],
)
def test_arrays_of_other_forms(tmp_path: Path, wrong: dict, message: str) -> None:
    mu, sigma = moments(Y)
    np.savez(tmp_path / "s.npz", **{"mu": mu, "sigma": sigma, "features": np.array("pooled"), **wrong})
    with pytest.raises(OptionError, match=message):
        fid(X, tmp_path / "s.npz", features=Pooled())


def test_two_files_of_different_features(tmp_path: Path) -> None:
    class Other(Pooled):
        id = "other"

    stats(X, tmp_path / "x.npz", features=Pooled())
    stats(Y, tmp_path / "y.npz", features=Other())
    with pytest.raises(OptionError, match=r"different features: .*x\.npz has 'pooled', .*y\.npz has 'other'"):
        fid(tmp_path / "x.npz", tmp_path / "y.npz")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats(X, tmp_path / "x.npz", features=Pooled())
    before = (tmp_path / "x.npz").read_bytes()

    def full(file, **arrays: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stats_file.np, "savez", full)
    with pytest.raises(OptionError, match=r"cannot write .*x\.npz: No space left"):
        stats(Y, tmp_path / "x.npz", features=Pooled())
    assert (tmp_path / "x.npz").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
