"""`calibrate.fit` on functions and pipelines, its guard, its artifact, and the scheduler that runs it."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch

from diffaccel import calibrate
from diffaccel.artifact import Artifact
from diffaccel.calibrate.engine import Engine
from diffaccel.calibrate.fit_core import Fitting, Plan
from diffaccel.calibrate.fit_guard import Errors, judge, paired, relative
from diffaccel.calibrate.fit_pipe import Piped
from diffaccel.calibrate.fit_run import Functional, analytic, student, teach
from diffaccel.calibrate.grid import descend
from diffaccel.core.path import Nodes, Path
from diffaccel.errors import ArtifactError, OptionError, RunError
from diffaccel.samplers.fitted import Tables
from diffaccel.schedulers import FittedScheduler, TableScheduler
from diffaccel.testing import pipelines
from diffaccel.testing.problems import Mixture

pytestmark = pytest.mark.filterwarnings("ignore::diffaccel.errors.ArtifactWarning")
SMALL: dict[str, Any] = {"samples": 4, "holdout": 4, "teacher_steps": 24, "grids": "dp2", "moves": 0, "channels": False}
PROMPTS = ["a red fox", "a blue car", "two boats", "a hat", "snow", "a tree", "an owl", "the sea"]


def mixture() -> Mixture:
    """64 dimensions with a decaying spectrum, 8 components."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, 65) ** -0.5
    means = 0.8 * spectrum * rng.standard_normal((8, 64))
    return Mixture(np.full(8, 1 / 8), means, 0.15 * spectrum * (0.5 + rng.random((8, 64))))


def fitted_mixture(calls: int | tuple[int, ...], held: int = 96, **options: Any) -> Artifact:
    noise = np.random.default_rng(1).standard_normal((16 + held, 64))
    return calibrate.fit_function(mixture().denoise, Path.vp_linear(), noise, calls, **options)


@pytest.fixture(scope="module")
def function_artifact() -> Artifact:
    return fitted_mixture((5, 8), grids="dp2", moves=0, teacher_steps=60)


def config(**more: Any) -> dict[str, Any]:
    """Of a scheduler on the path of `piped`."""
    return {**dict(pipelines.build("sd15").scheduler.config), **more}


def call_of(name: str) -> dict[str, Any]:
    drop = ("prompt", "num_inference_steps", "output_type", "generator")
    return {k: v for k, v in pipelines.call_kwargs(name).items() if k not in drop}


def piped(name: str, **options: Any) -> tuple[Any, Artifact]:
    pipe = pipelines.build(name)
    made = calibrate.fit(pipe, PROMPTS, **{"calls": 4, **SMALL, "progress": False, **call_of(name), **options})
    return pipe, made


@pytest.fixture(scope="module")
def sd15() -> tuple[Any, Artifact]:
    return piped("sd15", calls=(3, 5))


# ---------------------------------------------------------------------- a mixture
@pytest.mark.parametrize("calls", [8, 10])
def test_far_nearer_than_the_best_analytic_table(calls: int) -> None:
    """Against DPM-Solver++ 2M on four grids. Few images end in another mode than the teacher's and decide the RMSE."""
    from diffaccel.core.grid import nodes as grid_nodes

    path, problem = Path.vp_linear(), mixture()
    noise = np.random.default_rng(1).standard_normal((112, 64))
    made = Fitting(Functional(problem.denoise, path, noise), Plan((calls,), holdout=96, moves=0, rivals="none"))
    made.learn()
    fitted = made.fit(calls)
    best = []
    for grid in ("linspace_open", "karras", "uniform_lambda", "quadratic"):
        nodes = grid_nodes(path, calls, grid)
        best.append(made.errors(grid, nodes, analytic(nodes, 3), made.held))
    found = fitted.report["held-out"]
    assert fitted.report["verdict"] == "fitted"
    assert found["median"] <= 0.6 * min(float(np.median(e.values)) for e in best)
    assert found["rmse"] <= 0.65 * min(e.rmse for e in best)


def test_moved_nodes_are_better_on_held_out_noise() -> None:
    """They were chosen on other inputs."""
    still, moved = (fitted_mixture(5, grids="dp2", moves=m, teacher_steps=60).receipt["5 calls"] for m in (0, 30))
    assert moved["moved nodes"]["tried"] == 30
    assert moved["held-out"]["median"] < 0.7 * still["held-out"]["median"]


