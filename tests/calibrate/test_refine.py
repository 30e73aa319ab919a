"""Gauss-Newton on whole tables: derivatives, what it gains on held-out inputs, what it refuses, what it costs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from spectral_mixture import mixture

from diffaccel import calibrate
from diffaccel.calibrate import refine
from diffaccel.calibrate.fit_core import Fitting, Plan
from diffaccel.calibrate.fit_run import Functional, Tensors, analytic, fit_rows, student
from diffaccel.calibrate.grid import choose
from diffaccel.calibrate.refine import Refiner, Slopes, round_cost
from diffaccel.core.path import Nodes, Path
from diffaccel.errors import OptionError

pytestmark = pytest.mark.filterwarnings("ignore::diffaccel.errors.ArtifactWarning")
PATHS = [Path.vp_linear(), Path.flow(shift=3.0), Path.edm(0.002, 80.0)]


def noise(n: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((n, 64))


def learned(path: Path, calls: int = 4, samples: int = 8, batch: int = 1 << 30) -> tuple[Fitting, Nodes, np.ndarray]:
    """A teacher's runs, and rows fitted on the nodes of dynamic programming."""
    runner = Functional(mixture().denoise, path, noise(samples + 8), batch)
    made = Fitting(runner, Plan((calls,), samples, 8, 40, rivals="none"))
    made.learn()
    chosen = choose("dp2", made.teacher.gram, made.teacher.nodes, calls, None)
    assert chosen is not None
    nodes = made.teacher.at(chosen)
    return made, nodes, fit_rows(runner, made.inputs, nodes, made.teacher.target(chosen))


def image(made: Fitting, nodes: Nodes, w: np.ndarray) -> np.ndarray:
    found = student(made.runner, made.inputs, nodes, w)
    assert found is not None
    return found


