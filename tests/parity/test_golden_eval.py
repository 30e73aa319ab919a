"""FID against values that other projects and 40-digit arithmetic gave on the same features."""

from __future__ import annotations

import golden_data
import numpy as np
import pytest

from diffaccel.eval import frechet

ALL = {path.stem: golden_data.load(path) for path in golden_data.cases("eval")}
CASES = [(file, key.removesuffix("_fid_mpmath")) for file, data in ALL.items() for key in data if "_fid_mpmath" in key]


def test_there_are_cases() -> None:
    assert CASES


@pytest.mark.parametrize("file, case", CASES)
def test_fid(file: str, case: str) -> None:
    data = ALL[file]
    real, fake, truth = data[f"{case}_real"], data[f"{case}_fake"], float(data[f"{case}_fid_mpmath"])
    singular = min(len(real), len(fake)) <= real.shape[1]
    moments = [frechet.from_moments(x.mean(0), np.cov(x.T)) for x in (fake, real)]
    assert frechet.fid(fake, real) == pytest.approx(truth, rel=1e-12)
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
