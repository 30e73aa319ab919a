"""UniPC: what its variants share, its orders from an exact start, its end rules."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from diffaccel.core.path import Nodes, Path
from diffaccel.core.prediction import Prediction
from diffaccel.errors import OptionError
from diffaccel.samplers.registry import get
from diffaccel.testing.problems import four_modes

UNIPC = get("unipc")
PATH = Path.vp_linear()
UNEVEN = np.linspace(-1.5, 1.6, 9) + 0.1 * np.sin(2.0 * np.arange(9))


def grid(lams, end=False, path=PATH):
    return Nodes([*(path.at_lam(float(v)) for v in lams), *([path.end] if end else [])], path)


def coefficients(row, depth=6):
    return np.array([row.out.x, *row.out.p, *[0.0] * (depth - len(row.out.p))])


def gap(a, b):
    return float(np.max(np.abs(coefficients(a) - coefficients(b))))


def same(one, two):
    return max(gap(a, b) for a, b in zip(one.rows, two.rows, strict=True))


@pytest.mark.parametrize("space", ["x0", "eps"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_variants_differ_in_the_shortcut_rows_only(space, order):
    tables = {
        v: UNIPC.trace(grid(UNEVEN), variant=v, order=order, space=space, lower_order_final=False)
        for v in ("bh1", "bh2", "exact")
    }
    # The corrector of order 1 stands at node 1; the predictor of order 2 starts there, and is corrected at node 2.
    shortcut = {1: range(1, 8), 2: range(1, 8)}.get(order, (1, 2))
    for other in ("bh1", "bh2"):
        for i, (a, b) in enumerate(zip(tables["exact"].rows, tables[other].rows, strict=True)):
            assert (gap(a, b) > 1e-6) if i in shortcut else (gap(a, b) < 1e-12), (other, i, gap(a, b))


def test_vary_coeff_is_exact():
    tables = [UNIPC.trace(grid(UNEVEN), variant=v, order=3) for v in ("vary_coeff", "exact")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("end", [False, True])
def test_without_corrector_it_is_known_by_other_names(end):
    nodes = grid(UNEVEN, end)

    def bare(**options):
        return UNIPC.trace(nodes, corrector=False, **options)

    assert same(bare(order=2, variant="bh2"), get("dpmpp").trace(nodes, order=2, form="midpoint")) < 1e-12
    assert same(bare(order=3, variant="exact"), get("dpmpp").trace(nodes, order=3, form="exact")) < 1e-12
    for order in (1, 2, 3, 4):
        deis = get("deis").trace(nodes, order=order)
        assert same(bare(order=order, variant="exact", space="eps"), deis) < 1e-12


@pytest.mark.parametrize("space", ["x0", "eps"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("corrector", [False, True])
def test_order_from_an_exact_start(order, corrector, space):
    """The predictor has order p, the pair p + 1; the first p states and predictions lie on the exact solution."""
    problem, path = four_modes(), Path.edm()
    ends = grid((-1.0, 1.0), path=path)
    x = ends[0].sigma * np.random.default_rng(0).standard_normal((8, 2))
    exact = problem.flow(x, *ends)
    errors = []
    for n in (40, 80):
        nodes = grid(np.linspace(-1.0, 1.0, n + 1), path=path)
        states = [x]
        for s, t in pairwise(nodes[:order]):
            states.append(problem.flow(states[-1], s, t))

        def predict(state, node, nodes=nodes, states=states):
            k = next(i for i, other in enumerate(nodes) if other is node)
            if k < len(states):
                state[...] = states[k]
            return Prediction(problem.denoise(state, node))

        options = {"order": order, "variant": "exact", "space": space, "lower_order_final": False}
        options["corrector"] = list(range(order - 1)) if corrector else False
        errors.append(np.abs(UNIPC.run(x.copy(), nodes, predict, **options) - exact).max())
    slope = math.log2(errors[0] / errors[1])
    assert errors[1] > 1e-12
    assert slope == pytest.approx(order + corrector, abs=0.35)


@pytest.mark.parametrize("variant", ["bh1", "bh2", "exact"])
@pytest.mark.parametrize("space", ["x0", "eps"])
@pytest.mark.parametrize("lower", [True, False])
def test_the_last_row_is_the_prediction(variant, space, lower):
    for path in (PATH, Path.edm(), Path.flow(3.0)):
        for order in (1, 2, 3, 4):
            for n in (1, 2, 3, 20):
                nodes = Nodes([*(path.at_lam(v) for v in np.linspace(-4, 4, n)), path.end], path)
                options = {"order": order, "variant": variant, "space": space, "lower_order_final": lower}
                rows = UNIPC.trace(nodes, **options).rows
                assert all(np.isfinite(coefficients(row)).all() for row in rows)
                seen: list = []

                def predict(x, s, seen=seen):
                    seen.append(np.sin(x))
                    return Prediction(seen[-1])

                last = UNIPC.run(np.full(3, 2.0), nodes, predict, **options)
                if space == "x0":  # in noise space the corrector acts on x, from which eps was computed before
                    assert (rows[-1].a, rows[-1].out.p) == (0.0, (1.0,))
                    np.testing.assert_allclose(last, seen[-1], atol=1e-12)


@pytest.mark.parametrize("space", ["x0", "eps"])
def test_pure_noise_stays_out_of_the_history(space):
    path = Path.flow()
    nodes = Nodes([path.first, *(path.at_lam(v) for v in UNEVEN)], path)
    rows = UNIPC.trace(nodes, order=3, space=space).rows
    assert rows[0].space == "x0"
    assert {row.space for row in rows[1:]} == {space}
    late = UNIPC.trace(nodes[1:], order=3, space=space).rows
    assert max(gap(a, b) for a, b in zip(rows[2:], late[1:], strict=True)) < 1e-12
    bare = UNIPC.trace(nodes, order=3, space=space, corrector=[0]).rows  # without the corrector of the first step
    assert gap(bare[1], late[0]) < 1e-12


def test_skipped_correctors():
    nodes = grid(UNEVEN)
    on, off = UNIPC.trace(nodes, order=3), UNIPC.trace(nodes, order=3, corrector=False)
    some = UNIPC.trace(nodes, order=3, corrector=(0, 3))
    assert UNIPC.trace(nodes, order=3, corrector=[]) == on
    for i, row in enumerate(some.rows):
        want = off if i in (1, 4) else on
        assert gap(row, want.rows[i]) == 0
        assert i == 0 or gap(on.rows[i], off.rows[i]) > 1e-6
    with pytest.raises(OptionError, match="step indices"):
        UNIPC.trace(nodes, corrector=[-1])
    with pytest.raises(OptionError, match="step indices"):
        UNIPC.trace(nodes, corrector="all")


def test_no_corrector_in_noise_space_after_a_long_step():
    nodes = grid([-4.0, -0.9, 0.5, 1.0])
    on, off = (UNIPC.trace(nodes, space="eps", corrector=c).rows for c in (True, False))
    assert gap(on[1], off[1]) == 0
    assert gap(on[2], off[2]) > 1e-3
    data, bare = (UNIPC.trace(nodes, corrector=c).rows for c in (True, False))
    assert gap(data[1], bare[1]) > 1e-3


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_history_and_edits(order):
    """Points of the corrector: order + 1. An edit of the state is carried by the first-order factor alone."""
    table = UNIPC.trace(grid(UNEVEN), order=order, lower_order_final=False)
    assert table.depth == order + 1
    assert table.slots == 0
    for row in table.rows:
        assert row.a == pytest.approx(row.next.sigma / row.node.sigma, rel=1e-12)


def test_orders_declared():
    assert UNIPC.order_of(order=2) == 3
    assert UNIPC.order_of(order=2, corrector=[0]) == 3
    assert UNIPC.order_of(order=2, corrector=False) == 2
    with pytest.raises(OptionError, match="1 to 4"):
        UNIPC.trace(grid(UNEVEN), order=5)
    with pytest.raises(OptionError, match="variant"):
        UNIPC.trace(grid(UNEVEN), variant="bh3")


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_corrector_of_order_one(variant):
    """`x^c = x - alpha_t (B/2) (D_t - D_s)` with `B = -h` or `e^-h - 1`, then the first-order step."""
    nodes = grid(UNEVEN)
    row = UNIPC.trace(nodes, order=1, variant=variant).rows[1]
    h = np.diff([node.lam for node in nodes])
    b = 0.5 * nodes[1].alpha * (-h[0] if variant == "bh1" else math.expm1(-h[0]))
    step = -nodes[2].alpha * math.expm1(-h[1])
    assert row.out.p == pytest.approx((step - row.a * b, row.a * b), rel=1e-10)


@pytest.mark.parametrize("variant", ["bh1", "bh2", "exact"])
def test_the_corrector_after_pure_noise_is_exact_for_predictions_linear_in_the_level(variant):
    """From alpha = 0 the integral is over `u = alpha/sigma`, where D = 1 + 2u asks for the trapezoidal rule."""
    path = Path.flow()
    nodes = Nodes([path.at(1000.0), path.at(700.0), path.at(400.0)], path)
    table = get("unipc").trace(nodes, order=1, variant=variant, lower_order_final=False)
    x = np.array([0.3])
    got = table.apply(x, lambda x, node, space: np.array([1 + 2 * node.alpha / node.sigma]))
    first, second = nodes[1], nodes[2]
    u = first.alpha / first.sigma
    middle = first.sigma * (x + u + u**2)
    step = second.sigma * (second.alpha / second.sigma - u) * (1 + 2 * u)
    assert got == pytest.approx(second.sigma / first.sigma * middle + step, abs=1e-13)
    plain = get("unipc").trace(nodes, order=1, variant=variant, corrector=False)
    assert plain.apply(x, lambda x, node, space: np.array([1 + 2 * node.alpha / node.sigma])) != pytest.approx(got)
