"""DPM-Solver-v3: what it is with trivial statistics, exactness on Gaussian data, orders, ends, options."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from diffaccel.core.grid import GRIDS
from diffaccel.core.grid import nodes as grid_nodes
from diffaccel.core.path import Nodes, Path
from diffaccel.core.prediction import Prediction
from diffaccel.core.quad import Ems
from diffaccel.core.table import Table
from diffaccel.errors import OptionError
from diffaccel.samplers.registry import get
from diffaccel.testing.checks import CHECKS
from diffaccel.testing.convergence import ode_slope
from diffaccel.testing.problems import Gaussian, four_modes
from diffaccel.testing.runs import PATHS, accepts, unroll

V3 = get("dpm_v3")
PATH = Path.vp_linear()
UNEVEN = np.linspace(-1.5, 1.6, 9) + 0.1 * np.sin(2.0 * np.arange(9))
WIDE = np.linspace(-9.0, 9.0, 181)


def grid(lams, path=PATH, end=False):
    return Nodes([*(path.at_lam(float(v)) for v in lams), *([path.end] if end else [])], path)


def constant(l, s=0.0, lam=WIDE):
    return Ems(lam, np.full(len(lam), l), np.full(len(lam), s), np.zeros(len(lam)))


def expected_l(lam, points=500):
    """`E[sigma d eps_i/d x_i]` of the mixture of four modes, by Monte Carlo."""
    problem, rng, h = four_modes(), np.random.default_rng(5), 1e-5
    found = []
    for v in lam:
        node = Path.edm().at_lam(float(v))
        x = problem.draw(rng, points, node)
        jac = [(problem.noise(x + h * e, node) - problem.noise(x - h * e, node)) / (2 * h) * e for e in np.eye(2)]
        found.append(node.sigma * sum(jac).mean(0))
    return np.array(found)


def ragged(lam=WIDE):
    """Statistics of no model in particular: smooth, different in each dimension."""
    two = np.arange(1, 3)
    l = 1 / (1 + np.exp(2 * lam)[:, None] * two)
    return Ems(lam, l, -0.5 + 0.1 * np.tanh(lam)[:, None] * two, 0.05 * np.sin(lam)[:, None] * two)


# ---------------------------------------------------------------------- other methods as special cases
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("end", [False, True])
def test_data_prediction_is_exact_adams_in_data_space(order, end):
    nodes = grid(UNEVEN, end=end)
    bare = V3.trace(nodes, order=order, corrector=None, statistics=constant(1.0))
    adams = get("dpmpp").trace(nodes, order=order, form="exact")
    np.testing.assert_allclose(unroll(bare), unroll(adams), atol=1e-10)
    pair = V3.trace(nodes, order=order, statistics=constant(1.0))
    np.testing.assert_allclose(
        unroll(pair), unroll(get("unipc").trace(nodes, order=order, variant="exact")), atol=1e-10
    )
    np.testing.assert_allclose(unroll(V3.trace(nodes, order=order)), unroll(pair), atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_noise_prediction_is_exact_adams_in_noise_space(order):
    nodes = grid(UNEVEN)
    found = V3.trace(nodes, order=order, corrector=None, statistics=constant(0.0, -1.0))
    np.testing.assert_allclose(unroll(found), unroll(get("deis").trace(nodes, order=order)), atol=1e-10)


# ---------------------------------------------------------------------- Gaussian data
MEAN, STD = np.array([0.7, -0.3, 0.0]), np.array([0.3, 1.0, 1.7])


def gaussian_statistics(lam, s=0.0):
    """Exact: `l = 1/(1 + V e^(2 lam))`, f = -l m, so every s with `b = f' - s f` is right."""
    v = (STD**2)[None] * np.exp(2 * lam)[:, None]
    l, slope = 1 / (1 + v), -2 * v / (1 + v) ** 2
    return Ems(lam, l, np.full_like(l, s), -slope * MEAN + s * l * MEAN)


@pytest.mark.parametrize("s", [0.0, -1.0, 0.5])
def test_one_step_on_gaussian_data_is_exact_up_to_the_nodes_of_the_statistics(s):
    """Order 1, one model call over the whole range: the error falls with the square of the spacing."""
    problem, nodes = Gaussian(MEAN, STD), grid([-4.0, 3.5])
    x = np.random.default_rng(0).standard_normal((5, 3))
    exact = problem.flow(x, *nodes)
    found = []
    for m in (250, 1000):
        options = {"order": 1, "corrector": None, "statistics": gaussian_statistics(np.linspace(-4, 3.5, m + 1), s)}
        error = V3.trace(nodes, **options).apply(x, problem.predict) - exact
        found.append(np.abs(error).max())
    assert found[0] < 2e-3
    assert found[0] / found[1] == pytest.approx(16, rel=0.15)


@pytest.mark.parametrize("quadrature", ["exponential", "trapezoid"])
def test_a_point_is_exact_with_the_exponential_rule_only(quadrature):
    """Data that is one point: f = -x0 with l = 1; any s goes with `b = s x0`, since f does not change."""
    problem, lam = Gaussian(MEAN, 0.0), np.linspace(-4, 4, 121)
    ones = np.ones((121, 3))
    ems = Ems(lam, ones, -0.7 * ones, -0.7 * ones * MEAN)
    nodes = grid(lam[[0, 40, 80, 120]])
    x = nodes[0].alpha * MEAN + nodes[0].sigma * np.random.default_rng(1).standard_normal((4, 3))
    options = {"order": 3, "statistics": ems, "quadrature": quadrature}
    error = np.abs(V3.run(x, nodes, problem.denoise, **options) - problem.flow(x, nodes[0], nodes[-1])).max()
    assert (error < 1e-9) if quadrature == "exponential" else (1e-5 < error < 1e-2)


def test_statistics_of_the_model_beat_none():
    """On the mixture, five calls: better statistics give a smaller error than l = 1, s = b = 0."""
    problem, nodes = four_modes(), grid(np.linspace(-2, 2, 6))
    x = problem.draw(np.random.default_rng(2), 100, nodes[0])
    exact = problem.flow(x, nodes[0], nodes[-1])
    lam = np.linspace(-2, 2, 41)
    exact_l = expected_l(lam)
    # least squares for s and b on trajectories, as the calibration does
    trail, f = [x], []
    for v, w in pairwise(lam):
        trail.append(problem.flow(trail[-1], PATH.at_lam(v), PATH.at_lam(w), 1e-6))
    for k, v in enumerate(lam):
        node = PATH.at_lam(v)
        f.append((node.sigma * problem.noise(trail[k], node) - exact_l[k] * trail[k]) / node.alpha)
    f = np.array(f)
    slope = np.gradient(f, lam, axis=0)
    s = ((f - f.mean(1, keepdims=True)) * (slope - slope.mean(1, keepdims=True))).mean(1) / f.var(1)
    ems = Ems(lam, exact_l, s, slope.mean(1) - s * f.mean(1))
    error = {
        name: np.sqrt(((V3.trace(nodes, statistics=value).apply(x, problem.predict) - exact) ** 2).mean())
        for name, value in (("none", "none"), ("ems", ems))
    }
    assert error["ems"] < 0.7 * error["none"], error


# ---------------------------------------------------------------------- orders
ORDERS = [
    ({"order": 1, "corrector": None}, 1),
    ({"order": 1}, 2),
    ({"order": 2, "corrector": None}, 2),
    ({"order": 2, "corrector": "same"}, 2),
    ({"order": 2}, 3),
    ({"order": 2, "pseudo": ["corrector"]}, 2),
    ({"order": 3, "corrector": None}, 3),
    ({"order": 3, "corrector": None, "pseudo": ["predictor"]}, 2),
    ({"order": 3, "corrector": "same"}, 3),
    ({"order": 3}, 4),
]


@pytest.mark.parametrize(("options", "order"), ORDERS)
def test_orders_with_statistics_of_the_shape_of_a_sample(options, order):
    """The orders hold for any smooth statistics, up to the start: a first step without corrector allows order 2."""
    lam = np.linspace(-2.05, 2.05, 2)  # linear, so that the statistics have no kinks
    ems = Ems(lam, [[0.9, 0.8], [0.3, 0.1]], [[-0.4, 0.2], [-0.8, -0.1]], [[0.2, -0.1], [0.0, 0.1]])
    full = {**options, "lower_order_final": False, "statistics": ems}
    assert V3.order_of(**full) == order
    slope = ode_slope(V3, full, window=False, counts=(40, 80, 160))
    started = options.get("corrector", "plus") == "plus"
    assert slope.value >= min(order, 3 if started else 2) - 0.3, str(slope)
    assert slope.value <= order + 0.3, str(slope)


def test_the_loop_with_arrays_is_its_table():
    result = CHECKS["functional"](V3, {"statistics": ragged(), "order": 3})
    assert result.passed, str(result)


# ---------------------------------------------------------------------- ends
ENDS = [{"order": 1}, {"order": 2}, {"order": 3}, {"order": 3, "corrector": "same", "lower_order_final": False}]


@pytest.mark.parametrize("options", ENDS, ids=str)
@pytest.mark.parametrize("name", ["vp", "vp_zero_snr", "edm", "flow_shift3"])
def test_finite_on_every_grid_with_sigma_zero_at_the_end(options, name):
    path = PATHS[name]
    for kind in GRIDS:
        if not accepts(path, kind):
            continue
        for calls in (1, 2, 3, 20):
            nodes = grid_nodes(path, calls, kind)
            table = V3.trace(nodes, **options, statistics=ragged())
            rows = [v for row in table.rows for v in (row.out.x, *row.out.p, row.out.one)]
            assert all(np.all(np.isfinite(v)) for v in rows), (kind, calls)
            assert (table.rows[-1].space, table.rows[-1].a, table.rows[-1].out.p) == ("x0", 0.0, (1.0,))


def test_pure_noise_stays_out_of_the_history():
    path = Path.flow()
    nodes = Nodes([path.first, *(path.at_lam(v) for v in UNEVEN)], path)
    ems = ragged()
    rows, late = V3.trace(nodes, order=3, statistics=ems).rows, V3.trace(nodes[1:], order=3, statistics=ems).rows
    assert rows[0].space == "x0"
    assert Table(rows[1:]) == Table(late)


def test_arrays_survive_json_and_edits_reach_the_output_by_a_tensor():
    table = V3.trace(grid(UNEVEN), order=3, statistics=ragged())
    assert Table.from_json(table.to_json()) == table
    assert table.options["statistics"].startswith("<Ems: 181 nodes")
    assert not table.scalar
    assert table.rows[2].a.shape == (2,)
    given = np.random.default_rng(3).standard_normal((8, 4, 2))

    def run(edit):
        fed = iter(given)
        return table.apply(np.ones((4, 2)) + edit, lambda *_: next(fed), trajectory=True)

    edit = np.array([0.3, -0.2])
    for i, (a, b) in enumerate(zip(run(edit), run(0.0), strict=True)):
        np.testing.assert_allclose(a - b, np.broadcast_to(edit * product(table, i), (4, 2)), atol=1e-12)


def product(table, upto):
    return np.prod([row.a * np.ones(2) for row in table.rows[:upto]], axis=0)


# ---------------------------------------------------------------------- options
def test_corrector_range_switches_correctors_by_level():
    nodes = grid(UNEVEN)
    on, off = V3.trace(nodes), V3.trace(nodes, corrector=None)
    some = V3.trace(nodes, corrector_range=(UNEVEN[2] - 0.01, UNEVEN[4] + 0.01))
    for i, row in enumerate(some.rows):
        kept = (on if 2 <= i <= 4 else off).rows[i]
        assert Table((row,)) == Table((kept,)), i


def test_snap_moves_the_nodes_to_the_statistics():
    ems = ragged(np.linspace(-4, 4, 33))
    nodes = grid(UNEVEN, end=True)
    table = V3.trace(nodes, snap=True, statistics=ems)
    assert all(np.abs(ems.lam - row.node.lam).min() < 1e-9 for row in table.rows)
    assert table.rows[-1].next.sigma == 0
    with pytest.raises(OptionError, match=r"nodes 0 and 1.*one node"):
        V3.trace(grid([0.0, 0.01, 1.0]), snap=True, statistics=ems)


def test_a_grid_beyond_the_statistics_is_refused():
    with pytest.raises(OptionError, match=r"cover lam in \[-1, 1\].*lam_range"):
        V3.trace(grid(UNEVEN), statistics=ragged(np.linspace(-1, 1, 9)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": 4}, "1 to 3"),
        ({"corrector": "more"}, "corrector"),
        ({"pseudo": "corrector"}, "list"),
        ({"pseudo": ["both"]}, "pseudo"),
        ({"pseudo": ["corrector"], "corrector": None}, "no effect"),
        ({"corrector_range": (1.0, 0.0)}, "lam_min < lam_max"),
        ({"corrector_range": (0.0, 1.0), "corrector": None}, "needs a corrector"),
        ({"statistics": "some"}, "an Ems"),
        ({"quadrature": "trapezoid"}, "statistics"),
        ({"quadrature": "simpson", "statistics": constant(1.0)}, "quadrature"),
        ({"snap": True}, "there are none"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        V3.trace(grid(UNEVEN), **options)


def test_functional_with_tensors():
    """Arrays of coefficients meet torch states: the same numbers as with numpy."""
    import torch

    problem, nodes, ems = four_modes(), grid(UNEVEN), ragged()
    x = np.random.default_rng(7).standard_normal((6, 2))

    def predict(state, node):
        return Prediction(torch.from_numpy(problem.noise(state.numpy(), node)), "eps")

    got = V3.run(torch.from_numpy(x), nodes, predict, order=3, statistics=ems).numpy()
    want = V3.run(x, nodes, problem.denoise, order=3, statistics=ems)
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_orders_of_the_start():
    """ "plus" has a corrector at node 1 too, which lifts the start from second to third order and more."""
    same = ode_slope(V3, {"order": 3, "corrector": "same", "lower_order_final": False}, window=False, counts=(80, 160))
    plus = ode_slope(V3, {"order": 3, "lower_order_final": False}, window=False, counts=(80, 160))
    assert same.value < 2.4
    assert plus.value > 2.8
    assert math.isfinite(plus.value)
