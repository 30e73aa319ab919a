"""The rewriter `skip`: merged tables against loops, the theorem, the budget, where runs can begin, what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffaccel.core.extrapolation import Predictor
from diffaccel.core.grid import nodes as grid_nodes
from diffaccel.core.path import Nodes
from diffaccel.core.pattern import ALLOWED, NAMES, Regular, parse
from diffaccel.errors import OptionError
from diffaccel.samplers.begin import begin_at
from diffaccel.samplers.registry import get
from diffaccel.samplers.rewrite import rewritten
from diffaccel.samplers.skip import skip
from diffaccel.testing.convergence import ode_slope
from diffaccel.testing.problems import four_modes
from diffaccel.testing.runs import PATHS, invariant, point_mass_error, unroll

PROBLEM = four_modes()
STREAK = "h3, 6, 7, 9, 12"  # a skip soon after another: its predictor would see a predicted answer if it were kept


def skipping(name, *args, **options):
    return rewritten(name, skip(*args, **options))


def start(nodes, n=5):
    return np.hypot(nodes[0].alpha, nodes[0].sigma) * np.random.default_rng(0).standard_normal((n, 2))


# ---------------------------------------------------------------------- patterns and the budget
@pytest.mark.parametrize("name", NAMES)
def test_nodes_for_calls_against_brute_force(name):
    for first, last in itertools.product(range(5), range(1, 5)):
        pattern = parse(name, (first, last))
        calls = [n - len(pattern.skipped(n)) for n in range(1, 200)]
        for m in range(1, 61):
            assert pattern.nodes_for(m) == max(n for n, c in zip(range(1, 200), calls, strict=True) if c == m)


def test_published_counts():
    assert [parse("h2/s2").nodes_for(m) for m in (15, 10, 6)] == [20, 13, 7]
    assert parse("h3/s3").skipped(20) == [6, 10, 14]
    assert parse("h4").skipped(20) == [8, 13]


@given(st.sampled_from(NAMES), st.integers(1, 80), st.integers(0, 5), st.integers(1, 5))
def test_a_pattern_keeps_its_promises(name, n, first, last):
    pattern = parse(name, (first, last))
    found = pattern.skipped(n)
    assert all(first <= i < n - last for i in found)
    assert all(b - a == pattern.between + 1 for a, b in itertools.pairwise(found))
    assert found[:1] in ([], [max(first, pattern.history) + pattern.between])


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("h3/s2", "there are h2/s2"),
        ("h5", "there are h2/s2"),
        ("h2, 1, 5", "node 1 cannot be predicted"),
        ("h2, x", "'x' is neither"),
        ([], "names no node"),
    ],
)
def test_unknown_patterns_are_errors(pattern, says):
    with pytest.raises(OptionError, match=says):
        parse(pattern)


def test_options_without_effect_are_errors():
    with pytest.raises(OptionError, match="no effect"):
        parse("h2/s2", streak_rule=True)
    with pytest.raises(OptionError, match="node 30 is none of it"):
        parse([5, 30]).nodes_for(10)


# ---------------------------------------------------------------------- the merged table
SAMPLERS = [
    ("ddim", {}, ("x0", "eps", "flow", "residual")),
    ("dpmpp", {"order": 2, "form": "exact"}, ("x0",)),
    ("dpmpp", {"order": 2}, ("x0",)),
    ("dpmpp", {"order": 3}, ("x0",)),
    ("deis", {"order": 2}, ("eps",)),
    ("unipc", {"order": 1, "corrector": False}, ("x0",)),
]


def cases():
    for (name, options, quantities), pattern in itertools.product(SAMPLERS, NAMES):
        if pattern.endswith(("s2", "s4")):
            for quantity, coordinate in itertools.product(quantities, ("index", "sigma", "lam")):
                yield name, options, pattern, quantity, coordinate


ALL = list(cases())


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(ALL),
    st.sampled_from(["vp", "edm", "flow", "flow_shift3", "vp_zero_snr"]),
    st.sampled_from(["karras", "trailing", "uniform_lambda"]),
    st.integers(6, 24),
    st.booleans(),
)
def test_table_equals_loop(case, path, grid, calls, real_history):
    name, options, pattern, quantity, coordinate = case
    made = skipping(name, pattern, quantity=quantity, coordinate=coordinate, real_history=real_history)
    nodes = grid_nodes(PATHS[path], made.intervals_of(calls, **options), grid)
    table = made.trace(nodes, calls, **options)
    assert len(table) == calls == len(table.timesteps)
    x, seen = start(nodes), []

    def predict(state, node):
        seen.append(state)
        return PROBLEM.denoise(state, node)

    last = made.run(x, nodes, predict, **options)
    states = table.apply(x, PROBLEM.predict, trajectory=True)
    scale = 1 + max(float(np.abs(s).max()) for s in seen)
    tolerance = 1e-12 if "eps" not in quantity and quantity != "residual" else 1e-9  # eps cancels near alpha = 0
    for a, b in zip([*seen, last], states, strict=True):
        assert np.abs(a - b).max() <= tolerance * scale


def plain_loop(nodes, x, pattern, predictor):
    """DDIM with skips, written out: what the table must be."""
    path, past = nodes.path, []
    skipped = pattern.skipped(len(nodes) - 1)
    for i, (s, t) in enumerate(itertools.pairwise(nodes)):
        if i in skipped:
            chosen = past[: pattern.history]
            position = (lambda n: n.lam) if predictor.coordinate == "lam" else (lambda n: n.sigma / n.alpha)
            w = [
                np.prod([(position(s) - position(o)) / (position(n) - position(o)) for o, _ in chosen if o is not n])
                for n, _ in chosen
            ]
            d = sum(wk * q for wk, (_, q) in zip(w, chosen, strict=True))
            d = d if predictor.quantity == "x0" else (x - s.sigma * d) / s.alpha
        else:
            d = PROBLEM.denoise(x, s)
            past = [(s, d if predictor.quantity == "x0" else (x - s.alpha * d) / s.sigma), *past]
        x = t.alpha * d + t.sigma * (x - s.alpha * d) / s.sigma
    assert path is nodes.path
    return x


@pytest.mark.parametrize("name", ["h2/s2", "h3/s3", "h4/s5", STREAK])
@pytest.mark.parametrize("quantity", ["x0", "eps"])
@pytest.mark.parametrize("coordinate", ["lam", "sigma"])
def test_table_equals_a_loop_written_by_hand(name, quantity, coordinate):
    nodes = grid_nodes(PATHS["vp"], 23, "karras")
    pattern, predictor = parse(name), Predictor(int(name[1]), quantity, coordinate)
    table = skipping("ddim", name, quantity=quantity, coordinate=coordinate).trace(nodes)
    x = start(nodes)
    np.testing.assert_allclose(
        table.apply(x, PROBLEM.predict), plain_loop(nodes, x, pattern, predictor), rtol=0, atol=1e-12
    )


# ---------------------------------------------------------------------- the theorem
@pytest.mark.parametrize(("order", "pattern"), [(2, "h2/s2"), (2, "h2/s4"), (3, "h3/s3"), (3, STREAK)])
@pytest.mark.parametrize("path", ["vp", "edm", "flow_shift3"])
def test_matching_predictor_leaves_the_nodes_out(order, pattern, path):
    """Exact p-step sampler + p points in (x0, lam) = the same sampler on the nodes that are called."""
    options = {"order": order, "form": "exact", "lower_order_final": False}
    nodes = grid_nodes(PATHS[path], 20, "karras" if path != "flow_shift3" else "uniform_lambda")
    dropped = set(parse(pattern).skipped(20))
    kept = Nodes([n for i, n in enumerate(nodes) if i not in dropped], nodes.path)
    wanted = unroll(get("dpmpp").trace(kept, **options))
    found = unroll(skipping("dpmpp", pattern).trace(nodes, **options))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    stored = unroll(skipping("dpmpp", pattern, real_history=False).trace(nodes, **options))
    assert np.abs(stored - wanted).max() > 1e-4  # predictions in the history make it another method


# ---------------------------------------------------------------------- what every sampler promises
@pytest.mark.parametrize("coordinate", ["lam", "sigma", "index"])
@pytest.mark.parametrize(("path", "quantity"), [("vp", "x0"), ("vp", "eps"), ("flow_shift3", "flow"), ("edm", "x0")])
@pytest.mark.parametrize("pattern", ["h2/s2", "h3/s3", "h4/s4"])
def test_point_mass_is_exact(pattern, path, quantity, coordinate):
    """One point: x0 and eps are constant along the run, so every polynomial through them is exact."""
    made = skipping("ddim", pattern, quantity=quantity, coordinate=coordinate)
    assert point_mass_error(made.trace(grid_nodes(PATHS[path], 20, "trailing"))) < 1e-9


def test_residual_is_not_exact_in_index_coordinates():
    made = skipping("ddim", "h2/s2", quantity="residual", coordinate="index")
    assert point_mass_error(made.trace(grid_nodes(PATHS["edm"], 20, "karras"))) > 0.01


@pytest.mark.parametrize("quantity", ["x0", "eps"])
def test_path_invariance(quantity):
    made = skipping("ddim", "h2/s2", quantity=quantity)
    lams = np.linspace(-2.2, 2.6, 16) + 0.11 * np.sin(np.arange(16))
    found = [
        invariant(made.trace(Nodes([path.at_lam(float(v)) for v in lams], path)))
        for path in (PATHS["vp"], PATHS["edm"], PATHS["flow"])
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-9)


def test_orders():
    assert 0.8 <= ode_slope(skipping("ddim", "h2/s2"), {}).value <= 1.2
    exact = {"order": 2, "form": "exact", "lower_order_final": False}
    assert 1.8 <= ode_slope(skipping("dpmpp", "h2/s2"), exact).value <= 2.2


# ---------------------------------------------------------------------- begin anywhere
@pytest.mark.parametrize(("name", "options"), [("ddim", {}), ("dpmpp", {"order": 2})])
@pytest.mark.parametrize("pattern", ["h2/s2", "h3/s4", "h2, 4, 5, 9"])
def test_a_run_can_begin_at_any_call(name, options, pattern):
    made = skipping(name, pattern)
    nodes = grid_nodes(PATHS["vp"], made.intervals_of(15, **options), "trailing")
    full = made.options(options)
    table = made.trace(nodes, 15, **options)
    for k in range(15):
        rest = begin_at(table, nodes, k, made, full)
        assert rest.timesteps == table.timesteps[k:]
        x = PROBLEM.draw(np.random.default_rng(k), 64, table.rows[k].node)
        wanted = PROBLEM.flow(x, table.rows[k].node, nodes[-2], 1e-9)
        first = get("ddim").trace(Nodes([*table.nodes[k:-1], nodes[-1]], nodes.path)).apply(x, PROBLEM.predict)
        found = rest.apply(x, PROBLEM.predict)
        rms = np.sqrt(((found - wanted) ** 2).mean()), np.sqrt(((first - wanted) ** 2).mean())
        assert rms[0] <= 1.5 * rms[1] + 1e-6


# ---------------------------------------------------------------------- refusals
def test_refusals():
    with pytest.raises(OptionError, match="draws noise"):
        skipping("ddpm").trace(grid_nodes(PATHS["vp"], 12, "trailing"))
    with pytest.raises(OptionError, match="one call an interval"):
        skipping("heun")
    with pytest.raises(OptionError, match="earlier states"):
        skipping("dpmpp", quantity="eps").trace(grid_nodes(PATHS["vp"], 12, "trailing"))
    with pytest.raises(OptionError, match="cannot be predicted"):  # the first of its two answers is at alpha = 0
        skipping("ddim", [2]).trace(grid_nodes(PATHS["flow"], 12, "trailing"))
    with pytest.raises(OptionError, match="coordinate"):
        skipping("ddim", coordinate="time")


# ---------------------------------------------------------------------- mutations turn these tests red
def red(test, *args):
    try:
        test(*args)
    except AssertionError:
        return True
    return False


def test_mutated_weights_are_noticed(monkeypatch):
    true = Predictor.weights
    monkeypatch.setattr(Predictor, "weights", lambda *a: [-w for w in true(*a)])
    assert red(test_table_equals_a_loop_written_by_hand, "h2/s2", "x0", "lam")
    assert red(test_matching_predictor_leaves_the_nodes_out, 2, "h2/s2", "vp")
    assert red(test_point_mass_is_exact, "h2/s2", "vp", "x0", "lam")


def test_mutated_first_is_noticed(monkeypatch):
    def due(self, i, n, real):
        first = max(self.protect[0], self.history) + 1
        return (
            self.protect[0] <= i < n - self.protect[1]
            and i >= first
            and ((i - first) % (self.between + 1) == self.between)
        )

    monkeypatch.setattr(Regular, "due", due)
    assert red(test_published_counts)


def test_predictions_in_the_history_are_noticed(monkeypatch):
    from diffaccel.samplers import skip as module

    true = module._Past.predicted

    def remembering(self, i):
        value = true(self, i)
        self.add(self.nodes[i], value)
        return value

    monkeypatch.setattr(module._Past, "predicted", remembering)
    assert red(test_table_equals_a_loop_written_by_hand, STREAK, "x0", "lam")
    assert red(test_matching_predictor_leaves_the_nodes_out, 3, STREAK, "vp")


def test_allowed_patterns():
    assert len(NAMES) == sum(len(ks) for ks in ALLOWED.values()) == 12
