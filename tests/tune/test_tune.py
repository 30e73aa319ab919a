"""Tuning on an analytic Gaussian mixture with its exact score, in a real pipeline of diffusers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mixture_pipe import PATH, mixture_pipe

import diffaccel as da
from diffaccel import calibrate
from diffaccel.artifact import Artifact
from diffaccel.calibrate.engine import Engine
from diffaccel.errors import ArtifactError, ArtifactWarning, OptionError
from diffaccel.pipelines.applied import applied
from diffaccel.pipelines.recipe import Recipe
from diffaccel.testing.problems import Mixture
from diffaccel.tune import bench as bench_module
from diffaccel.tune.bench import Bench
from diffaccel.tune.candidates import SOURCES, Asked, gather, source
from diffaccel.tune.halving import score
from diffaccel.tune.sources import scheduler

pytestmark = [  # diffusers' own, and what a fit on so few images says
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:fit, :diffaccel.errors.ArtifactWarning"),
]
IMAGES, CALLS = 32, 6
FIT = {"moves": 2, "refine": 1, "samples": 8}
QUICK = {"images": 8, "holdout": 8, "teacher_steps": 40, "fit": False, "batch": 8, "progress": False, "stock": False}


@source("test few")
def few(asked):
    grids = [("trailing", {}), ("karras", {}), ("uniform_lambda", {})]
    return [scheduler(asked.calls, s, {}, g) for s in ("ddim", "dpmpp", "deis") for g in grids]


@source("test poor")
def poor(asked):
    return [scheduler(asked.calls, "ddim", {}, ("quadratic", {}))]


@pytest.fixture(autouse=True, scope="module")
def _sources():
    yield
    for name in [n for n in SOURCES if n.startswith("test ")]:
        del SOURCES[name]


def tuned(pipe=None, calls=4, **changes):
    options = {**QUICK, "sources": ("test few",), **changes}
    return da.tune(mixture_pipe() if pipe is None else pipe, ["0"], calls, **options)


# ---------------------------------------------------------------------- the acceptance test
def exact_images(pipe, count):
    """Where the probability-flow ODE of the exact score ends from each image's noise, (count, 8)."""
    engine, noise = Engine(pipe, ["0"], batch=count, progress=False), []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args: noise.append(args[0].double()) if not noise else None)
    engine.run(engine.batches(0, count)[0], pipe.scheduler, 1)
    hook.remove()
    unet = pipe.unet
    data = Mixture(unet.w.numpy(), unet.mu.numpy(), np.sqrt(unet.var.numpy()))
    return data.flow(noise[0].flatten(1).numpy(), PATH.first, PATH.end, tol=1e-9)


