"""The mathematics of fitted tables on problems whose answer is known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from diffaccel.calibrate.fit_rows import Gram, best_weights, ridge_solve, scale
from diffaccel.calibrate.fit_run import Functional, Teacher, analytic, fit_rows, start_rows, student, teach
from diffaccel.calibrate.grid import choose, costs, gits, shortest, snapped, teacher_nodes
from diffaccel.core.grid import nodes as grid_nodes
from diffaccel.core.path import Nodes, Path
from diffaccel.errors import OptionError, RunError
from diffaccel.testing.problems import Gaussian, four_modes

EDM = Path.edm(float(np.exp(-4)), float(np.exp(4)))


def noise(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def learned(path: Path, n: int = 12, steps: int = 24, d: int = 2) -> tuple[Functional, Teacher]:
    """The four modes, and a teacher's runs on n inputs."""
    problem = four_modes()
    runner = Functional(problem.denoise, path, noise(n, d))
    nodes = teacher_nodes(path, steps)
    teacher = Teacher(nodes, Gram(len(nodes) - 1))
    teach(runner, range(n), teacher, gram=True, keep=range(len(nodes) - 1))
    return runner, teacher


# ---------------------------------------------------------------------- closed form
def gaussian_error(variances: list[float], calls: int, order: int = 3, fitted: bool = True) -> float:
    """Relative held-out error with targets from the closed form; d coordinates of each variance."""
    std = np.sqrt(np.repeat(variances, 6))
    problem = Gaussian(np.zeros(len(std)), std)
    nodes = grid_nodes(EDM, calls, "uniform_lambda")
    runner = Functional(problem.denoise, EDM, noise(96, len(std)))

    def target(i: int, inputs: Any) -> np.ndarray:
        start = runner.noise[list(inputs)] * scale(nodes[0])
        return problem.flow(start, nodes[0], nodes[i + 1]) / scale(nodes[i + 1])

    rows = fit_rows(runner, range(64), nodes, target, order=order, ridge=1e-12) if fitted else analytic(nodes, order)
    held = range(64, 96)
    wanted = target(calls - 1, held)
    made = student(runner, held, nodes, rows)
    assert made is not None
    return float(np.linalg.norm(made - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 6, 8])
def test_two_variances_are_fitted_exactly_by_any_number_of_calls(calls: int) -> None:
    """m features are exact for m variances: the model and the flow are diagonal."""
    assert gaussian_error([0.04, 1.0], calls) < 1e-7


@pytest.mark.parametrize("calls", [2, 3, 4, 8])
def test_three_variances_need_two_calls(calls: int) -> None:
    assert gaussian_error([0.01, 0.2, 2.0], calls) < 1e-6


def test_three_variances_in_one_call_are_too_many() -> None:
    assert 0.01 < gaussian_error([0.01, 0.2, 2.0], 1) < 0.3


@pytest.mark.parametrize(("calls", "least"), [(1, 0.5), (2, 0.2), (4, 0.05), (8, 0.01)])
def test_analytic_rows_are_far_from_exact_there(calls: int, least: float) -> None:
    """Or the tests above would show nothing."""
    assert gaussian_error([0.01, 0.2, 2.0], calls, fitted=False) > least


# ---------------------------------------------------------------------- least squares
def test_without_ridge_it_is_least_squares() -> None:
    rng = np.random.default_rng(1)
    features, target = rng.standard_normal((500, 4)), rng.standard_normal(500)
    a, b = features.T @ features / 500, features.T @ target / 500
    wanted = np.linalg.lstsq(features, target, rcond=None)[0]
    assert ridge_solve(a, b, 0.0, rng.standard_normal(4)) == pytest.approx(wanted, abs=1e-8)


def test_much_ridge_gives_the_analytic_table() -> None:
    runner, teacher = learned(Path.vp_linear())
    chosen = shortest(*costs(teacher.gram), 5)[0]
    nodes = teacher.at(chosen)
    found = fit_rows(runner, range(12), nodes, teacher.target(chosen), ridge=1e12)
    assert found == pytest.approx(analytic(nodes, 3), abs=1e-9)


