"""Arithmetic of the Frechet distance: closed forms, invariances, influence, bias."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffaccel.eval import frechet


def exact(rng: np.random.Generator, n: int, mean: np.ndarray, root: np.ndarray) -> np.ndarray:
    """n samples whose sample mean and covariance are exactly `mean` and root root^T."""
    x = rng.standard_normal((n, len(mean)))
    x -= x.mean(0)
    q = np.linalg.qr(x)[0] * (n - 1) ** 0.5
    return q @ root.T + mean


def law(rng: np.random.Generator, n: int, shift: float = 0.0) -> np.ndarray:
    d = 16
    scale = np.linspace(0.5, 1.5, d)
    return rng.standard_normal((n, d)) * scale * (1 + shift / 4) + shift / d**0.5


def truth(shift: float) -> float:
    """FID of `law(., shift)` against `law(., 0)` of infinitely many samples."""
    return shift**2 + float((np.linspace(0.5, 1.5, 16) ** 2).sum()) * (shift / 4) ** 2


@pytest.mark.parametrize("n, m, d", [(40, 60, 5), (300, 200, 32), (90, 70, 64)])
def test_closed_form_for_commuting_covariances(n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(d)
    q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    a, b = rng.uniform(0.1, 3, d), rng.uniform(0.1, 3, d)
    ma, mb = rng.standard_normal(d), rng.standard_normal(d)
    x, y = exact(rng, n, ma, q * a**0.5), exact(rng, m, mb, q * b**0.5)
    want = ((ma - mb) ** 2).sum() + ((a**0.5 - b**0.5) ** 2).sum()
    assert frechet.fid(x, y) == pytest.approx(want, rel=1e-10)
    assert frechet.fid(frechet.from_moments(ma, (q * a) @ q.T), y) == pytest.approx(want, rel=1e-10)


def test_invariances() -> None:
    rng = np.random.default_rng(1)
    x, y = law(rng, 50, 0.4), law(rng, 10)  # y: fewer samples than dimensions
    q = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    value = frechet.fid(x, y)
    assert abs(frechet.fid(x, x)) < 1e-10 * np.trace(np.cov(x.T))
    assert frechet.fid(y, x) == pytest.approx(value, rel=1e-12)
    assert frechet.fid(x @ q, y @ q) == pytest.approx(value, rel=1e-12)
    assert frechet.fid(3 * x, 3 * y) == pytest.approx(9 * value, rel=1e-12)
    assert frechet.fid(torch.tensor(x), frechet.from_features(y)) == pytest.approx(value, rel=1e-12)
    # float32 features are computed with in float64
    assert frechet.fid(x.astype(np.float32), y) == pytest.approx(value, rel=1e-5)


def test_large_mean_costs_no_digits() -> None:
    rng = np.random.default_rng(2)
    x, y = law(rng, 200, 0.4), law(rng, 200)
    assert frechet.fid(x + 1e6, y + 1e6) == pytest.approx(frechet.fid(x, y), rel=1e-8)


@pytest.mark.parametrize("sizes", [(30, 50), (3, 5, 9, 2), (60,)])
def test_merged_shards_equal_one_pass(sizes: tuple[int, ...]) -> None:
    x, y = law(np.random.default_rng(5), sum(sizes), 2.0) + 1e4, law(np.random.default_rng(6), 40) + 1e4
    shards = np.split(x, np.cumsum(sizes)[:-1])
    merged, whole = frechet.merge(*map(frechet.from_features, shards)), frechet.from_features(x)
    assert merged.n == len(x)
    assert torch.allclose(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    assert frechet.fid(merged, y) == pytest.approx(frechet.fid(x, y), rel=1e-9)
    with pytest.raises(ValueError, match="number of samples"):
        frechet.merge(merged, frechet.Statistics(merged.mean, merged.factor))


def test_influence_is_the_derivative() -> None:
    """Against finite differences of the FID of weighted samples: weight 1 + e on sample i, covariance divided by the
    sum of weights, as `influence` counts."""
    rng = np.random.default_rng(3)
    x, y = law(rng, 60, 0.5), law(rng, 80)
    reference = frechet.from_features(y)
    phi = frechet.influence(x, reference)
    assert abs(float(phi.sum())) < 1e-9

    def weighted(i: int, e: float) -> float:
        w = np.ones(len(x))
        w[i] += e
        w /= w.sum()
        mean = w @ x
        sigma = (x - mean).T @ ((x - mean) * w[:, None])
        return frechet.fid(frechet.from_moments(mean, (sigma + sigma.T) / 2), reference)

    for i in range(0, 60, 7):
        slope = (weighted(i, 1e-4) - weighted(i, -1e-4)) / 2e-4
        assert slope * len(x) == pytest.approx(float(phi[i]), abs=1e-5 * float(phi.abs().max()))


def test_interval_covers_the_truth() -> None:
    shift, n, hits = 0.5, 1000, 0
    reference = frechet.from_moments(np.zeros(16), np.diag(np.linspace(0.5, 1.5, 16) ** 2))
    for seed in range(100):
        x = law(np.random.default_rng(seed), n, shift)
        value, se = frechet.jackknife(x, reference), frechet.standard_error(frechet.influence(x, reference))
        hits += abs(value - truth(shift)) < 1.96 * se
    assert 90 <= hits <= 98


@pytest.mark.parametrize("d, each", [(64, 2), (64, 4), (300, 2)])
def test_intervals_cover_where_the_correction_leaves_much(d: int, each: int) -> None:
    """Just above two images a feature, a slowly falling spectrum: a row of the reference's law and one with too little
    spread, which has the smaller bias. The standard error alone covers next to nothing here."""
    spread = np.arange(1, d + 1) ** -0.25
    reference = frechet.from_moments(np.zeros(d), np.diag(spread**2))
    truth, hits, without = 0.1**2 * float((spread**2).sum()), 0, 0
    for seed in range(6):
        right = np.random.default_rng(seed).standard_normal((each * d, d)) * spread
        for x, true in ((right, 0.0), (0.9 * right, truth)):
            value, left = frechet.correct(x, reference)
            se = frechet.standard_error(frechet.influence(x, reference))
            hits += abs(value - true) < 1.96 * frechet.widened(se, left)
            without += abs(value - true) < 1.96 * se
        d_ = frechet.paired(0.9 * right, right, reference)
        assert d_.z > -1.96 and abs(d_.value - truth) < 1.96 * d_.se
    assert hits >= 11 and (without <= 6 or each > 2)


def test_too_few_samples_make_no_difference() -> None:
    """64 images, 128 features: the plain difference is significant with the wrong sign."""
    rng = np.random.default_rng(0)
    spread = np.arange(1, 129) ** -0.25
    reference = frechet.from_moments(np.zeros(128), np.diag(spread**2), 5000)
    right = rng.standard_normal((64, 128)) * spread
    found = frechet.paired(right, 0.9 * right, reference)
    assert np.isnan(found.z) and found.warnings == ("too few images: 64 for 128 features, 256 needed",)
    few = frechet.from_moments(np.zeros(128), np.diag(spread**2), 100)
    assert (
        frechet.paired(np.tile(right, (5, 1)), np.tile(right, (5, 1)), few)
        .warnings[0]
        .startswith("too few images: 100")
    )


def test_jackknife_removes_the_bias() -> None:
    plain, corrected = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x, y = law(rng, 250, 0.5), law(rng, 250)
        plain.append(frechet.fid(x, y))
        corrected.append(frechet.jackknife(x, y))

    def off(values: list[float]) -> float:
        return (np.mean(values) - truth(0.5)) / (np.std(values, ddof=1) / 40**0.5)

    assert abs(off(corrected)) < 3
    assert off(plain) > 10


def test_paired_difference() -> None:
    """Pairs that share most of their randomness: the paired SE is far below that of independent sets, and is right."""
    reference = frechet.from_features(law(np.random.default_rng(99), 4000))
    values, errors, alone = [], [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        a = law(rng, 400, 0.5)
        b = 0.99 * a + 0.02 * rng.standard_normal(a.shape)
        d = frechet.paired(a, b, reference)
        want = frechet.jackknife(a, reference) - frechet.jackknife(b, reference)
        assert d.value == pytest.approx(want, abs=1e-12)
        assert d.z == pytest.approx(d.value / d.se)
        values.append(d.value)
        errors.append(d.se)
        alone.append(frechet.standard_error(frechet.influence(a, reference)))
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.3)
    assert np.mean(errors) < 0.3 * np.mean(alone)
    assert frechet.paired(a, a, reference).z == 0


def test_bad_input_is_refused() -> None:
    x = law(np.random.default_rng(0), 30)
    sigma = np.cov(x.T)
    with pytest.raises(ValueError, match="not symmetric"):
        frechet.from_moments(x.mean(0), sigma + np.triu(np.ones_like(sigma), 1) * 1e-3)
    with pytest.raises(ValueError, match="eigenvalue"):
        frechet.from_moments(x.mean(0), sigma - 3 * np.eye(16))
    with pytest.raises(ValueError, match="NaN"):
        frechet.fid(np.where(x > 1.5, np.nan, x), x)
    with pytest.raises(ValueError, match=r"\(N, d\)"):
        frechet.from_features(x[:1])
    with pytest.raises(ValueError, match="16 and 15"):
        frechet.fid(x, x[:, :15])
    with pytest.raises(ValueError, match="equally many"):
        frechet.paired(x, x[:20], frechet.from_features(x))
    with pytest.raises(ValueError, match="at least 20 samples"):
        frechet.jackknife(x[:15], frechet.from_features(x), 10)
    with pytest.raises(ValueError, match="at least 4 samples"):
        frechet.jackknife(x[:3], frechet.from_features(x))


def test_singular_float32_statistics_are_accepted() -> None:
    """A float32 file rounds zero eigenvalues to about -1e-7 of the largest: no corruption."""
    x = law(np.random.default_rng(4), 10)
    sigma = np.cov(x.T).astype(np.float32)
    assert frechet.fid(frechet.from_moments(x.mean(0).astype(np.float32), sigma), x) == pytest.approx(0, abs=1e-3)