# ---------------------------------------------------------------------- derivatives
@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_slopes_are_those_of_whole_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against central differences of runs from the noise, of every coefficient and every node."""
    monkeypatch.setattr(refine, "COEFFICIENT", 1e-5)  # the usual steps are wide, for networks that are rough
    monkeypatch.setattr(refine, "LAM", 1e-5)
    made, nodes, w = learned(path)
    refiner = Refiner(made.runner, made.teacher.images)
    there = image(made, nodes, w)
    wanted = np.stack([made.teacher.images[n] for n in made.inputs])
    found = refiner.slopes(made.inputs, nodes, w)
    columns, size = [], found.slopes.shape[1]
    for k in range(size):
        by = np.zeros(size)
        by[k] = 1e-4
        up, down = (refiner.moved(nodes, w, sign * by) for sign in (1, -1))
        columns.append((image(made, *up) - image(made, *down)) / 2e-4)
    jacobian = np.stack(columns, axis=1)
    level = np.linalg.norm(jacobian, axis=2)
    expected = np.einsum("npd,nqd->npq", jacobian, jacobian)
    assert np.all(np.abs(found.products - expected) <= 1e-3 * level[:, :, None] * level[:, None, :] + 1e-12)
    distance = np.linalg.norm(there - wanted, axis=1)
    close = np.abs(found.slopes - np.einsum("npd,nd->np", jacobian, there - wanted))
    assert np.all(close <= 1e-3 * level * distance[:, None] + 1e-12)
    assert found.errors == pytest.approx(distance / np.linalg.norm(wanted, axis=1))


def test_a_step_solves_a_linear_problem() -> None:
    """Images that are linear in the parameters: without damping, one step is weighted least squares."""
    rng = np.random.default_rng(2)
    jacobian, distance = rng.standard_normal((5, 3, 40)), rng.standard_normal((5, 40))
    errors, scale = np.linalg.norm(distance, axis=1), np.ones(5)
    slopes = Slopes(jacobian @ jacobian.swapaxes(1, 2), np.einsum("npd,nd->np", jacobian, distance), errors, scale)
    weight = np.sqrt(1 / errors**2)[:, None]
    rows = (weight[:, None] * jacobian).transpose(0, 2, 1).reshape(-1, 3)
    wanted = np.linalg.lstsq(rows, -(weight * distance).reshape(-1), rcond=None)[0]
    assert slopes.step(np.arange(5), 0.0) == pytest.approx(wanted)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_nodes_never_pass_each_other(path: Path) -> None:
    made, nodes, w = learned(path)
    refiner = Refiner(made.runner, made.teacher.images)
    places = sum(min(4, i + 2) for i in range(4))
    for seed in range(20):
        step = np.random.default_rng(seed).standard_normal(places + 3) * 10.0 ** (seed % 4 - 2)
        there, v = refiner.moved(nodes, w, step)
        lams = [n.lam for n in there[:-1]]
        assert all(a < b for a, b in pairwise(lams)) and lams[-1] <= path.last.lam + 1e-9
        assert there[0].key == nodes[0].key
        assert np.max(np.abs(np.subtract(lams[1:], [n.lam for n in nodes[1:-1]]))) < 0.3 + 1e-9
        assert v[-1, 0] - w[-1, 0] == pytest.approx(step[places - 4])
    still, v = refiner.moved(nodes, w, np.zeros(places + 3))
    assert [n.lam for n in still] == pytest.approx([n.lam for n in nodes]) and np.array_equal(v, w)


def test_batches_and_memory_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = []
    for batch, memory in ((1 << 30, 1 << 28), (7, 20_000)):
        monkeypatch.setattr(refine, "MEMORY", memory)
        made, nodes, w = learned(PATHS[0], 6, 24, batch)
        tables.append(Refiner(made.runner, made.teacher.images).round(made.inputs, nodes, w))
    (nodes, w, scores), (others, v, _) = tables
    assert scores.better
    assert v == pytest.approx(w, abs=1e-7) and [n.lam for n in nodes[1:-1]] == pytest.approx(
        [n.lam for n in others[1:-1]]
    )


# ---------------------------------------------------------------------- what it gains
@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_refined_tables_are_nearer_on_held_out_noise(path: Path) -> None:
    def found(rounds: int) -> dict[str, Any]:
        options: dict[str, Any] = {"grids": "dp2", "moves": 0, "refine": rounds, "teacher_steps": 60, "samples": 32}
        return calibrate.fit_function(mixture().denoise, path, noise(32 + 64), 6, **options).receipt["6 calls"]

    plain, refined = found(0), found(3)
    assert "refined" not in plain and any(r["kept"] for r in refined["refined"])
    assert refined["held-out"]["median"] < 0.85 * plain["held-out"]["median"]


def test_it_never_makes_a_table_much_worse() -> None:
    for seed in range(6):
        runner = Functional(mixture().denoise, PATHS[0], np.random.default_rng(seed).standard_normal((72, 64)))
        found = []
        for rounds in (0, 2):
            made = Fitting(runner, Plan((5,), 8, 64, 40, grids=("dp2",), moves=0, refine=rounds, rivals="none"))
            made.learn()
            fitted = made.fit(5)
            found.append(made.errors("", fitted.nodes, fitted.w, made.held).geometric)
        assert found[1] < 1.05 * found[0]


def test_rounds_that_the_guard_refuses_are_taken_back() -> None:
    """Two rounds throw an image of the held-out far away; the table after one is kept, not an analytic one."""
    runner = Functional(mixture().denoise, PATHS[0], np.random.default_rng(5).standard_normal((72, 64)))
    errors = []
    for rounds in (0, 1, 2):
        made = Fitting(runner, Plan((5,), 8, 64, 40, grids=("dp2",), moves=0, refine=rounds, rivals="none"))
        made.learn()
        fitted = made.fit(5)
        errors.append(made.errors("", fitted.nodes, fitted.w, made.held).geometric)
    assert fitted.report["verdict"] == "fitted" and errors[2] == errors[1] < errors[0]
    [(rounds_of, why)] = fitted.report["refused"].items()
    assert rounds_of == "round 2" and why.startswith("its root mean square error is")
    assert [r["kept"] for r in fitted.report["refined"]] == [True, True]


@pytest.mark.parametrize("worse", [1.0, np.inf])
def test_a_round_that_does_not_help_changes_nothing(worse: float) -> None:
    """What the others say decides, not what the step promises."""

    class Judge(Refiner):
        def errors(self, inputs: Any, nodes: Nodes, w: np.ndarray) -> np.ndarray:
            return np.full(len(inputs), worse)

    made, nodes, w = learned(PATHS[0])
    kept: dict[str, Tensors] = {}
    refiner = Judge(made.runner, made.teacher.images)
    tables, told = refiner.rounds(3, made.inputs, nodes, w, lambda name, compute: kept.setdefault(name, compute()))
    [(there, v)] = tables
    assert there is nodes and v is w and list(kept) == ["0"]
    assert [t["kept"] for t in told] == [False]


def test_a_step_that_raises_the_mean_square_is_refused() -> None:
    """Half of the images much nearer, one far away: the geometric mean falls."""

    class Judge(Refiner):
        def errors(self, inputs: Any, nodes: Nodes, w: np.ndarray) -> np.ndarray:
            return np.where(np.asarray(inputs) == 3, 2.0, 1e-4)

    made, nodes, w = learned(PATHS[0])
    there, v, scores = Judge(made.runner, made.teacher.images).round(made.inputs, nodes, w)
    assert not scores.better and there is nodes and v is w


# ---------------------------------------------------------------------- what it costs, and where it is left out
@pytest.mark.parametrize(("calls", "order", "moves"), [(1, 3, True), (2, 2, True), (5, 3, True), (6, 4, False)])
def test_calls_are_those_that_were_planned(calls: int, order: int, moves: bool) -> None:
    made, nodes, _ = learned(PATHS[0], calls)
    spent = [0]

    def counted(x: np.ndarray, node: Any) -> np.ndarray:
        spent[0] += len(x)
        return np.asarray(mixture().denoise(x, node))

    runner = replace(made.runner, predict=counted)  # type: ignore[type-var]
    Refiner(runner, made.teacher.images, moves).round(made.inputs, nodes, analytic(nodes, order))
    assert spent[0] <= len(made.inputs) * round_cost(calls, order, moves=moves)
    if not moves:
        assert spent[0] == len(made.inputs) * round_cost(calls, order, moves=moves)


def test_a_model_of_half_precision_is_not_refined() -> None:
    made, _, _ = learned(PATHS[0])
    made.runner.smooth = False  # type: ignore[misc]
    assert made.fit(4).report["refined"].startswith("not at all: forward differences need")


def test_whole_training_steps_stay() -> None:
    runner = Functional(mixture().denoise, Path.vp(np.linspace(1e-4, 0.02, 400)), noise(16))
    made = Fitting(runner, Plan((4,), 8, 8, 40, grids=("dp2",), moves=0, refine=1, rounded=True, rivals="none"))
    made.learn()
    assert all(float(n.t).is_integer() for n in made.fit(4).nodes[:-1])


def test_rounds_out_of_range() -> None:
    with pytest.raises(OptionError, match="refine must be a number of 0 or more, got -1"):
        Plan((4,), refine=-1)
