"""DEIS integrates polynomials in lam exactly, and grows its order as predictions become known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from diffaccel.core.path import Nodes, Path
from diffaccel.core.prediction import Prediction
from diffaccel.errors import OptionError
from diffaccel.samplers.registry import get

DEIS = get("deis")
LAMS = (-1.1, -0.8, -0.3, 0.1, 0.6, 1.0)


def grid(path, lams=LAMS):
    return Nodes([path.at_lam(v) for v in lams], path)


@pytest.mark.parametrize("path", [Path.vp_linear(), Path.edm(), Path.flow()], ids=lambda p: p.family)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_exact_for_polynomials_in_lam(order, path):
    """Where the history is full, `eps = lam^k` is integrated exactly for k < order, and not for k = order."""
    nodes = grid(path)
    rows = DEIS.trace(nodes, order=order, lower_order_final=False).rows
    row, i = rows[-1], len(rows) - 1
    for k in range(order + 1):
        past = [nodes[i - j].lam ** k for j in range(len(row.out.p))]
        ours = sum(b * p for b, p in zip(row.out.p, past, strict=True)) / row.next.alpha
        exact = -quad(lambda v, k=k: np.exp(-v) * v**k, row.node.lam, row.next.lam, epsabs=1e-13)[0]
        assert (abs(ours - exact) < 1e-12) == (k < order), (k, ours - exact)
    assert row.a == pytest.approx(row.next.alpha / row.node.alpha)


def test_order_grows_and_falls():
    lengths = [len(row.out.p) for row in DEIS.trace(grid(Path.edm()), order=3).rows]
    assert lengths == [1, 2, 3, 2, 1]
    lengths = [len(row.out.p) for row in DEIS.trace(grid(Path.edm()), order=4, lower_order_final=False).rows]
    assert lengths == [1, 2, 3, 4, 4]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ends(order):
    """From pure noise in data space, out of the history; to sigma = 0 of first order."""
    path = Path.flow()
    nodes = Nodes([path.first, *grid(path), path.end], path)
    table = DEIS.trace(nodes, order=order, lower_order_final=False)
    assert [row.space for row in table.rows] == ["x0", *["eps"] * 6]
    assert len(table.rows[1].out.p) == len(table.rows[-1].out.p) == 1
    x = DEIS.run(np.ones(2), nodes, lambda x, s: Prediction(np.full(2, 0.3)), order=order)
    np.testing.assert_allclose(x, 0.3, atol=1e-12)


def test_refuses_other_orders():
    with pytest.raises(OptionError, match="1 to 4"):
        DEIS.trace(grid(Path.edm()), order=5)