def test_moves_end_at_the_least_of_a_convex_score() -> None:
    wanted = [0, 11, 13, 40]
    found, best, tried = descend([0, 10, 20, 30], 1e9, lambda c: float(np.abs(np.subtract(c, wanted)).sum()), 50, 200)
    assert found == wanted and best == 0 and tried <= 200
    assert descend([0, 10], 1.0, lambda c: 1.0, 20, 3) == ([0, 10], 1.0, 3)


def test_wrong_sign_of_a_coefficient_is_seen(function_artifact: Artifact) -> None:
    """Or the tests above would show nothing."""
    rows = Tables.of(function_artifact).rows(8)
    problem, path = mixture(), Path.vp_linear()
    noise = np.random.default_rng(1).standard_normal((40, 64))
    made = Fitting(Functional(problem.denoise, path, noise), Plan((8,), holdout=24, teacher_steps=60, rivals="none"))
    made.learn()
    nodes = Nodes(rows.nodes(path.end), path)
    right = made.errors("right", nodes, rows.w, made.held).rmse
    for i, k in np.argwhere(rows.w != 0):
        wrong = rows.w.copy()
        wrong[i, k] *= -1
        assert made.errors(f"{i} {k}", nodes, wrong, made.held).rmse > 1.2 * right


# ---------------------------------------------------------------------- guard
def test_targets_of_other_inputs_are_refused() -> None:
    """Fitted to shuffled trajectories: the artifact holds the analytic table, and says so."""
    problem, path = mixture(), Path.vp_linear()
    noise = np.random.default_rng(1).standard_normal((48, 64))
    plan = Plan((6,), teacher_steps=40, grids=("time",), moves=0, rivals="none")
    made = Fitting(Functional(problem.denoise, path, noise), plan)
    made.learn()
    order = np.random.default_rng(0).permutation(16)
    made.teacher.states = {(k, n): made.teacher.states[k, int(order[n])] for k, n in made.teacher.states}
    images = dict(made.teacher.images)
    made.teacher.images |= {n: images[int(order[n])] for n in range(16)}
    found = made.fit(6)
    assert found.report["verdict"].startswith("analytic: no benefit found")
    assert found.w == pytest.approx(analytic(found.nodes, 3), abs=0)


def test_the_guard_compares_with_the_best_baseline() -> None:
    e = np.linspace(0.01, 0.1, 40)
    good = judge(Errors("fitted", 0.5 * e), [Errors("a", 3 * e), Errors("b", e)], calibration=0.05)
    assert good.accepted and good.base.name == "b" and good.improved == 1
    assert (good.ratio, good.low, good.high) == pytest.approx((0.5, 0.5, 0.5))
    assert not judge(Errors("fitted", e), [Errors("b", e)], 1.0).accepted
    tail = np.where(np.arange(40) == 7, 5.0, 0.5 * e)  # the typical image gains, the mean square does not
    found = judge(Errors("fitted", tail), [Errors("b", e)], 1.0)
    assert not found.accepted and any("root mean square" in note for note in found.notes)
    assert any("outliers" in note for note in found.notes)
    broken = np.where(np.arange(40) == 7, np.inf, 0.5 * e)
    assert "some images are not finite" in judge(Errors("fitted", broken), [Errors("b", e)], 1.0).notes
    few = judge(Errors("fitted", 0.5 * e), [Errors("b", e)], calibration=0.001)
    assert few.accepted and "few or unrepresentative" in few.notes[0]


