"""`calibrate.fit` on pipelines, its artifact, and the scheduler that runs it."""

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
from diffaccel.calibrate.fit_guard import relative
from diffaccel.calibrate.fit_pipe import Piped
from diffaccel.calibrate.fit_run import analytic, student
from diffaccel.core.grid import nodes as grid_nodes
from diffaccel.core.path import Nodes
from diffaccel.drive import steps_for
from diffaccel.errors import ArtifactError, OptionError, RunError
from diffaccel.eval.rivals import Setting
from diffaccel.samplers.fitted import Tables
from diffaccel.schedulers import FittedScheduler, TableScheduler
from diffaccel.testing import pipelines

pytestmark = pytest.mark.filterwarnings("ignore::diffaccel.errors.ArtifactWarning")
SMALL: dict[str, Any] = {"samples": 4, "holdout": 4, "teacher_steps": 24, "grids": "dp2", "channels": False} | {
    "moves": 0,
    "refine": 0,
}
PROMPTS = ["a red fox", "a blue car", "two boats", "a hat", "snow", "a tree", "an owl", "the sea"]


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
    options = {**SMALL, "channels": channels, "refine": 1}
    made = calibrate.fit(pipe, PROMPTS, 4, **options, progress=False, batch=4, **call)
    assert pipe.scheduler is before
    runner = Piped(Engine(pipe, PROMPTS, call=call, batch=4, progress=False))
    rows = Tables.of(made).rows(4)
    assert (rows.w.ndim > 2) == (channels and made.receipt["4 calls"]["verdict"] == "fitted")
    wanted = student(runner, range(4, 8), Nodes(rows.nodes(runner.path.end), runner.path), rows.w)
    scheduler = FittedScheduler.from_config(pipe.scheduler.config, artifact=made)
    found = user_images(pipe, scheduler, 4, range(4, 8), **call)
    assert found == pytest.approx(wanted, abs=1e-5 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan"])
def test_a_run_goes_on_from_its_middle(name: str) -> None:
    """What derivatives are made of: a pipeline that is handed a state at a later node."""
    pipe = pipelines.build(name)
    runner = Piped(Engine(pipe, PROMPTS, call=call_of(name), batch=2, progress=False))
    nodes = grid_nodes(runner.path, 4, "uniform_lambda" if name in ("sd15", "sdxl") else "trailing")
    seen: list[list[np.ndarray]] = []

    def see(i: int, features: list[np.ndarray]) -> bool:
        seen.append(features)
        return True

    w = analytic(nodes, 3)
    wanted = student(runner, [0, 1], nodes, w, see)
    assert wanted is not None
    for i in (1, 3):
        found = student(runner, [0, 1], nodes, w, begin=(i, seen[i][0], seen[i][2:]))
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
    _, made = piped("sd15", progress=True, refine=1)
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
    both = calibrate.extend(made, pipe, PROMPTS, 4, progress=False)
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


def test_extend_runs_the_call_that_the_artifact_was_fitted_with(tmp_path: FilePath) -> None:
    pipe, made = piped("sd15", height=48, width=48)
    made.save(tmp_path / "fit.safetensors")
    runs: list[dict[str, Any]] = []
    own = Engine.run

    def see(self: Engine, *args: Any, **kwargs: Any) -> Any:
        runs.append(self.call)
        return own(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "run", see)
        calibrate.extend(tmp_path / "fit.safetensors", pipe, PROMPTS, 3, progress=False)
    assert runs and all(call == {"height": 48, "width": 48, "guidance_scale": 4.0} for call in runs)
    with pytest.raises(OptionError, match="fitted height=48, and height=64 is given"):
        calibrate.extend(made, pipe, PROMPTS, 3, height=64)
    with pytest.raises(OptionError, match="guidance_scale: decided by the artifact"):
        calibrate.extend(made, pipe, PROMPTS, 3, guidance_scale=2.0)
    old = Artifact("fit", made.tensors, {k: v for k, v in made.meta.items() if k != "arguments"})
    with pytest.raises(OptionError, match="height=48, width=48, which it does not hold"):
        calibrate.extend(old, pipe, PROMPTS, 3)
    other = Artifact("fit", made.tensors, made.meta | {"shape": [4, 8, 8]})
    with pytest.raises(ArtifactError, match=r"states of shape \(4, 8, 8\), this pipeline's are \(4, 24, 24\)"):
        calibrate.extend(other, pipe, PROMPTS, 3)


def test_a_sweep_knows_which_budgets_an_artifact_has(sd15: tuple[Any, Artifact]) -> None:
    """Before the first image: fewer calls, which every sweep adds, are left out where there is no table for them."""
    scheduler = FittedScheduler.from_config(config(), artifact=sd15[1])
    setting = Setting("fitted", scheduler)
    assert [setting.steps(n) for n in (2, 3, 4, 5)] == [None, 3, 3, 5]
    assert steps_for(scheduler, 5) == 5
    with pytest.raises(ArtifactError, match="holds tables for 3, 5 calls, not 4"):
        steps_for(scheduler, 4)
