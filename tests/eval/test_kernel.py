"""KID and CMMD: unbiased, equal in any blocks, right standard errors, torch-fidelity's subsets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eval_nets import Pooled, coloured

from diffaccel.errors import OptionError
from diffaccel.eval import cmmd, frechet, kernel, kid


def law(seed: int, n: int, d: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    k = [(p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y))]
    n, m = len(x), len(y)
    return (
        (k[0].sum() - np.trace(k[0])) / (n * (n - 1)) + (k[1].sum() - np.trace(k[1])) / (m * (m - 1)) - 2 * k[2].mean()
    )


def test_value_and_blocks() -> None:
    x, y = law(0, 50), law(1, 35) + 0.3
    want = by_definition(x, y)
    for block in (7, 1000):
        got = kernel.mmd(x, y, block=block)
        assert got.unbiased == pytest.approx(want, abs=1e-12)
    assert kernel.mmd(x, y, kernel.gaussian, block=7).biased == pytest.approx(
        kernel.mmd(x, y, kernel.gaussian).biased, abs=1e-12
    )


def test_unbiased() -> None:
    """Two halves of one law, 200 times: the mean is within 3 SE of 0, and half the values are negative."""
    values = np.array([kernel.mmd(law(2 * s, 40), law(2 * s + 1, 40)).unbiased for s in range(200)])
    assert abs(values.mean()) < 3 * values.std() / 200**0.5
    assert 0.3 < (values < 0).mean() < 0.8


def test_standard_error() -> None:
    got = [kernel.mmd(law(2 * s, 100) + 0.5, law(2 * s + 1, 120)) for s in range(100)]
    values, errors = np.array([g.unbiased for g in got]), np.array([g.se for g in got])
    assert np.mean(errors) == pytest.approx(values.std(), rel=0.3)
    truth = values.mean()
    assert 0.88 <= (abs(values - truth) < 1.96 * errors).mean() <= 1


def test_subsets_draw_as_torch_fidelity() -> None:
    x, y = law(0, 60), law(1, 80) + 0.2
    rng = np.random.RandomState(2020)
    want = []
    for _ in range(5):
        first, second = x[rng.choice(60, 30, replace=False)], y[rng.choice(80, 30, replace=False)]
        want.append(by_definition(first, second))
    assert kernel.subset_values(x, y, 5, 30) == pytest.approx(np.array(want), abs=1e-12)
    score = kid(x, y, subsets=5, subset_size=30)
    assert score.value == pytest.approx(np.mean(want)) and score.estimator.startswith("mean of 5 subsets of 30")
    assert score.details["spread over subsets x1000"] == pytest.approx(1000 * np.std(want))
    with pytest.raises(OptionError, match="subsets of 1000"):
        kid(x, y, subsets=5)


def test_score() -> None:
    score = kid(coloured(30, 1, shift=20), coloured(40, 2), features=Pooled())
    assert score.line.startswith("KID x1000 (pooled features, not Inception) ")
    assert score.low < score.value < score.high and (score.n_a, score.n_b) == (30, 40)
    with pytest.raises(OptionError, match=r"only mu and sigma.*keep_features"):
        kid(law(0, 30), frechet.from_features(law(1, 30)))


def test_cmmd() -> None:
    """Near 10 |mean difference|^2 of unit vectors; scale of the embeddings does not matter; the estimator is named."""
    x, y = law(0, 200) + 1, law(1, 300) + 1.5
    unbiased, biased = cmmd(3 * x, y, features=None), cmmd(x, y, features=None, estimator="biased")
    u, v = (torch.nn.functional.normalize(torch.tensor(z), dim=1) for z in (x, y))
    assert biased.value == pytest.approx(10 * float((u.mean(0) - v.mean(0)).pow(2).sum()), rel=0.05)
    assert biased.value == unbiased.raw > unbiased.value
    assert unbiased.label == "CMMD (unbiased)" and unbiased.low < unbiased.value < unbiased.high
    with pytest.raises(OptionError, match="biased, unbiased"):
        cmmd(x, y, features=None, estimator="v")


@pytest.mark.parametrize(
    "n, options, message",
    [
        (1, {}, "at least 2 images on each side, got 1 and 20"),
        (20, {"subsets": 0}, "subsets is 1 or more, got 0"),
        (20, {"subsets": -1, "subset_size": 10}, "subsets is 1 or more, got -1"),
        (20, {"subsets": 3, "subset_size": 0}, "subset_size is 2 or more, got 0"),
        (20, {"subsets": 3, "subset_size": 1}, "subset_size is 2 or more, got 1"),
    ],
)
def test_numbers_that_make_no_kid(n: int, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        kid(law(0, n), law(1, 20), **options)


def test_features_that_are_no_numbers_are_refused() -> None:
    x = law(0, 20)
    x[3, 2] = np.nan
    for metric in (kid, cmmd):
        with pytest.raises(OptionError, match="contain NaN or infinity"):
            metric(x, law(1, 20), features="some")


def test_cmmd_takes_weights(tmp_path) -> None:
    with pytest.raises(OptionError, match="no Inception weights at"):
        cmmd(coloured(4), coloured(4, 1), features="inception-v3:tf", weights=tmp_path / "none.pth")
