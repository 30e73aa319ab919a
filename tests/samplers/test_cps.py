"""CPS: closed form, exact noise level, limits."""

from __future__ import annotations

import math

import numpy as np
import pytest

import diffaccel as da
from diffaccel.core.path import Nodes, Path
from diffaccel.errors import OptionError
from diffaccel.testing.runs import point_mass_error, unroll

FLOW = Path.flow(3.0)


def test_closed_form_on_flow():
    """`x' = (1 - sigma') D + sigma' cos(th) e + sigma' sin(th) z` with `D = x - sigma v`, `e = x + (1 - sigma) v`."""
    eta, s, t = 1.3, 0.7, 0.4
    row = da.trace("cps", Nodes([FLOW.at(1000 * s), FLOW.at(1000 * t)], FLOW), eta=eta).rows[0].out
    x, v, z = 0.3, -1.1, 0.6
    d, e, th = x - s * v, x + (1 - s) * v, eta * math.pi / 2
    expected = (1 - t) * d + t * abs(math.cos(th)) * e + t * math.sin(th) * z
    assert row.x * x + row.p[0] * d + row.z[0][1] * z == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("eta", [0.7, 1.0, 1.8, 2.0])
@pytest.mark.parametrize("path", [Path.edm(), FLOW])
def test_marginals_of_a_point_mass_are_exact(path, eta):
    assert point_mass_error(da.trace("cps", da.nodes(path, 8, "karras"), eta=eta)) < 1e-12


def test_eta_0_is_ddim():
    nodes = da.nodes(FLOW, 6)
    table = da.trace("cps", nodes, eta=0.0)
    assert not table.stochastic
    np.testing.assert_allclose(unroll(table), unroll(da.trace("ddim", nodes)), atol=1e-15)


def test_bad_eta():
    with pytest.raises(OptionError, match="eta"):
        da.trace("cps", da.nodes(FLOW, 4), eta=2.1)