def test_the_interval_of_paired_ratios_covers() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        base = np.exp(rng.standard_normal(40))
        _, low, high = paired(base * np.exp(0.3 * rng.standard_normal(40) - 0.1), base)
        inside += low < np.exp(-0.1) < high
    assert 85 <= inside <= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 2}, "4 or more inputs"),
        ({"calls": 0}, "numbers of model calls"),
        ({"calls": 6, "teacher_steps": 20}, "nothing to gain"),
        ({"order": 5}, "order must be 1 to 4"),
        ({"grids": "karas"}, "unknown grid 'karas'"),
        ({"moves": -1}, "moves must be"),
        ({"channels": "all"}, "channels must be"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    noise = np.random.default_rng(0).standard_normal((12, 64))
    with pytest.raises(OptionError, match=message):
        calibrate.fit_function(mixture().denoise, Path.vp_linear(), noise, **{"samples": 4, "calls": 4, **options})


def test_equal_inputs_are_an_error() -> None:
    noise = np.repeat(np.random.default_rng(0).standard_normal((1, 64)), 12, axis=0)
    with pytest.raises(OptionError, match="inputs 0 and 1 start from the same noise"):
        calibrate.fit_function(mixture().denoise, Path.vp_linear(), noise, 4, samples=4, teacher_steps=20)


# ---------------------------------------------------------------------- pipelines
def user_images(pipe: Any, scheduler: Any, calls: int, seeds: range, **call: Any) -> np.ndarray:
    """What a user gets, as latents."""
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        found = pipe(
            prompt=[PROMPTS[s % len(PROMPTS)] for s in seeds],
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            num_inference_steps=calls,
            output_type="latent",
            **call,
        ).images
    finally:
        pipe.scheduler = before
    return found.detach().float().numpy()


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("name", ["sd15", "v", "sd3", "flux"])
def test_the_scheduler_lands_where_the_fit_did(name: str, channels: bool) -> None:
    """With guidance; an eps, a v and two flow pipelines (one of packed latents, with a shift of the resolution)."""
    kind = "sd15" if name == "v" else name
    pipe = pipelines.build(kind)
    if name == "v":
        pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    before = pipe.scheduler
    call = call_of(kind)
    made = calibrate.fit(pipe, PROMPTS, 4, **{**SMALL, "channels": channels}, progress=False, batch=4, **call)
    assert pipe.scheduler is before
    runner = Piped(Engine(pipe, PROMPTS, call=call, batch=4, progress=False))
    rows = Tables.of(made).rows(4)
    assert (rows.w.ndim > 2) == (channels and made.receipt["4 calls"]["verdict"] == "fitted")
    wanted = student(runner, range(4, 8), Nodes(rows.nodes(runner.path.end), runner.path), rows.w)
    scheduler = FittedScheduler.from_config(pipe.scheduler.config, artifact=made)
    found = user_images(pipe, scheduler, 4, range(4, 8), **call)
    assert found == pytest.approx(wanted, abs=1e-5 * float(np.abs(wanted).max()))


def test_the_receipt_is_what_a_user_measures(sd15: tuple[Any, Artifact]) -> None:
    """Teacher and fitted images by ordinary calls of the pipeline."""
    pipe, made = sd15
    call = call_of("sd15")
    teacher = TableScheduler.from_config(pipe.scheduler.config, sampler="dpmpp", grid="uniform_lambda")
    wanted = user_images(pipe, teacher, 25, range(4, 8), **call)
    for calls in (3, 5):
        fitted = FittedScheduler.from_config(pipe.scheduler.config, artifact=made)
        error = relative(user_images(pipe, fitted, calls, range(4, 8), **call), wanted)
        report = made.receipt[f"{calls} calls"]
        if report["verdict"] == "fitted":
            assert float(np.median(error)) == pytest.approx(report["held-out"]["median"], rel=0.02)


def test_cost_is_counted_and_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed before the run bounds what is spent; schedulers that cannot make so many calls spend nothing."""
    _, made = piped("sd15", progress=True)
    planned = int(re.search(r"fit: at most (\d+) model calls", capsys.readouterr().out)[1])  # type: ignore[index]
    assert made.meta["cost"] == made.receipt["cost"]
    assert 0.5 * planned < made.meta["cost"]["calls"] <= planned


def test_batches_and_memory_do_not_change_the_table() -> None:
    _, whole = piped("sd15")
    _, small = piped("sd15", batch=3)
    _, twice = piped("sd15", memory_limit=0)
    for other in (small, twice):
        for name, values in whole.tensors.items():
            assert other.tensors[name] == pytest.approx(values, abs=2e-4), name


def test_a_stopped_fit_goes_on(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    _, wanted = piped("sd15")
    out = tmp_path / "fit.safetensors"
    run, count = Engine.run, [0]

    def failing(self: Engine, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", failing)
        with pytest.raises(KeyboardInterrupt):
            piped("sd15", out=out)
    assert not out.exists() and (tmp_path / "fit.safetensors.partial").exists()
    with pytest.raises(OptionError, match="another calibration"):
        piped("sd15", out=out, ridge=1e-3)
    _, made = piped("sd15", out=out)
    assert list(tmp_path.iterdir()) == [out]
    assert Artifact.load(out) == made
    assert made.meta["cost"]["calls"] <= wanted.meta["cost"]["calls"] + 4  # a batch at most was done twice
    for name, values in wanted.tensors.items():
        assert made.tensors[name] == pytest.approx(values, abs=1e-6), name


def test_the_pipeline_is_as_it_was_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipelines.build("sd15")
    before = pipe.scheduler

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipe.unet, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        calibrate.fit(pipe, PROMPTS, 4, **SMALL, progress=False, **call_of("sd15"))
    assert pipe.scheduler is before


def test_not_finite_outputs_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipelines.build("sd15")
    forward = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **k: tuple(v * float("nan") for v in forward(*a, **k)))
    with pytest.raises(RunError, match=r"not finite|NaN"):
        calibrate.fit(pipe, PROMPTS, 4, **SMALL, progress=False, **call_of("sd15"))


def test_prompts_are_needed() -> None:
    with pytest.raises(OptionError, match="fit needs prompts"):
        calibrate.fit(pipelines.build("sd15"), calls=4)


# ---------------------------------------------------------------------- the scheduler
def test_calls_nodes_and_paths_are_the_artifacts(sd15: tuple[Any, Artifact]) -> None:
    pipe, made = sd15
    scheduler = FittedScheduler.from_config(pipe.scheduler.config, artifact=made)
    for calls in (3, 5):
        scheduler.set_timesteps(calls)
        assert len(scheduler.timesteps) == calls
        assert scheduler.timesteps.tolist() == pytest.approx(made.tensors[f"n{calls}.node"][:, 0].tolist())
    with pytest.raises(ArtifactError, match="holds tables for 3, 5 calls, not 7"):
        scheduler.set_timesteps(7)
    with pytest.raises(OptionError, match="belong to its artifact"):
        scheduler.set_timesteps(3, timesteps=[900, 500, 100])
    with pytest.raises(OptionError, match="belong to its artifact"):
        scheduler.set_timesteps(sigmas=[10.0, 3.0, 1.0])
    with pytest.raises(ArtifactError, match="calibrated on another path"):
        FittedScheduler.from_config(pipe.scheduler.config, artifact=made, beta_end=0.02)
    with pytest.raises(ArtifactError, match="diffaccel calibrate fit"):
        FittedScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(OptionError, match="grid"):
        FittedScheduler.from_config(pipe.scheduler.config, artifact=made, grid="karras")


def test_an_artifact_alone_says_its_sampler(sd15: tuple[Any, Artifact]) -> None:
    pipe, made = sd15
    assert TableScheduler.from_config(pipe.scheduler.config, artifact=made).config.sampler == "fitted"


def test_other_checkpoints_are_refused(sd15: tuple[Any, Artifact]) -> None:
    pipe, made = sd15
    config = pipe.scheduler.config
    FittedScheduler.from_config(config, artifact=made, pipe=pipe)
    other = pipelines.build("sd15", seed=1)
    with pytest.raises(ArtifactError, match="other weights"):
        FittedScheduler.from_config(config, artifact=made, pipe=other)
    half = copy.deepcopy(pipe.unet).half()
    with pytest.warns(match="calibrated in float32, the model here is in float16"):
        FittedScheduler.from_config(config, artifact=made, pipe=half)


@pytest.mark.parametrize("begin", range(5))
def test_a_run_can_begin_anywhere(function_artifact: Artifact, begin: int) -> None:
    """From the teacher's state at that node, with rows of less history."""
    problem, path = mixture(), Path.vp_linear()
    tables = Tables.of(function_artifact)
    nodes = Nodes(tables.rows(5).nodes(path.end), path)
    noise = np.random.default_rng(3).standard_normal((32, 64))
    made = Fitting(Functional(problem.denoise, path, noise), Plan((5,), samples=16, holdout=16, teacher_steps=60))
    k = int(np.argmin([abs(n.t - nodes[begin].t) for n in made.teacher.nodes[:-1]]))
    assert made.teacher.nodes[k].t == pytest.approx(nodes[begin].t)
    teach(made.runner, range(32), made.teacher, gram=False, keep=[k])
    x = np.stack([made.teacher.states[k, n] for n in range(32)])
    wanted = np.stack([made.teacher.images[n] for n in range(32)])
    from diffaccel.samplers.registry import get

    tail = nodes[begin:]
    fitted, plain = (
        float(np.median(relative(get(name).run(x, tail, problem.predict, **options), wanted)))
        for name, options in (("fitted", {"tables": tables}), ("dpmpp", {}))
    )
    assert fitted < plain


def test_begin_index_in_a_scheduler(sd15: tuple[Any, Artifact]) -> None:
    pipe, made = sd15
    scheduler = FittedScheduler.from_config(pipe.scheduler.config, artifact=made)
    for begin in range(5):
        scheduler.set_timesteps(5)
        scheduler.set_begin_index(begin)
        x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
        assert torch.isfinite(x).all()


@pytest.mark.filterwarnings("default::diffaccel.errors.ArtifactWarning")
def test_another_size_is_said(sd15: tuple[Any, Artifact]) -> None:
    pipe, made = sd15
    scheduler = FittedScheduler.from_config(pipe.scheduler.config, artifact=made)
    scheduler.set_timesteps(3)
    x = torch.zeros(1, 4, 3, 3)
    with pytest.warns(match=r"fitted to samples of shape \(4, 16, 16\), this run's are \(4, 3, 3\)"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_saved_copied_and_pickled_it_is_the_same(sd15: tuple[Any, Artifact], tmp_path: FilePath) -> None:
    pipe, made = sd15
    scheduler = FittedScheduler.from_config(pipe.scheduler.config, artifact=made)
    scheduler.save_pretrained(tmp_path)
    twins = [FittedScheduler.from_pretrained(tmp_path), copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))]
    scheduler.set_timesteps(5)
    for twin in twins:
        twin.set_timesteps(5)
        assert twin.table == scheduler.table