def test_it_lands_within_5_per_cent_of_exhaustive_search_at_15_per_cent_of_its_evaluations():
    """Exhaustive search is done here, by runs of the pipeline alone, against the exact solution."""
    pipe, runs = mixture_pipe(), []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args: runs.append(len(args[0])))
    searched = {}

    def counted(self, choice, first, stop, measure=Bench.choice):
        before = sum(runs)
        found = measure(self, choice, first, stop)
        if stop <= IMAGES:
            searched[choice.name, first, stop] = sum(runs) - before
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "choice", counted)
        options = {"images": IMAGES, "holdout": 8, "fit": FIT, "batch": IMAGES, "stock": False}
        recipe = da.tune(pipe, ["0"], CALLS, progress=False, **options)
    hook.remove()
    exact, engine = exact_images(pipe, IMAGES), Engine(pipe, ["0"], batch=IMAGES, progress=False)
    choices = gather(["solvers", "rewriters"], Asked(pipe, Bench(engine, 100).reading, CALLS))
    choices += [recipe.choice] if recipe.choice.artifact else []
    scores = {}
    for choice in choices:
        with applied(pipe, choice):
            z = engine.run(engine.batches(0, IMAGES)[0], pipe.scheduler, CALLS).double().flatten(1).numpy()
        scores[choice.name] = score(np.linalg.norm(z - exact, axis=1) / np.linalg.norm(exact, axis=1))
    count = recipe.receipt["search"]["candidates"]
    assert count >= 200 and len(scores) >= count - 1
    assert scores[recipe.choice.name] <= 1.05 * min(scores.values())
    spent, exhaustive = sum(searched.values()), count * IMAGES * CALLS
    assert (
        spent == recipe.receipt["search"]["model calls"] and exhaustive == recipe.receipt["search"]["exhaustive search"]
    )
    assert spent <= 0.15 * exhaustive
    assert np.sort(list(scores.values()))[count // 2] > 2 * min(scores.values())  # the problem does separate them


# ---------------------------------------------------------------------- the same again
def test_a_second_run_gives_the_same_recipe_byte_for_byte(tmp_path):
    """Seconds and what was spent apart, which stand in a part of their own."""
    files = []
    for name in ("a.json", "b.json"):
        options = {"fit": FIT, "sources": ("test few", "fitted"), "out": tmp_path / name}
        recipe = tuned(**options)
        assert recipe == Recipe.load(tmp_path / name)
        files.append((tmp_path / name).read_text())
    whole = [json.loads(text) for text in files]
    spent = [w.pop("spent") for w in whole]
    assert json.dumps(whole[0]) == json.dumps(whole[1]) and set(spent[0]) == set(spent[1])
    head = [text[: text.index('"spent"')] for text in files]
    assert head[0] == head[1] and len(head[0]) > 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]
    other = tuned(**options, seed=1)
    assert other != recipe


class Stop(BaseException):
    """As Ctrl-C: nothing that tune catches."""


@pytest.mark.parametrize("after", [0, 5, 14])
def test_a_stopped_tuning_goes_on_and_ends_the_same(tmp_path, after, monkeypatch):
    whole, done = tuned(), []
    pipe, out = mixture_pipe(), tmp_path / "r.json"
    measure = Bench.choice

    def stops(self, choice, first, stop):
        if len(done) == after:
            raise Stop
        done.append(choice.name)
        return measure(self, choice, first, stop)

    monkeypatch.setattr(Bench, "choice", stops)
    before = pipe.scheduler
    with pytest.raises(Stop):
        tuned(pipe, out=out)
    assert pipe.scheduler is before and not out.exists() and (tmp_path / "r.json.partial").exists()
    monkeypatch.setattr(Bench, "choice", measure)
    with pytest.raises(OptionError, match=r"was left by another calibration \(plan differ"):
        tuned(pipe, calls=5, out=out)
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    found = tuned(pipe, out=out)
    hook.remove()
    assert found == whole and Recipe.load(out) == whole
    assert sum(calls) <= whole.spent["model calls"]["everything else"] - 16 * 41 - 8 * after  # the teacher was kept
    assert not (tmp_path / "r.json.partial").exists()


