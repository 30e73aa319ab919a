"""RES 2M: the same numbers as the exact form of DPM-Solver++ 2M."""

from __future__ import annotations

import math

import numpy as np
import pytest

import diffaccel as da
from diffaccel.core.path import Nodes, Path
from diffaccel.testing.runs import unroll


@pytest.mark.parametrize("path", [Path.edm(), Path.flow(3.0)])
def test_it_is_the_exact_form_of_2m(path):
    nodes = da.nodes(path, 9)
    parent = da.trace("dpmpp", nodes, form="exact", lower_order_final=False)
    np.testing.assert_allclose(unroll(da.trace("res_2m", nodes)), unroll(parent), atol=1e-13)


def test_published_weights():
    lams = [0.0, 0.5, 1.3]
    path = Path.edm()
    row = da.trace("res_2m", Nodes([path.at_lam(v) for v in lams], path)).rows[1].out
    h, c = 0.8, -0.5 / 0.8
    phi1 = -math.expm1(-h) / h
    phi2 = (1 - phi1) / h
    np.testing.assert_allclose(row.p, [h * (phi1 - phi2 / c), h * phi2 / c], rtol=1e-12)
    assert row.x == pytest.approx(math.exp(-h), rel=1e-14)
