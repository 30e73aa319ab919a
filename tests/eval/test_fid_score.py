"""FID as users meet it: sources, correction, interval, notes, paired differences; precision and recall."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eval_nets import Pooled, coloured
from hypothesis import given, settings
from hypothesis import strategies as st

from diffaccel.errors import OptionError
from diffaccel.eval import fid, fid_difference, frechet, precision_recall, stats
from diffaccel.eval.manifold import coverage
from diffaccel.eval.score import Score

A, B = coloured(60, 1, shift=10), coloured(80, 2)


def law(seed: int, n: int, shift: float = 0.0, d: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)) + shift / d**0.5


def test_images_statistics_and_features_agree() -> None:
    net = Pooled()
    x, y = (net(torch.from_numpy(s).permute(0, 3, 1, 2)) for s in (A, B))
    want = frechet.fid(x, y)
    of_images = fid(A, B, features=net)
    of_features = fid(x, y, features="pooled")
    assert of_images.raw == of_features.raw == want
    assert of_images.value == of_features.value == pytest.approx(frechet.jackknife(x, y))
    assert fid(A, stats(B, features=net), features=net) == of_images
    against = fid(A, frechet.from_features(y), features=net)
    assert against.raw == pytest.approx(want, rel=1e-10)
    assert against.value == pytest.approx(frechet.jackknife(x, frechet.from_features(y)), rel=1e-9)
    assert against.n_b == 80 and any("taken as exact" in note for note in against.notes)


def test_the_printed_line() -> None:
    s = Score(12.414, 12.02, 12.8, 12.5, 10000, 50000, "inception-v3:clean", "", "FID")
    assert str(s) == "FID 12.41 [12.02, 12.80], 10000 vs 50000 images, inception-v3, clean resize"
    s = Score(12.0, 11.9, 12.1, 12.5, 100, None, "tiny-fashion", "", "FID (tiny-fashion features, not Inception)")
    assert s.line == (
        "FID (tiny-fashion features, not Inception) 12.00 [11.90, 12.10] (uncorrected 12.50), "
        "100 vs unknown number of images, tiny-fashion"
    )
    score = fid(A, B, features=Pooled(), paper=True)
    assert score.label == "FID (pooled features, not Inception)" and score.value == score.raw
    assert str(score).startswith(score.line) and score.estimator.startswith("plain")


def test_correction_and_interval() -> None:
    """The truth (1.0: a shift of length 1) is inside the interval of the corrected value; the plain one is far off."""
    score = fid(law(0, 300, 1.0), law(1, 300))
    assert score.low < 1.0 < score.high < score.raw + 0.5
    assert abs(score.value - 1.0) < abs(score.raw - 1.0)
    assert score.estimator.startswith("jackknife, 10 groups")
    wide = fid(law(0, 40, 1.0, 300), law(1, 40, 0, 300))
    assert wide.estimator == "jackknife, 2 groups; no interval"
    se = (score.high - score.low) / 2 / 1.959963984540054
    fixed = fid(law(0, 300, 1.0), frechet.from_features(law(1, 300)))
    assert (fixed.high - fixed.low) / 2 / 1.959963984540054 < se  # a reference that is exact adds nothing


def test_few_images_warn() -> None:
    assert any("3 images are too few for a jackknife" in w for w in fid(law(0, 3), law(1, 30)).warnings)
    plain = fid(law(0, 10), law(1, 12), paper=True)
    assert sum("bias dominates" in w for w in plain.warnings) == 2
    both = fid(frechet.from_features(law(0, 30)), frechet.from_features(law(1, 30)))
    assert np.isnan(both.low) and any("no bias correction and no interval" in w for w in both.warnings)
    assert both.to_dict()["low"] is None
    other_side = fid(frechet.from_features(law(0, 30)), law(1, 30))
    assert other_side.value < other_side.raw


@pytest.mark.parametrize("n, m", [(20, 600), (255, 256), (600, 100)])
def test_no_interval_below_two_images_a_feature(n: int, m: int) -> None:
    """20 images for 128 features: the corrected value is far off, and no interval of it may be believed."""
    score = fid(law(0, n, 0.7, 128), law(1, m, 0, 128))
    said = [w for w in score.warnings if "bias dominates this number, corrected or not" in w]
    assert len(said) == (n < 256) + (m < 256) and "for 128 features, 256 needed" in said[0]
    assert score.to_dict()["low"] is score.to_dict()["high"] is None
    assert "(no interval)" in score.line and "nan" not in str(score) and said[0] in str(score)
    enough = fid(law(0, 256, 0.7, 128), law(1, 256, 0, 128))
    assert enough.low < enough.value < enough.high and not enough.warnings
    reference = frechet.from_features(law(2, 600, 0, 128))
    pairs = fid_difference(law(0, 255, 0.7, 128), law(0, 255, 0, 128), reference)
    assert np.isnan(pairs.se) and pairs.warnings == ("too few images: 255 for 128 features, 256 needed",)


def test_a_negative_value_is_given_as_it_is() -> None:
    """Equal laws: about half the corrected values are below zero. Shared images: far below, and no interval holds."""
    reference = frechet.from_moments(np.zeros(16), np.eye(16))
    scores = [fid(law(s, 400), reference) for s in range(12)]
    assert 2 <= sum(s.value < 0 for s in scores) <= 10
    assert all(s.low < 0 < s.high and s.estimator.startswith("jackknife") and not s.warnings for s in scores)
    x = law(0, 300, d=32)
    shared = fid(x, frechet.from_features(np.concatenate([x, law(1, 20, d=32)])))
    assert shared.value < 0 and np.isnan(shared.low)
    assert any("do the two sides share images?" in w for w in shared.warnings)


@pytest.mark.parametrize("n", [20, 300])
def test_statistics_of_the_same_images(n: int) -> None:
    """The jackknife would say -23 with an interval of no width."""
    x = law(0, n, d=32)
    for score in (fid(x, frechet.from_features(x)), fid(frechet.from_features(x), x)):
        assert abs(score.value) < 1e-9 and np.isnan(score.low) and score.estimator.startswith("plain")
        assert any("do they hold the same images?" in w for w in score.warnings)


def test_extrapolation() -> None:
    score = fid(law(0, 400, 1.0), law(1, 4000), extrapolate=True)
    assert abs(score.value - 1.0) < abs(score.raw - 1.0) and score.estimator.startswith("FID_infinity")
    with pytest.raises(OptionError, match="contradict"):
        fid(A, B, features=Pooled(), extrapolate=True, paper=True)
    with pytest.raises(OptionError, match="at least 60 images"):
        fid(law(0, 59), law(1, 80), extrapolate=True)
    with pytest.raises(OptionError, match="first side, not statistics"):
        fid(frechet.from_features(law(0, 80)), law(1, 80), extrapolate=True)


def test_paired_difference() -> None:
    """Two rows that share most of their randomness: the paired z sees what the intervals do not."""
    reference = law(9, 2000)
    a = law(0, 400, 1.0)
    b = a - 0.05 / 4
    d = fid_difference(a, b, reference)
    known = frechet.from_features(reference)
    assert d.value == pytest.approx(fid(a, known).value - fid(b, known).value, abs=1e-12)
    assert d.z > 3
    one, two = fid(a, reference), fid(b, reference)
    assert one.low < two.high
    with pytest.raises(OptionError, match="equally many"):
        fid_difference(a, b[:50], reference)
    with pytest.raises(OptionError, match="both sides, not statistics"):
        fid_difference(frechet.from_features(a), b, reference)


def test_different_features_are_refused() -> None:
    class Other(Pooled):
        id = "other"

    with pytest.raises(OptionError, match=r"different features.*'other'.*'pooled'"):
        fid(A, stats(B, features=Pooled()), features=Other())
    with pytest.raises(OptionError, match=r"takes no option 'bach'. Did you mean 'batch'"):
        fid(A, B, features=Pooled(), bach=3)
    with pytest.raises(OptionError, match=r"different widths: .* 16, .* 15"):
        fid(law(0, 30), law(0, 30)[:, :15])


@settings(max_examples=12, deadline=None)
@given(st.integers(4, 40), st.integers(4, 40), st.integers(2, 24), st.floats(0.01, 100), st.integers(0, 10**6))
def test_equals_torchmetrics(n: int, m: int, d: int, scale: float, seed: int) -> None:
    """Acceptance 6: its FID with a module that returns features unchanged, at full rank 1e-9. A singular covariance
    costs its eigenvalue method half the digits (golden data: 6e-8 of ours)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Unchanged(torch.nn.Module):
        num_features = d

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, d)) * scale, (rng.standard_normal((m, d)) + 1) * scale
    metric = FrechetInceptionDistance(feature=Unchanged()).set_dtype(torch.float64)
    metric.update(torch.tensor(y), real=True)
    metric.update(torch.tensor(x), real=False)
    ours = fid(x, y, paper=True).value
    full_rank = min(n, m) > 2 * d
    assert ours == pytest.approx(float(metric.compute()), rel=1e-9 if full_rank else 1e-5)


def test_balls_reach_to_the_kth_neighbour() -> None:
    """Samples at 0, 1, 3: radii 1, 1, 2 for the first neighbour and 3, 2, 3 for the second."""
    of, points = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[-0.9], [-1.1], [4.9], [5.1], [-3.1]])
    assert coverage(points, of, 1).tolist() == [True, False, True, False, False]
    assert coverage(points, of, 2, block=2).tolist() == [True, True, True, True, False]


def test_precision_and_recall() -> None:
    """Same law: both high. Copies of few reference points: precise, little recall. Far away: neither."""
    real = law(0, 200, d=2)
    same = precision_recall(law(1, 200, d=2), real)
    assert all(s.value > 0.8 and s.low < s.value < s.high for s in same)
    collapsed = precision_recall(real[:5].repeat(20, 0) + 1e-3 * law(2, 100, d=2), real)
    assert collapsed[0].value > 0.9 and collapsed[1].value < 0.1
    assert [s.value for s in precision_recall(real + 100, real)] == [0, 0]
    assert same[0].label == "precision (given features)"
    with pytest.raises(OptionError, match="more than 3 images"):
        precision_recall(real[:3], real)
