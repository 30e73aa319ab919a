"""Rows of different kinds: what each kind is, and that they mix."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest

from diffaccel.core.grid import nodes as grid_nodes
from diffaccel.core.path import Path
from diffaccel.errors import OptionError
from diffaccel.samplers.begin import begin_at
from diffaccel.samplers.registry import get
from diffaccel.samplers.usf import SPACES, angle_weights
from diffaccel.schedulers import TableScheduler
from diffaccel.testing.problems import Gaussian, four_modes, point_mass

PATHS = [Path.vp_linear(), Path.edm(0.01, 80.0), Path.flow(shift=3.0)]
KINDS = [{"order": o, "space": s, "corrector": c} for o, s, c in product((1, 2, 3), SPACES, (False, True))]


@pytest.mark.parametrize(
    ("name", "options", "row"),
    [
        ("dpmpp", {"order": 2}, {"order": 2, "space": "x0"}),
        ("dpmpp", {"order": 3}, {"order": 3, "space": "x0"}),
        ("unipc", {"order": 2}, {"order": 2, "space": "x0", "corrector": True}),
        ("unipc", {"order": 2, "space": "eps"}, {"order": 2, "space": "eps", "corrector": True}),
        ("unipc", {"order": 3, "space": "eps", "corrector": False}, {"order": 3, "space": "eps"}),
    ],
)
def test_uniform_rows_are_known_samplers(name: str, options: dict[str, Any], row: dict[str, Any]) -> None:
    path = Path.vp_linear()
    nodes = grid_nodes(path, 7)
    x = np.random.default_rng(0).standard_normal((5, 2))
    problem = four_modes()
    wanted = get(name).run(x, nodes, problem.predict, lower_order_final=False, **options)
    assert get("usf").run(x, nodes, problem.predict, rows=row) == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.family)
def test_any_mixture_of_rows_is_a_table(path: Path) -> None:
    """Loop and table agree; a point is met exactly; every beginning is finite."""
    rng = np.random.default_rng(1)
    problem, dot = four_modes(), point_mass([0.3, -2.0])
    x = rng.standard_normal((4, 2))
    for _ in range(12):
        rows = [KINDS[int(k)] for k in rng.integers(0, len(KINDS), 7)]
        nodes = grid_nodes(path, 7, "uniform_lambda")
        start = x * math.hypot(nodes[0].alpha, nodes[0].sigma)
        table = get("usf").trace(nodes, rows=rows)
        wanted = get("usf").run(start, nodes, problem.predict, rows=rows)
        assert table.apply(start, problem.predict) == pytest.approx(wanted, abs=1e-7)
        assert table.apply(start, dot.predict) == pytest.approx(np.broadcast_to(dot.mean, x.shape), abs=1e-8)
        for k in range(1, 7):
            rest = begin_at(table, nodes, k, get("usf"), get("usf").options({"rows": rows}))
            again = get("usf").run(start, nodes[k:], problem.predict, rows=rows[k:])
            assert rest.apply(start, problem.predict) == pytest.approx(again, abs=1e-7)


def test_the_angle_integrals() -> None:
    """`int cos(a) p(a)` and `int sin(a) p(a)` of polynomials through the points, in closed form."""
    angles, a, b = [1.0, 1.2, 1.5], 1.0, 0.3
    weights = angle_weights(angles, a, b)
    assert sum(c for c, _ in weights) == pytest.approx(math.sin(b) - math.sin(a), abs=1e-14)
    assert sum(s for _, s in weights) == pytest.approx(math.cos(a) - math.cos(b), abs=1e-14)
    first = sum(c * p for (c, _), p in zip(weights, angles, strict=True))
    assert first == pytest.approx(b * math.sin(b) + math.cos(b) - a * math.sin(a) - math.cos(a), abs=1e-13)


def test_in_the_angle_the_step_from_pure_noise_has_a_history() -> None:
    """The other spaces leave out a node with alpha = 0."""
    nodes = grid_nodes(Path.flow(), 3, "uniform_lambda")
    assert nodes[0].alpha == 0
    depths = {s: len(get("usf").trace(nodes, rows={"order": 2, "space": s}).rows[1].out.p) for s in SPACES}
    assert depths["v"] == 2 and depths["x0"] == 1


def test_a_gaussian_converges_with_each_kind() -> None:
    problem = Gaussian(np.zeros(2), np.array([0.3, 1.5]))
    x = np.random.default_rng(0).standard_normal((8, 2))
    path = Path.vp_linear()
    for kind in KINDS:
        errors = []
        for calls in (20, 40):
            nodes = grid_nodes(path, calls, "uniform_lambda", final="sigma_min")
            wanted = problem.flow(x, nodes[0], nodes[-1])
            errors.append(float(np.abs(get("usf").run(x, nodes, problem.predict, rows=kind) - wanted).max()))
        assert errors[1] < 0.7 * errors[0], kind


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"order": 2}] * 3, "a list of 5"),
        ("x0", "a list of 5"),
        ({"order": 4}, "from 1 to 3"),
        ({"space": "flow"}, "space"),
        ({"corrector": 1}, "corrector must be"),
        ({"degree": 2}, "degree"),
        ([2] * 5, "a row is"),
    ],
)
def test_wrong_rows_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        get("usf").trace(grid_nodes(Path.vp_linear(), 5), rows=rows)


def test_rows_live_in_a_config() -> None:
    """As plain JSON values: saved, loaded, run."""
    from diffaccel.testing import pipelines

    config = pipelines.build("sd15").scheduler.config
    rows = [{"order": 1, "space": "x0"}, {"order": 2, "space": "v", "corrector": True}, {"order": 3, "space": "eps"}]
    scheduler = TableScheduler.from_config(config, sampler="usf", rows=rows)
    twin = TableScheduler.from_config(scheduler.config)
    for each in (scheduler, twin):
        each.set_timesteps(3)
    assert twin.table == scheduler.table and len(scheduler.table) == 3