# ---------------------------------------------------------------------- further budgets
def test_extend_adds_budgets(sd15: tuple[Any, Artifact]) -> None:
    pipe, made = sd15
    both = calibrate.extend(made, pipe, PROMPTS, 4, progress=False, **call_of("sd15"))
    assert both.meta["calls"] == [3, 4, 5]
    for name, values in made.tensors.items():
        assert np.array_equal(both.tensors[name], values)
    assert {"3 calls", "4 calls", "5 calls"} <= set(both.receipt)
    assert both.meta["cost"]["calls"] > made.meta["cost"]["calls"]
    scheduler = FittedScheduler.from_config(pipe.scheduler.config, artifact=both)
    scheduler.set_timesteps(4)
    with pytest.raises(OptionError, match=r"holds tables for \[5\] calls already"):
        calibrate.extend(made, pipe, PROMPTS, 5)
    with pytest.raises(OptionError, match="ridge: decided by the artifact"):
        calibrate.extend(made, pipe, PROMPTS, 4, ridge=1.0)
    with pytest.raises(ArtifactError, match="other weights"):
        calibrate.extend(made, pipelines.build("sd15", seed=1), PROMPTS, 4)


# ---------------------------------------------------------------------- every path, order and small number of calls
@pytest.mark.parametrize("path", [Path.vp_linear(), Path.edm(0.01, 80.0), Path.flow(shift=3.0)], ids=lambda p: p.family)
@pytest.mark.parametrize(("order", "calls"), [(1, 1), (1, 4), (2, 2), (3, 1), (4, 6)])
def test_every_order_on_every_path(path: Path, order: int, calls: int) -> None:
    """The table of the artifact, traced and applied, gives what the receipt measured; every beginning is finite."""
    from diffaccel.samplers.begin import begin_at
    from diffaccel.samplers.registry import get

    problem, noise = mixture(), np.random.default_rng(1).standard_normal((16, 64))
    options: dict[str, Any] = {"samples": 8, "teacher_steps": 40, "order": order, "moves": 3}
    made = calibrate.fit_function(problem.denoise, path, noise, calls, **options)
    tables = Tables.of(made)
    nodes = Nodes(tables.rows(calls).nodes(path.end), path)
    table = get("fitted").trace(nodes, tables=tables)
    assert len(table) == calls and table.depth <= order
    x = noise[8:] * float(np.hypot(nodes[0].alpha, nodes[0].sigma))
    wanted = Fitting(Functional(problem.denoise, path, noise), Plan((calls,), 8, 8, 40, order, rivals="none"))
    wanted.learn()
    error = relative(table.apply(x, problem.predict), np.stack([wanted.teacher.images[n] for n in range(8, 16)]))
    report = made.receipt[f"{calls} calls"]
    if report["verdict"] == "fitted":
        assert float(np.median(error)) == pytest.approx(report["held-out"]["median"], rel=1e-3)
    for k in range(calls):
        rest = begin_at(table, nodes, k, get("fitted"), {"tables": tables})
        assert np.isfinite(rest.apply(x, problem.predict)).all()
