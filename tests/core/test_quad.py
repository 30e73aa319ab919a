"""Weighted exponential integrals: against an adaptive integrator, closed forms, the two rules against each other."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from diffaccel.core.quad import Ems
from diffaccel.errors import OptionError

LAM = np.linspace(-2.0, 2.0, 17)


def random(shape=(3,), seed=0, lam=LAM, quadrature="exponential"):
    rng = np.random.default_rng(seed)
    return Ems(lam, *(rng.standard_normal((len(lam), *shape)) for _ in range(3)), quadrature)


def reference(ems, start, stop):
    """(8, ...) L, S, beta, E_0..E_3, J by an adaptive integrator, restarted at every kink."""
    size = math.prod(ems.shape)

    def slope(u, y):
        total_l, total_s, beta = y.reshape(8, size)[:3]
        l, s, b = (v.reshape(size) for v in ems.at(u))
        weight = np.exp(total_l + total_s)
        powers = [weight * (u - start) ** k / math.factorial(k) for k in range(4)]
        return np.concatenate([l, s, np.exp(-total_s) * b, *powers, weight * beta])

    y = np.zeros(8 * size)
    ends = [start, *ems.lam[(ems.lam > start) & (ems.lam < stop)], stop]
    for a, b in pairwise(ends):
        y = solve_ivp(slope, (a, b), y, rtol=1e-13, atol=1e-14, method="DOP853").y[:, -1]
    return y.reshape(8, *ems.shape)


def flat(step):
    return np.array([step.dl, step.ds, step.beta, *step.moments, step.drift])


@pytest.mark.parametrize(("start", "stop"), [(-2.0, 2.0), (-1.37, 0.81), (0.1, 0.12), (-2.05, -1.9)])
@pytest.mark.parametrize("shape", [(3,), (2, 1, 2)])
def test_exact_between_any_two_levels(start, stop, shape):
    ems = random(shape)
    np.testing.assert_allclose(flat(ems.step(start, stop)), reference(ems, start, stop), rtol=1e-11, atol=1e-11)


def test_coarse_and_steep_statistics_are_integrated_as_well():
    ems = Ems(np.array([-3.0, 3.0]), [1.0, 0.2], [-2.0, -3.0], [0.5, -0.7])
    got, want = flat(ems.step(-2.5, 2.9)), reference(ems, -2.5, 2.9)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_data_prediction_has_closed_forms():
    """l = 1, s = b = 0: E_k are the moments of e^u."""
    step = Ems.data_prediction().step(-0.4, 1.1)
    h = 1.5
    assert (step.dl, step.ds, step.beta, step.drift) == pytest.approx((h, 0, 0, 0), abs=1e-14)
    e = math.exp(h)
    want = (e - 1, 1 + e * (h - 1), (e * (h * h - 2 * h + 2) - 2) / 2, (e * (h**3 - 3 * h**2 + 6 * h - 6) + 6) / 6)
    assert step.moments == pytest.approx(want, rel=1e-12)


def test_the_trapezoid_converges_to_the_exact_rule_at_second_order():
    smooth = [np.sin, np.cos, lambda u: np.exp(-u)]
    gaps = []
    for m in (40, 80):
        lam = np.linspace(-1, 1, m + 1)
        exact = Ems(lam, *(f(lam) for f in smooth))
        gaps.append(np.abs(flat(exact.step(-1, 1)) - flat(exact.integrated("trapezoid").step(-1, 1))).max())
    assert 1e-5 < gaps[1] < 1e-2
    assert gaps[0] / gaps[1] == pytest.approx(4, abs=0.2)


def test_values_at_and_between_nodes():
    ems = random(())
    np.testing.assert_array_equal(ems.at(LAM)[0], ems.l)
    middle = 0.5 * (LAM[3] + LAM[4])
    assert ems.at(middle)[2] == pytest.approx(0.5 * (ems.b[3] + ems.b[4]))
    assert ems.at(LAM[-1] + 0.05)[1] == ems.s[-1]
    assert ems.nearest(LAM[5] + 0.01) == LAM[5]


def test_a_level_outside_the_statistics_is_refused_with_both_ranges():
    ems = random()
    ems.step(-2.07, 0.0)  # within 2 % of the range
    with pytest.raises(OptionError, match=r"\[-2, 2\].*\[-2.2, 0\].*lam_range"):
        ems.step(-2.2, 0.0)


def test_statistics_are_values():
    ems = random()
    assert ems == random() and hash(ems) == hash(random())
    assert ems != random(seed=1) and ems != ems.integrated("trapezoid")
    assert pickle.loads(pickle.dumps(ems)) == ems and copy.deepcopy(ems) is ems
    assert "17 nodes" in str(ems) and ems.digest[:12] in str(ems)


@pytest.mark.parametrize(
    ("lam", "l", "words"),
    [
        (LAM[::-1], np.ones(17), "rise"),
        (LAM, np.ones(16), r"\(16,\)"),
        (LAM, np.full(17, np.nan), "finite"),
        (LAM[:1], np.ones(1), "one shape"),
    ],
)
def test_bad_statistics_are_refused(lam, l, words):
    with pytest.raises(OptionError, match=words):
        Ems(lam, l, 0 * l + 1, 0 * l + 1)


# ---------------------------------------------------------------------- other sizes
@pytest.mark.parametrize(("own", "size"), [((8, 8), (16, 12)), ((8, 6), (3, 6)), ((5, 5), (5, 5)), ((4, 4), (1, 9))])
def test_resized_statistics_are_torchs_bilinear_interpolation(own, size):
    import torch

    l, s, b = np.random.default_rng(0).standard_normal((3, 4, 2, *own))
    ems = Ems(np.arange(4.0), l, s, b)
    found = ems.resized((2, *size))
    for mine, given in zip((found.l, found.s, found.b), (l, s, b)):
        want = torch.nn.functional.interpolate(torch.from_numpy(given), size=size, mode="bilinear", align_corners=False)
        np.testing.assert_allclose(mine, want.numpy(), atol=1e-12)
    assert ems.resized((2, *size)) is found and (found is ems) == (own == size)


def test_resizing_where_it_has_no_meaning():
    wide = Ems([0.0, 1.0], *np.ones((3, 2, 4, 1, 1)))
    assert wide.resized((4, 9, 9)) is wide
    for own, shape in (((4, 8, 8), (3, 8, 8)), ((16, 64), (32, 64)), ((4, 8, 8), (4, 2, 8, 8)), ((3, 8, 8), (4, 4))):
        with pytest.raises(OptionError, match="serve samples"):
            Ems([0.0, 1.0], *np.ones((3, 2, *own))).resized(shape)
