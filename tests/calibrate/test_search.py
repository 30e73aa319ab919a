"""`calibrate.search`: exact residuals, the beam against brute force, and what comes out of pipelines."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch
from spectral_mixture import mixture

from diffaccel import calibrate
from diffaccel.artifact import Artifact
from diffaccel.calibrate.engine import Engine
from diffaccel.calibrate.fit_core import Fitting, Plan
from diffaccel.calibrate.fit_pipe import Piped
from diffaccel.calibrate.fit_rows import scale
from diffaccel.calibrate.fit_run import Functional, student, teach
from diffaccel.calibrate.search_core import Costs, Solver, beam, improved, kinds, start_rows, thinned, weights
from diffaccel.core.path import Nodes, Path
from diffaccel.errors import ArtifactError, OptionError
from diffaccel.samplers.begin import begin_at
from diffaccel.samplers.fitted import Tables
from diffaccel.samplers.registry import get
from diffaccel.samplers.usf import Choice, Seen, advanced, correction
from diffaccel.schedulers import DCSolverScheduler, FittedScheduler, TableScheduler
from diffaccel.testing import pipelines

pytestmark = pytest.mark.filterwarnings("ignore::diffaccel.errors.ArtifactWarning")
PROMPTS = ["a red fox", "a blue car", "two boats", "a hat", "snow", "a tree", "an owl", "the sea"]
SMALL: dict[str, Any] = {"samples": 4, "holdout": 4, "teacher_steps": 24, "trials": 3, "beam_width": 1, "rivals": None}


def taught(path: Path, steps: int, samples: int = 8) -> Fitting:
    noise = np.random.default_rng(1).standard_normal((samples + 32, 16))
    plan = Plan((1,), samples, 32, steps, rivals="none")
    made = Fitting(Functional(mixture(16).denoise, path, noise), plan)
    made.learn()
    return made


# ---------------------------------------------------------------------- the Gram matrix
@pytest.mark.parametrize("path", [Path.vp_linear(), Path.edm(0.01, 80.0), Path.flow(shift=3.0)], ids=lambda p: p.family)
def test_residuals_equal_those_of_the_rows_on_the_states(path: Path) -> None:
    """Any kind of row between any nodes, its corrector included: from the matrix, and computed on the states."""
    made = taught(path, 12)
    nodes, inputs = made.teacher.nodes, range(8)
    teach(made.runner, inputs, made.teacher, gram=False, keep=range(13))
    costs = Costs(made.teacher.gram, nodes, kinds())

    def state(k: int) -> np.ndarray:
        return np.stack([made.teacher.states[k, n] for n in inputs])

    def seen(k: int, x: np.ndarray | None = None) -> Seen:
        true = state(k) * scale(nodes[k])
        return Seen(nodes[k], mixture(16).denoise(true, nodes[k]), true if x is None else x)

    rng = np.random.default_rng(0)
    for choice in kinds():
        for _ in range(3):
            *past, j = sorted(rng.choice(13, 4, replace=False).tolist())
            for to in (j, 13):
                x, corrector = advanced(seen(past[-1]).x, [seen(k) for k in past[::-1]], nodes[to], choice)
                if choice.corrector and corrector is not None:
                    x = x + correction(corrector, seen(to, x))
                wanted = seen(12).d if to == 13 else state(to)
                direct = float(np.mean((wanted - x / scale(nodes[to])) ** 2))
                found = costs.of(tuple(past[::-1]), to, choice)
                assert found == pytest.approx(direct, rel=1e-6, abs=1e-11), choice


def brute(costs: Costs, calls: int, power: float) -> float:
    """Every set of nodes, every kind of every row."""
    size = costs.gram.size
    best = np.inf
    for rest in combinations(range(1, size), calls - 1):
        ends = (0, *rest, size)
        for rows in product(costs.choices, repeat=calls):
            if all(c.order <= i + 1 for i, c in enumerate(rows)):
                past = [ends[: i + 1][::-1][:3] for i in range(calls)]
                total = sum(costs.of(past[i], ends[i + 1], c) ** (power / 2) for i, c in enumerate(rows))
                best = min(best, total)
    return best


@pytest.mark.parametrize(("calls", "power"), [(1, 2.0), (2, 2.0), (3, 2.0), (3, 1.0), (4, 2.0)])
def test_the_wide_beam_is_exhaustive(calls: int, power: float) -> None:
    made = taught(Path.vp_linear(), 8)
    choices = kinds(3, ("x0", "v")) if calls < 4 else [Choice(1), Choice(2), Choice(3)]
    costs = Costs(made.teacher.gram, made.teacher.nodes, choices)
    value, solver = beam(costs, calls, width=10**6, power=power)[0]
    assert value == pytest.approx(brute(costs, calls, power), rel=1e-12)
    past = [solver.chosen[: i + 1][::-1] for i in range(calls)]
    ends = (*solver.chosen[1:], 9)
    assert sum(costs.of(p, j, c) ** (power / 2) for p, j, c in zip(past, ends, solver.rows, strict=True)) == value


def test_a_narrow_beam_is_nearly_as_good_and_sorted() -> None:
    made = taught(Path.flow(), 24)
    costs = Costs(made.teacher.gram, made.teacher.nodes, kinds())
    narrow, wide = (beam(costs, 6, width=w, places=range(0, 25, 2), keep=4) for w in (4, 200))
    assert [v for v, _ in wide] == sorted(v for v, _ in wide) and len({s.key for _, s in wide}) == 4
    assert wide[0][0] <= narrow[0][0] <= 1.2 * wide[0][0]
    with pytest.raises(OptionError, match="5 calls cannot be placed on 4 nodes"):
        beam(costs, 5, places=range(4))


def test_thinned_places() -> None:
    assert thinned(40) == list(range(40)) and thinned(101) == list(range(0, 101, 3))


# ---------------------------------------------------------------------- on runs
def test_changes_end_where_none_helps() -> None:
    wanted = Solver((0, 4, 9), (Choice(1), Choice(2, "v"), Choice(1)))
    start = Solver((0, 2, 5), (Choice(1),) * 3)

    def score(s: Solver) -> float:
        rows = sum(a != b for a, b in zip(s.rows, wanted.rows, strict=True))
        return 1.0 + rows + sum(abs(a - b) for a, b in zip(s.chosen, wanted.chosen, strict=True))

    found, value, tried = improved(start, score(start), score, kinds(), 20, 5000)
    assert (found, value) == (wanted, 1.0) and tried < 5000
    assert improved(start, 1.0, lambda s: 1.0, kinds(), 20, 7)[2] == 7


def test_it_lowers_the_held_out_error_of_a_mixture() -> None:
    """Against DPM-Solver++ 2M on the same nodes, and on four other grids."""
    from diffaccel.calibrate.fit_run import analytic
    from diffaccel.core.grid import nodes as grid_nodes

    path = Path.vp_linear()
    noise = np.random.default_rng(1).standard_normal((112, 64))
    options: dict[str, Any] = {"teacher_steps": 60, "trials": 40}
    found = calibrate.search_function(mixture(64).denoise, path, noise, 6, **options)
    report = found.receipt["6 calls"]
    assert report["verdict"] == "searched" and report["images improved"] >= 0.85
    made = Fitting(
        Functional(mixture(64).denoise, path, noise), Plan((6,), holdout=96, teacher_steps=60, rivals="none")
    )
    made.learn()
    best = []
    for grid in ("linspace_open", "karras", "uniform_lambda", "quadratic"):
        nodes = grid_nodes(path, 6, grid)
        best.append(float(np.median(made.errors(grid, nodes, analytic(nodes, 3), made.held).values)))
    assert report["held-out"]["median"] < 0.5 * min(best)
    said = report["error on the inputs that were searched on"]
    assert said["found"] <= said["best begun from"] <= said["best of the beams"]


def test_no_benefit_is_said_where_nothing_can_be_gained() -> None:
    """One call: its only row is the x0-prediction, whatever is searched."""
    noise = np.random.default_rng(1).standard_normal((24, 16))
    path = Path.flow()
    found = calibrate.search_function(mixture(16).denoise, path, noise, 1, samples=8, teacher_steps=24, trials=2)
    report = found.receipt["1 calls"]
    assert report["verdict"].startswith("analytic: no benefit found") and "[1.000, 1.000]" in report["verdict"]
    nodes = Nodes(Tables.of(found).rows(1).nodes(path.end), path)
    assert get("fitted").trace(nodes, tables=Tables.of(found)) == get("dpmpp").trace(nodes)


def test_the_artifacts_table_is_the_samplers_own() -> None:
    """From every beginning: the coefficients kept are those of `usf` with the rows of the receipt."""
    noise = np.random.default_rng(1).standard_normal((24, 16))
    path = Path.vp_linear()
    found = calibrate.search_function(
        mixture(16).denoise, path, noise, 6, samples=8, teacher_steps=40, trials=10, spaces=("eps", "v"), order=2
    )
    listed = [{k: v for k, v in row.items() if k != "t"} for row in found.receipt["6 calls"]["rows"]]
    tables = Tables.of(found)
    nodes = Nodes(tables.rows(6).nodes(path.end), path)
    table, plain = get("fitted").trace(nodes, tables=tables), get("usf").trace(nodes, rows=listed)
    x = noise[:4]
    for k in range(6):
        a, b = (
            begin_at(t, nodes, k, get(name), get(name).options(given))
            for t, name, given in ((table, "fitted", {"tables": tables}), (plain, "usf", {"rows": listed}))
        )
        assert a.apply(x, mixture(16).predict) == pytest.approx(b.apply(x, mixture(16).predict), abs=1e-9)


def test_start_rows_of_mixed_rows() -> None:
    nodes = Nodes([*taught(Path.vp_linear(), 12).teacher.at([0, 3, 6, 9])], Path.vp_linear())
    rows = (Choice(1), Choice(2, "v", True), Choice(3, "eps"), Choice(1))
    order = weights(nodes, rows).shape[1] - 1
    start = start_rows(nodes, rows, order)
    assert start.shape == (4, order - 1, order + 1)
    alone = weights(nodes[2:], rows[2:])
    assert start[2, 0, : alone.shape[1]] == pytest.approx(alone[0])
    assert start[3, 1, : alone.shape[1]] == pytest.approx(alone[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spaces": ("x0", "flow")}, "unknown space 'flow'"),
        ({"spaces": ()}, "spaces must name"),
        ({"order": 4}, "from 1 to 3"),
        ({"beam_width": 0}, "beam_width must be"),
        ({"trials": -1}, "trials must be"),
        ({"calls": 0}, "numbers of model calls"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    noise = np.random.default_rng(0).standard_normal((12, 16))
    with pytest.raises(OptionError, match=message):
        calibrate.search_function(mixture(16).denoise, Path.flow(), noise, **{"samples": 4, "calls": 4, **options})


# ---------------------------------------------------------------------- pipelines
def call_of(name: str) -> dict[str, Any]:
    drop = ("prompt", "num_inference_steps", "output_type", "generator")
    return {k: v for k, v in pipelines.call_kwargs(name).items() if k not in drop}


@pytest.mark.parametrize("name", ["sd15", "v", "sd3"])
def test_the_scheduler_lands_where_the_search_did(name: str, tmp_path: FilePath) -> None:
    """With guidance; an eps, a v and a flow pipeline. Saved and loaded, on the held-out inputs."""
    kind = "sd15" if name == "v" else name
    pipe = pipelines.build(kind)
    if name == "v":
        pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    before, call = pipe.scheduler, call_of(kind)
    made = calibrate.search(pipe, PROMPTS, 4, **SMALL, progress=False, batch=4, out=tmp_path / "s.safetensors", **call)
    assert pipe.scheduler is before and Artifact.load(tmp_path / "s.safetensors", "search") == made
    assert made.meta["cost"] == made.receipt["cost"]
    runner = Piped(Engine(pipe, PROMPTS, call=call, batch=4, progress=False))
    rows = Tables.of(made).rows(4)
    wanted = student(runner, range(4, 8), Nodes(rows.nodes(runner.path.end), runner.path), rows.w)
    FittedScheduler.from_config(before.config, artifact=made, pipe=pipe).save_pretrained(tmp_path)
    pipe.scheduler = FittedScheduler.from_pretrained(tmp_path)
    found = pipe(
        prompt=[PROMPTS[i] for i in range(4, 8)],
        generator=[torch.Generator().manual_seed(i) for i in range(4, 8)],
        num_inference_steps=4,
        output_type="latent",
        **call,
    ).images
    assert found.detach().float().numpy() == pytest.approx(wanted, abs=2e-5 * float(np.abs(wanted).max()))


def test_planned_calls_bound_what_is_spent(capsys: pytest.CaptureFixture[str]) -> None:
    made = calibrate.search(pipelines.build("sd15"), PROMPTS, 3, **SMALL, **call_of("sd15"))
    planned = int(capsys.readouterr().out.split("at most ")[1].split()[0])
    assert 0.4 * planned < made.meta["cost"]["calls"] <= planned


def test_artifacts_of_other_kinds_are_refused(tmp_path: FilePath) -> None:
    config = pipelines.build("sd15").scheduler.config
    dc = Artifact("dc", {}, {}, "dc.safetensors")
    with pytest.raises(ArtifactError, match="'fit' or 'search' or 'align' is needed"):
        FittedScheduler.from_config(config, artifact=dc)
    searched = Artifact("search", {}, {}, "s.safetensors")
    with pytest.raises(ArtifactError, match="'dc' is needed"):
        DCSolverScheduler.from_config(config, artifact=searched)
