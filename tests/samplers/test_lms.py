"""LMS integrates polynomials in sigma/alpha exactly."""

from __future__ import annotations

import numpy as np
import pytest

from diffaccel.core.path import Nodes, Path
from diffaccel.core.prediction import Prediction
from diffaccel.errors import OptionError
from diffaccel.samplers.registry import get

LMS = get("lms")
LEVELS = (9.0, 5.0, 3.0, 1.0, 0.6, 0.2)


def grid(path, levels=LEVELS):
    return Nodes([path.at_level(v) for v in levels], path)


@pytest.mark.parametrize("path", [Path.vp_linear(), Path.edm(), Path.flow()], ids=lambda p: p.family)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_exact_for_polynomials_in_level(order, path):
    rows = LMS.trace(grid(path), order=order).rows
    for i, row in enumerate(rows):
        known = min(order, i + 1)
        assert len(row.out.p) == known
        for k in range(known + 1):
            ours = sum(b * LEVELS[i - j] ** k for j, b in enumerate(row.out.p)) / row.next.alpha
            exact = (LEVELS[i + 1] ** (k + 1) - LEVELS[i] ** (k + 1)) / (k + 1)
            assert (abs(ours - exact) < 1e-9) == (k < known), (i, k, ours - exact)


def test_on_equal_steps_it_is_adams_bashforth():
    nodes = grid(Path.edm(), (5.0, 4.0, 3.0, 2.0, 1.0))
    np.testing.assert_allclose(LMS.trace(nodes).rows[3].out.p, -np.array([55, -59, 37, -9]) / 24, atol=1e-12)


@pytest.mark.parametrize("order", [1, 4])
def test_ends(order):
    path = Path.flow()
    nodes = Nodes([path.first, *grid(path), path.end], path)
    table = LMS.trace(nodes, order=order)
    assert [row.space for row in table.rows] == ["x0", *["eps"] * 6]
    assert len(table.rows[1].out.p) == len(table.rows[-1].out.p) == 1
    x = LMS.run(np.ones(2), nodes, lambda x, s: Prediction(np.full(2, 0.3)), order=order)
    np.testing.assert_allclose(x, 0.3, atol=1e-12)


def test_refuses_other_orders():
    with pytest.raises(OptionError, match="1 to 4"):
        LMS.trace(grid(Path.edm()), order=0)