def test_singular_features_are_an_error() -> None:
    with pytest.raises(RunError, match="same seed"):
        ridge_solve(np.ones((2, 2)), np.ones(2), 0.0, np.zeros(2))
    with pytest.raises(RunError, match="not finite"):
        ridge_solve(np.full((2, 2), np.nan), np.ones(2), 1e-4, np.zeros(2))


def test_residuals_of_the_gram_matrix_are_those_of_the_vectors() -> None:
    rng = np.random.default_rng(2)
    size, elements = 9, 400
    states, predictions = rng.standard_normal((2, size, elements))
    gram = Gram(size)
    for part in np.array_split(np.arange(elements), 3):  # batches do not matter
        gram.add(states[:, part], predictions[:, part])
    rows = np.concatenate([states, predictions])
    for _ in range(50):
        *features, target = rng.choice(2 * size, 4, replace=False)
        w, residual = best_weights(gram.products, features, target, 0.0)
        direct = np.mean((rows[target] - w @ rows[features]) ** 2)
        assert residual == pytest.approx(direct, abs=1e-9 * gram.products[target, target])


# ---------------------------------------------------------------------- nodes
@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("calls", [2, 3, 4, 5])
def test_dynamic_programming_is_exhaustive_search(calls: int, power: float) -> None:
    _, teacher = learned(Path.vp_linear(), steps=12)
    first, c = costs(teacher.gram)

    def total(chosen: tuple[int, ...]) -> float:
        cost = first[chosen[1]] ** (power / 2)
        for p, i, j in zip(chosen, chosen[1:], [*chosen[2:], -1], strict=False):
            cost += c[p, i, j] ** (power / 2)
        return float(cost)

    best = min(((0, *rest) for rest in itertools.combinations(range(1, 13), calls - 1)), key=total)
    found, cost = shortest(first, c, calls, power)
    assert cost == pytest.approx(total(best), abs=1e-12)
    assert tuple(found) == best


def test_one_call_starts_at_the_first_node() -> None:
    _, teacher = learned(Path.vp_linear(), steps=12)
    assert shortest(*costs(teacher.gram), 1)[0] == [0]
    with pytest.raises(OptionError, match="14 calls cannot be placed"):
        shortest(*costs(teacher.gram), 14)


def test_costs_are_residuals_of_three_features() -> None:
    _, teacher = learned(Path.vp_linear(), steps=12)
    _, c = costs(teacher.gram, ridge=1e-6)
    d = teacher.gram.d
    for p, i, j in ((0, 1, 2), (2, 5, 9), (3, 11, 12)):
        assert c[p, i, j] == pytest.approx(best_weights(teacher.gram.products, [i, d(i), d(p)], j, 1e-6)[1], rel=1e-6)
    image = best_weights(teacher.gram.products, [7, d(7), d(4)], teacher.gram.target, 1e-6)[1]
    assert c[4, 7, -1] == pytest.approx(image, rel=1e-6)


def test_gits_is_the_least_of_its_own_sum() -> None:
    _, teacher = learned(Path.vp_linear(), steps=10)
    found = gits(teacher.gram, teacher.nodes, 3)
    assert found[0] == 0 and all(a < b for a, b in itertools.pairwise(found)) and len(found) == 3


@pytest.mark.parametrize("path", [Path.vp_linear(), EDM, Path.flow(shift=3.0)], ids=lambda p: p.family)
@pytest.mark.parametrize("name", ["dp2", "dp1", "gits", "time", "quadratic", "lam"])
def test_every_candidate_begins_at_the_first_node(path: Path, name: str) -> None:
    _, teacher = learned(path, steps=40)
    chosen = choose(name, teacher.gram, teacher.nodes, 5, None)
    if chosen is not None:
        assert chosen[0] == 0 and len(chosen) == 5
        assert all(a < b for a, b in itertools.pairwise(chosen))