def test_a_stopped_tuning_keeps_its_fitted_table(tmp_path, monkeypatch):
    options = {"fit": FIT, "sources": ("test few", "fitted"), "out": tmp_path / "r.json"}
    monkeypatch.setattr(Bench, "learn", lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        tuned(**options)
    monkeypatch.undo()
    monkeypatch.setattr("diffaccel.tune.run.fit_tables", None)
    found = tuned(**options)
    assert found.choice.artifact is not None and found.choice.artifact.kind == "fit"


# ---------------------------------------------------------------------- what it says
def test_the_cost_is_printed_before_the_run_and_is_not_exceeded(capsys):
    recipe = tuned(progress=True, stock=True, fit=FIT, sources=("test few", "fitted"))
    printed = capsys.readouterr().out
    assert "tune: 9 candidates and a fitted table" in printed and "minutes more, by the first batch" in printed
    most = int(printed.split("at most ")[1].split()[0])
    assert printed.index("at most") < printed.index("minutes more")
    assert 0.8 * most <= sum(recipe.spent["model calls"].values()) <= most


def test_the_receipt_holds_the_plain_run_and_the_best_stock_scheduler():
    recipe = tuned(calls=6, images=16, holdout=16, stock=True)
    receipt = recipe.receipt
    assert receipt["held-out images"] == 16 and receipt["plain run"]["name"] == "the pipeline's DDIMScheduler"
    assert receipt["best stock scheduler"]["tried"] > 60
    for entry in (receipt["plain run"], receipt["best stock scheduler"]):
        ratio, low, high = entry["tuned / it [95 %]"]
        assert low <= ratio <= high
        assert ratio == pytest.approx(receipt["tuned"]["geometric mean"] / entry["geometric mean"], rel=2e-3)
    assert receipt["plain run"]["tuned / it [95 %]"][2] < 1
    beats_stock = receipt["best stock scheduler"]["tuned / it [95 %]"][2] < 1
    assert receipt["helps"] is beats_stock and ("no benefit found" in receipt["verdict"]) is not beats_stock


def test_no_benefit_is_said_and_warned_about():
    pipe = mixture_pipe()
    recipe = tuned(pipe, sources=("test poor",))
    assert recipe.receipt["best stock scheduler"] == "not measured"
    assert recipe.receipt["verdict"].startswith("no benefit found against") and recipe.receipt["helps"] is False
    with pytest.warns(ArtifactWarning, match="no benefit found against"):
        da.accelerate(pipe, recipe).remove()


def test_the_recipe_runs_as_the_search_measured_it():
    """What the receipt says of the winner is what accelerate() gives, on the very images that judged."""
    pipe = mixture_pipe()
    recipe, engine = tuned(pipe), Engine(pipe, ["0"], batch=8, progress=False)
    made = Bench(engine, 40)
    made.learn(16, 0)
    with da.accelerate(pipe, recipe):
        z = engine.run(engine.batches(8, 8)[0], pipe.scheduler, 4)
    errors = np.linalg.norm((z.numpy() - made.teacher[8:]).reshape(8, -1), axis=1)
    errors /= np.linalg.norm(made.teacher[8:].reshape(8, -1), axis=1)
    assert score(errors) == pytest.approx(recipe.receipt["tuned"]["geometric mean"], rel=1e-3)


# ---------------------------------------------------------------------- candidates
def test_a_source_of_ones_own_competes_and_what_fails_is_named():
    @source("test mixed")
    def mixed(asked):
        broken = scheduler(asked.calls, "dpmpp", {"order": 7}, ("trailing", {}))
        return [broken, scheduler(asked.calls, "dpmpp", {}, ("uniform_lambda", {})), *poor(asked)]

    recipe = tuned(sources=("test mixed",))
    assert recipe.choice.name == "dpmpp(uniform_lambda)"
    assert "OptionError" in recipe.receipt["left out"]["dpmpp(order=7, trailing)"]
    with pytest.raises(OptionError, match="a source named 'test mixed' is registered already"):
        source("test mixed")(few)


def test_if_nothing_runs_the_reason_is_given():
    @source("test broken")
    def broken(asked):
        return [scheduler(asked.calls, "dpmpp", {"order": 7}, ("trailing", {}))]

    with pytest.raises(OptionError, match=r"no candidate could be run; dpmpp\(order=7, trailing\): OptionError"):
        tuned(sources=("test broken",))


def test_a_candidate_that_makes_other_calls_than_it_says_is_no_candidate():
    @source("test liar")
    def liar(asked):
        return [scheduler(asked.calls + 4, "dpmpp", {}, ("uniform_lambda", {})), *poor(asked)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_module, "counted", lambda pipe: _Counts(4))
        recipe = tuned(sources=("test liar",))
    assert "states 8 model calls and made 4" in recipe.receipt["left out"]["dpmpp(uniform_lambda)"]


class _Counts:
    def __init__(self, calls):
        self.calls = calls

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_tables_compete_and_must_be_of_this_checkpoint(tmp_path):
    pipe = mixture_pipe()
    made = calibrate.fit(pipe, ["0"], 4, samples=8, holdout=8, moves=0, refine=0, rivals=None, progress=False)
    made.save(tmp_path / "fit.safetensors")
    recipe = tuned(pipe, sources=("test few", "fitted"), tables=[tmp_path / "fit.safetensors"])
    assert recipe.choice.name == "fitted(fit.safetensors)"
    held = Artifact.load(tmp_path / "fit.safetensors")
    for name, array in recipe.choice.artifact.tensors.items():
        assert array.tobytes() == held.tensors[name].tobytes()
    with pytest.raises(ArtifactError, match="calibrated on another model"):
        tuned(mixture_pipe(phase=0.7), sources=("test few", "fitted"), tables=[tmp_path / "fit.safetensors"])
    other = tuned(pipe, calls=5, sources=("test few", "fitted"), tables=[tmp_path / "fit.safetensors"])
    assert other.receipt["left out"]["fit.safetensors"] == "holds [4] calls, not 5"
    with pytest.raises(OptionError, match=r"fitted offer no candidate \(fit.safetensors: holds"):
        tuned(pipe, calls=5, sources=("fitted",), tables=[tmp_path / "fit.safetensors"])


def test_a_searched_table_and_a_calibrated_grid_compete(tmp_path):
    pipe, small = mixture_pipe(), {"samples": 8, "teacher_steps": 40, "progress": False}
    table = calibrate.search(pipe, ["0"], 4, holdout=8, **small)
    grid = calibrate.ays(pipe, ["0"], 4, **small)
    table.save(tmp_path / "search.safetensors")
    held = Artifact.load(tmp_path / "search.safetensors")
    recipe = tuned(pipe, sources=("fitted",), tables=[tmp_path / "search.safetensors", grid])
    assert recipe.receipt["search"]["candidates"] == 15 and "left out" not in recipe.receipt
    chosen = gather(["fitted"], Asked(pipe, Bench(Engine(pipe, ["0"], progress=False), 40).reading, 4, [held, grid]))
    for choice in (chosen[0], chosen[1]):
        with applied(pipe, choice):
            pipe.scheduler.set_timesteps(4)
            node = (held if choice.artifact else grid).tensors["n4.node"]
            np.testing.assert_allclose(pipe.scheduler.timesteps.numpy(), node[:, 0], rtol=1e-6)


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 4}, "tune needs 8 images to choose by"),
        ({"holdout": 0}, "holdout must be a number of 1 or more"),
        ({"calls": 20}, "20 calls against a teacher of 40 steps: nothing to gain"),
        ({"sources": ()}, "sources must name one or more of"),
        ({"sources": ("solver",)}, "Did you mean 'solvers'"),
        ({"sources": ("solvers",), "tables": ["x.safetensors"]}, "'fitted' is not among the sources"),
        ({"sources": ("fitted",)}, "there is no candidate: 'fitted' needs tables="),
        ({"steps": 3}, "takes no option 'steps'"),
        ({"fit": 3}, "fit must be True, False or options of calibrate.fit"),
        ({"sources": "solver"}, "unknown source of candidates 'solver'"),
        ({"guidance": 2.0, "guidance_scale": 1.0}, "say the same"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(OptionError, match=message):
        tuned(**changes)


def test_prompts_are_needed_and_a_wrapped_pipeline_is_refused():
    pipe = mixture_pipe()
    with pytest.raises(OptionError, match="tune needs prompts"):
        da.tune(pipe)
    with da.accelerate(pipe, tuned(pipe)), pytest.raises(OptionError, match="wrapped by 'accelerate' already"):
        tuned(pipe)


def test_the_pipeline_is_left_as_it_was():
    pipe = mixture_pipe()
    before, state = pipe.scheduler, torch.get_rng_state()
    config = dict(before.config)
    tuned(pipe)
    assert pipe.scheduler is before and dict(before.config) == config and torch.equal(torch.get_rng_state(), state)
    assert not hasattr(pipe.unet, "_diffusers_hook") and not pipe.unet._forward_pre_hooks
