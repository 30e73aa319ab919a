"""Tracing: rows of a loop, elimination of old states, registers, noise, repeats, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffaccel.core.linear import carry
from diffaccel.core.node import Node
from diffaccel.core.path import Nodes, Path
from diffaccel.core.trace import run_loop, trace_loop
from diffaccel.errors import OptionError, TraceError
from diffaccel.samplers.registry import Sampler, samplers
from diffaccel.testing.problems import four_modes
from diffaccel.testing.runs import PATHS

FLOW = Path.flow()


def grid(n: int) -> Nodes:
    return Nodes([FLOW.at(float(t)) for t in np.linspace(900, 100, n + 1)], FLOW)


def euler(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
    for s, t in pairwise(nodes):
        x = x + (t.sigma - s.sigma) * predict(x, s, space="flow")
    return x


def test_a_loop_becomes_rows() -> None:
    nodes = grid(3)
    table = trace_loop(euler, nodes, name="euler")
    assert len(table) == 3 and table.sampler == "euler" and (table.depth, table.slots, table.noise_depth) == (1, 0, 0)
    for row, s, t in zip(table.rows, nodes, nodes[1:], strict=False):
        assert (row.node, row.next, row.space, row.t, row.opens) == (s, t, "flow", s.t, True)
        assert (row.out.x, row.out.p) == (1.0, (t.sigma - s.sigma,))


# ---------------------------------------------------------------------- random programs
coefficient = st.sampled_from([-1.5, -0.5, 0.25, 0.75, 1.0])


@st.composite
def programs(draw: Any) -> list[dict[str, Any]]:
    """Per interval: weights of the state, past predictions, an old state, a register, draws, a constant."""
    n = draw(st.integers(1, 6))
    return [
        {
            "x": draw(coefficient),
            "p": draw(st.lists(coefficient, min_size=1, max_size=i + 1)),
            "old": draw(st.none() | st.tuples(st.integers(0, i), coefficient)),
            "registers": draw(st.lists(st.tuples(coefficient, coefficient), max_size=2)),
            "draws": draw(st.integers(0, 2)),
            "late": draw(st.booleans()),
            "one": draw(st.sampled_from([0.0, 0.5])),
        }
        for i in range(n)
    ]


def interpreter(program: list[dict[str, Any]]) -> Any:
    """A loop that does what the program says; it reads old states, old draws and two carried values."""

    def loop(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
        past: list[Any] = []
        states: list[Any] = []
        draws: list[Any] = []
        carried: list[Any] = [None, None]
        for step, s in zip(program, nodes, strict=False):
            states.append(x)
            past.insert(0, predict(x, s))
            new = step["x"] * x
            for c, p in zip(step["p"], past, strict=False):
                new = new + c * p
            if step["old"] is not None:
                new = new + 0.125 * step["old"][1] * states[step["old"][0]]
            before = list(carried)
            for k, (keep, add) in enumerate(step["registers"]):
                kept = 0.5 * keep * before[k] if before[k] is not None else 0.0
                carried[k] = carry(add * past[0] + kept)
                new = new + 0.5 * carried[k]
            draws += [noise() for _ in range(step["draws"])]
            if draws:
                new = new + 0.25 * draws[0 if step["late"] else -1]
            x = new + step["one"]
        return x

    return loop


@settings(max_examples=150, deadline=None)
@given(programs())
def test_a_table_does_what_its_loop_does(program: list[dict[str, Any]]) -> None:
    loop, nodes = interpreter(program), grid(len(program))
    try:
        table = trace_loop(loop, nodes)
    except TraceError as error:
        assert "forgot it (a = 0)" in str(error)
        return
    x = np.random.default_rng(0).standard_normal((3, 2))

    def replay() -> Any:
        rng = np.random.default_rng(1)
        return lambda v: rng.standard_normal(v.shape)

    def sine(state: Any, node: Node, space: Any = None) -> Any:
        return np.sin(state) + node.sigma

    want = run_loop(loop, x, nodes, sine, replay())
    got = table.apply(x, sine, replay())
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-8 * (1 + np.abs(want).max()))
    assert len(table) == len(program)
    if all(step["old"] is None for step in program):  # going back to old states keeps old registers alive
        assert table.slots <= 2


# ---------------------------------------------------------------------- registers
def momentum(x: Any, nodes: Nodes, predict: Any, noise: Any, *, mark: bool = True) -> Any:
    m = None
    for s, t in pairwise(nodes):
        d = predict(x, s)
        m = d if m is None else 0.8 * d + 0.2 * m
        m = carry(m) if mark else m
        x = (t.sigma / s.sigma) * x + (t.alpha - s.alpha * t.sigma / s.sigma) * m
    return x


def test_a_register_replaces_the_history() -> None:
    kept, marked = trace_loop(momentum, grid(9), options={"mark": False}), trace_loop(momentum, grid(9))
    assert (kept.depth, kept.slots) == (9, 0)
    assert (marked.depth, marked.slots) == (1, 1)
    x = np.array([[0.4, -0.3]])
    problem = four_modes()
    np.testing.assert_allclose(marked.apply(x, problem.predict), kept.apply(x, problem.predict), rtol=1e-12)


def test_a_register_that_nobody_reads_costs_nothing() -> None:
    def unread(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
        for s, t in pairwise(nodes):
            d = predict(x, s)
            carry(d)
            x = t.sigma * x + d
        return x

    assert trace_loop(unread, grid(4)).slots == 0


def test_chained_registers_of_one_call_are_refused() -> None:
    def chained(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
        for s, _ in pairwise(nodes):
            m = carry(predict(x, s))
            x = x + carry(2.0 * m)
        return x

    with pytest.raises(TraceError, match="carried at the same call; combine them"):
        trace_loop(chained, grid(2))


# ---------------------------------------------------------------------- noise
def test_draws_are_counted_and_aged() -> None:
    def noisy(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
        old = None
        for s, _ in pairwise(nodes):
            d = predict(x, s)
            z = noise()
            x = x + d + z if old is None else x + d + z - 0.5 * old
            old = z
        return x

    table = trace_loop(noisy, grid(3))
    assert [row.draws for row in table.rows] == [1, 1, 1] and table.noise_depth == 2 and table.stochastic
    assert table.rows[0].out.z == ((0, 1.0),) and table.rows[2].out.z == ((0, 1.0), (1, -0.5))


# ---------------------------------------------------------------------- several calls an interval, fed time
def test_intervals_open_at_the_last_call_of_their_node() -> None:
    def heun(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
        for s, t in pairwise(nodes):
            h = t.sigma - s.sigma
            d = predict(x, s, space="flow")
            trial = x + h * d
            x = x + (h / 2) * (d + predict(trial, t, space="flow"))
        return x

    table = trace_loop(heun, grid(2))
    assert len(table) == 4
    assert [row.opens for row in table.rows] == [True, False, True, True]
    assert table.rows[1].a == 1.0, "the corrector is an increment on the state it is handed"


def test_a_fed_time_is_not_the_node() -> None:
    def aligned(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
        return predict(x, nodes[0], fed=123.0) + x

    table = trace_loop(aligned, grid(1))
    assert table.timesteps == [123.0] and table.rows[0].node.t == 900.0
    seen: list[Node] = []
    table.apply(np.ones((1, 2)), lambda x, node, space: seen.append(node) or x)
    run_loop(aligned, np.ones((1, 2)), grid(1), lambda x, node: seen.append(node) or x)
    assert [n.t for n in seen] == [123.0, 123.0]
    assert seen[0].sigma == seen[1].sigma == grid(1)[0].sigma


# ---------------------------------------------------------------------- repeated levels
@pytest.mark.parametrize("name", ["ddim", "dpmpp", "unipc", "deis", "heun", "dpmpp_2s", "pndm", "ddpm"])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_a_grid_with_duplicates_uses_each_node_once(name: str, end: str) -> None:
    path, sampler = PATHS["vp"], samplers()[name]
    ts = [999.0, 800.0, 800.0, 800.0, 500.0, 300.0, 300.0, 20.0]
    last = path.end if end == "zero" else path.last
    repeated = Nodes([*(path.at(t) for t in ts), last], path)
    plain = Nodes([*(path.at(t) for t in sorted(set(ts), reverse=True)), last], path)
    table, distinct = sampler.trace(repeated), sampler.trace(plain)
    assert len(table) == len(distinct) + 3
    opened = [row.node for row in table.rows if row.opens]
    assert [id(n) for n in opened] == [id(n) for n in repeated[:-1]], "each node of the grid opens one interval"
    x = np.random.default_rng(0).standard_normal((2, 2))
    # Draws are replayed by the level that they are made at: repeats make none.
    a, b = (_run(sampler, t, x) for t in (table, distinct))
    np.testing.assert_allclose(a, b, rtol=1e-12)
    np.testing.assert_allclose(sampler.run(x, repeated, four_modes().denoise, _noise()), a, rtol=1e-9)


def _noise() -> Any:
    rng = np.random.default_rng(5)
    return lambda v: rng.standard_normal(v.shape)


def _run(sampler: Sampler, table: Any, x: np.ndarray) -> np.ndarray:
    out: np.ndarray = table.apply(x, four_modes().predict, _noise())
    return out


def test_duplicates_count_as_calls() -> None:
    path = PATHS["vp"]
    nodes = Nodes([path.at(t) for t in (999.0, 600.0, 600.0, 300.0)] + [path.end], path)
    assert len(samplers()["dpmpp"].trace(nodes, 4)) == 4
    assert len(samplers()["heun"].trace(nodes, 5)) == 5


# ---------------------------------------------------------------------- refusals
def _no_call(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
    return x


def _early_change(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
    return predict(2.0 * x, nodes[0])


def _early_noise(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
    return predict(x + noise(), nodes[0])


def _not_a_node(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
    return predict(x, nodes[0].t)


def _not_a_state(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
    return predict(1.0, nodes[0])


def _not_the_state(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
    return predict(x, nodes[0]) and None


def _returns_none(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
    predict(x, nodes[0])


def _goes_back(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
    d = predict(x, nodes[0])
    e = predict(d, nodes[1])  # this step forgot x
    return x + e


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (_no_call, "never calls the model"),
        (_early_change, r"changes the state before the first model call.*Begin with predict\(x, nodes\[0\]\)"),
        (_early_noise, "draws noise before the first model call"),
        (_not_a_node, "calls the model at 900.0; pass the node"),
        (_not_a_state, "calls the model on a float, not on a traced state"),
        (_not_the_state, "branches on a traced value"),
        (_returns_none, "returns a NoneType, not the state"),
        (_goes_back, r"goes back to the state of call 0 after a step that forgot it \(a = 0\)"),
    ],
)
def test_what_no_table_can_hold_fails_with_its_reason(loop: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace_loop(loop, grid(2))


def test_a_run_needs_two_nodes_and_a_source_of_noise() -> None:
    with pytest.raises(OptionError, match="at least 2 nodes"):
        trace_loop(euler, grid(1)[:1])
    with pytest.raises(OptionError, match="draws noise: pass noise="):
        samplers()["ddpm"].run(np.ones((1, 2)), grid(2), four_modes().denoise)


# ---------------------------------------------------------------------- the order in which a loop is written
def before_the_call(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
    """Python computes `a * x` before it calls the model, so the table must find the new state in it."""
    d = None
    for s, t in pairwise(nodes):
        a = t.sigma / s.sigma
        old = d
        x = a * x + (t.alpha - s.alpha * a) * (1.5 * (d := predict(x, s)) - (0.5 * old if old is not None else 0.5 * d))
    return x


def after_the_call(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
    old = None
    for s, t in pairwise(nodes):
        d = predict(x, s)
        a = t.sigma / s.sigma
        x = a * x + (t.alpha - s.alpha * a) * (1.5 * d - 0.5 * (d if old is None else old))
        old = d
    return x


@pytest.mark.parametrize("n", [1, 2, 8, 60])
def test_a_product_computed_before_the_call_gives_the_same_rows(n: int) -> None:
    early, late = (trace_loop(loop, grid(n)) for loop in (before_the_call, after_the_call))
    assert early.depth == late.depth == min(n, 2), "what cancels must not deepen the history"
    for a, b in zip(early.rows, late.rows, strict=True):
        assert a.a == pytest.approx(b.a, rel=1e-9)
        assert a.out.p == pytest.approx(b.out.p, rel=1e-9)