def test_nodes_that_fall_together_are_no_candidate() -> None:
    nodes = teacher_nodes(Path.vp_linear(), 10)
    assert snapped([nodes[0], nodes[3], nodes[3]], nodes[:-1]) is None
    assert snapped([nodes[0], nodes[3], nodes[4]], nodes[:-1]) == [0, 3, 4]


def test_a_teacher_on_whole_training_steps() -> None:
    path = Path.vp(np.linspace(1e-4, 0.02, 50))
    nodes = teacher_nodes(path, 30, rounded=True)
    ts = [node.t for node in nodes[:-1]]
    assert ts == sorted({round(t) for t in ts}, reverse=True)
    with pytest.raises(OptionError, match="training steps"):
        teacher_nodes(EDM, 30, rounded=True)


# ---------------------------------------------------------------------- runs
@pytest.mark.parametrize("batch", [1, 3])
def test_batches_do_not_matter(batch: int) -> None:
    """One pass over all inputs, and N passes over batches, give the same rows."""
    runner, teacher = learned(Path.vp_linear())
    chosen = shortest(*costs(teacher.gram), 4)[0]
    nodes, target = teacher.at(chosen), teacher.target(chosen)
    whole = fit_rows(runner, range(12), nodes, target)
    runner.batch = batch
    assert fit_rows(runner, range(12), nodes, target) == pytest.approx(whole, abs=1e-9)
    again = Teacher(teacher.nodes, Gram(teacher.gram.size))
    teach(runner, range(12), again, gram=True, keep=())
    assert again.gram.products == pytest.approx(teacher.gram.products, abs=1e-12)


def test_the_same_data_on_every_path_gives_the_same_rows() -> None:
    """For states divided by hypot(alpha, sigma) rows depend on the signal-to-noise ratio alone."""
    lams = np.linspace(-3, 3, 31)
    found = []
    for path in (Path.vp_linear(), Path.edm(0.01, 80.0), Path.flow()):
        nodes = Nodes([*(path.at_lam(float(v)) for v in lams), path.end], path)
        runner = Functional(four_modes().denoise, path, noise(12, 2))
        teacher = Teacher(nodes, Gram(31))
        teach(runner, range(12), teacher, gram=True, keep=range(31))
        chosen = shortest(*costs(teacher.gram), 5)[0]
        rows = fit_rows(runner, range(12), teacher.at(chosen), teacher.target(chosen))
        images = student(runner, range(12), teacher.at(chosen), rows)
        found.append((chosen, rows, images))
    for chosen, rows, images in found[1:]:
        assert chosen == found[0][0]
        assert rows == pytest.approx(found[0][1], abs=1e-8)
        assert images == pytest.approx(found[0][2], abs=1e-8)


def test_start_rows_are_teacher_forced_rows_of_less_history() -> None:
    _, teacher = learned(Path.vp_linear())
    chosen = shortest(*costs(teacher.gram), 4)[0]
    start = start_rows(teacher.gram, teacher.at(chosen), chosen, 3, 0.0)
    d = teacher.gram.d
    for i, k in enumerate(chosen):
        end = chosen[i + 1] if i < 3 else teacher.gram.target
        alone = best_weights(teacher.gram.products, [k, d(k)], end, 0.0)[0]
        assert start[i, 0] == pytest.approx([*alone, 0, 0], abs=1e-6)


def test_outputs_that_are_not_finite_are_named() -> None:
    def broken(x: np.ndarray, node: Any) -> np.ndarray:
        return np.where(np.arange(len(x))[:, None] == 2, np.nan, x)

    path = Path.vp_linear()
    nodes = teacher_nodes(path, 20)
    runner = Functional(broken, path, noise(4, 2))
    with pytest.raises(RunError, match=r"call 0 of 21, for input\(s\) \[2\]"):
        teach(runner, range(4), Teacher(nodes, Gram(21)), gram=False, keep=())
