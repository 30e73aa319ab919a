"""The search of DC-Solver's ratios: what it finds on an analytic mixture, refusals, going on after a stop."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from mixture_pipe import mixture_pipe
from ranks_in_threads import as_ranks

from diffaccel import calibrate, models
from diffaccel.artifact import Artifact
from diffaccel.calibrate import checkpoint
from diffaccel.calibrate.captured import Captured
from diffaccel.calibrate.cpr import fit_cpr
from diffaccel.calibrate.dc_search import Search, Student, refined, teacher_states
from diffaccel.calibrate.engine import Engine
from diffaccel.core.extrapolation import lagrange
from diffaccel.core.grid import nodes
from diffaccel.core.path import Path
from diffaccel.errors import ArtifactError, OptionError
from diffaccel.samplers.dc import PARENTS, cpr_ratio
from diffaccel.samplers.registry import get
from diffaccel.schedulers import DCSolverScheduler
from diffaccel.testing.pipelines import build, call_kwargs

QUIET = {"progress": False, "final_sigmas_type": "sigma_min", "teacher_calls": 60, "pairs": 10, "batch": 64}


def run(pipe, n, **more):
    return calibrate.dc(pipe, ["0"], **{**QUIET, "calls": [n], "held_out": 64, **more})


# ---------------------------------------------------------------------- what it finds
@pytest.fixture(scope="module")
def helped():
    return run(mixture_pipe(), 10, grid="linspace")


def test_on_the_time_grid_the_held_out_error_halves(helped):
    found = helped.receipt["10 calls"]["held-out error"]
    assert found["calibrated"] <= 0.5 * found["parent"] and found["high"] < 0
    assert found["calibrated_median"] <= 0.5 * found["parent_median"]
    assert np.any(helped.tensors["ratios_0"] != 1) and np.all(helped.tensors["ratios_0"][:2] == 1)
    assert helped.receipt["result"].startswith("1 of 1")


def test_where_it_does_not_help_the_artifact_says_so_and_changes_nothing():
    made = run(mixture_pipe(), 8, grid="uniform_lambda")
    assert made.receipt["result"] == "no benefit found"
    found = made.receipt["8 calls"]
    assert found["held-out error"]["verdict"] == "no benefit found"
    assert any(r != 1 for r in found["searched ratios"])  # the calibration loss fell, the error did not
    assert np.all(made.tensors["ratios_0"] == 1)


def test_the_pipeline_then_runs_with_the_error_that_was_promised(helped):
    """The same noise through the user's scheduler, nothing of the calibration's machinery."""
    pipe = mixture_pipe()
    engine = Engine(pipe, ["0"], batch=64, progress=False)
    held = engine.batches(10, 64)
    config = pipe.scheduler.config
    fine = nodes(Path.from_config(config), 400, "uniform_lambda", final="sigma_min")
    teacher = engine.run(held[0], Captured.of(config, "dpmpp", {"order": 3, "form": "exact"}, nodes=fine), 400)

    def error(artifact, **options):
        scheduler = DCSolverScheduler.from_config(config, artifact=artifact, **options)
        z = engine.run(held[0], scheduler, 10)
        return float(((z - teacher).flatten(1).norm(dim=1) / teacher.flatten(1).norm(dim=1)).mean())

    found = helped.receipt["10 calls"]["held-out error"]
    assert error(helped) == pytest.approx(found["calibrated"], rel=0.02)
    grid = {"grid": "linspace", "final_sigmas_type": "sigma_min"}
    assert error(None, ratios="none", **grid) == pytest.approx(found["parent"], rel=0.02)


def student_of(pipe, n, sampler="unipc", grid="linspace", **options):
    parent = get(sampler)
    scheduler = Captured.of(pipe.scheduler.config, sampler, options, grid=grid, final_sigmas_type="sigma_min")
    points = nodes(Path.from_config(pipe.scheduler.config), n, grid, final="sigma_min")
    return Student(PARENTS[sampler], sampler, parent.options(options), 2, scheduler.config, points)


@pytest.mark.parametrize("sampler", ["unipc", "dpmpp", "ddim"])
def test_each_ratio_is_the_best_of_a_brute_force_scan(sampler):
    """The greedy objective, scanned node by node on states of the loop itself."""
    pipe = mixture_pipe()
    engine = Engine(pipe, ["0"], batch=16, progress=False)
    student, batches = student_of(pipe, 5, sampler), engine.batches(0, 16)
    teacher = teacher_states(engine, "t", batches, student, 60)
    made = Search(engine, "s", student, batches, teacher)
    rho = made.ratios()
    raws = [[made._call(0, k, None) for k in range(5)]]
    for i in range(2, 4):
        scan = np.linspace(0.3, 2.0, 171)
        losses = [made._loss(i, [*rho[:i], float(r)], [raws[0][: i + 1]]) for r in scan]
        best = made._loss(i, rho[: i + 1], [raws[0][: i + 1]])
        plain = made._loss(i, [*rho[:i], 1.0], [raws[0][: i + 1]])
        assert best <= min(losses) * 1.01 or (rho[i] == 1 and min(losses) > 0.985 * plain)


@pytest.mark.parametrize("sampler", ["unipc", "dpmpp"])
def test_the_second_sweep_lowers_the_error_of_the_last_state(sampler):
    """Its loss is that of whole runs by the pipeline; the ratio that was searched last is the best of a scan."""
    pipe = mixture_pipe()
    engine = Engine(pipe, ["0"], batch=16, progress=False)
    student, batches = student_of(pipe, 6, sampler), engine.batches(0, 16)
    teacher = teacher_states(engine, "t", batches, student, 60)

    def loss(rho):
        z = engine.run(batches[0], student.scheduler(rho), 6).double().numpy()
        return float(np.mean((z - teacher[:, -1]) ** 2))

    first = Search(engine, "a", student, batches, teacher).ratios()
    made = Search(engine, "b", student, batches, teacher, objective="final")
    rho = made.ratios()
    assert loss(rho) < 0.9 * loss(first) and rho[:2] == [1.0, 1.0]
    torch.testing.assert_close(
        float((made.ends[0] - made.targets[0][:, -1]).square().mean()), loss(rho), rtol=1e-3, atol=0
    )
    scan = [loss([*rho[:5], float(r)]) for r in np.linspace(0.3, 2.0, 35)]  # the last of the sweep
    assert loss(rho) <= 1.01 * min(scan)


def test_the_objective_final_through_calibrate_dc():
    found = run(mixture_pipe(), 6, grid="linspace", objective="final", held_out=16)
    assert found.meta["objective"] == "final"
    plain = run(mixture_pipe(), 6, grid="linspace", held_out=16)
    errors = [m.receipt["6 calls"]["calibration error"]["compensated"] for m in (found, plain)]
    assert errors[0] < errors[1] and found.meta["cost"]["calls"] > plain.meta["cost"]["calls"]
    scheduler = DCSolverScheduler.from_config(mixture_pipe().scheduler.config, artifact=found)
    scheduler.set_timesteps(6)
    assert len(scheduler.table) == 6


def test_the_corrected_state_is_that_of_the_paper():
    """Order 1: `x^c = x - alpha_t (e^-h - 1)/2 (P_t - m_s)`, m_s the replaced prediction, written out here."""
    engine = Engine(mixture_pipe(), ["0"], batch=4, progress=False)
    student, batch = student_of(engine.pipe, 6, order=1), engine.batches(0, 4)[0]
    rho, raws, x = [1.0, 1.0, 1.3, 0.8, 1.1, 1.0], [], None
    for i in range(6):
        raws.append(engine.output(batch, student.nodes[i], x, student.config))
        x = student.state(student.table(rho), raws, i + 1)
    points = student.nodes
    p = [(seen - n.sigma * eps) / n.alpha for (seen, eps), n in zip(raws, points)]
    m = p[:2]
    for i in range(2, 6):
        t = [points[i - k].t for k in range(3)]
        weights = lagrange(t, t[1] + rho[i] * (t[0] - t[1]))
        m.append(sum(w * v for w, v in zip(weights, (p[i], m[i - 1], m[i - 2]))))
    for j in range(1, 6):
        s, t = points[j - 1], points[j]
        before = student.state(student.table(rho), raws, j)
        expected = before - t.alpha * 0.5 * (np.exp(s.lam - t.lam) - 1) * (p[j] - m[j - 1])
        found = student.corrected(rho[:j], raws[: j + 1], before)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert float((found - before).abs().max()) > 1e-4


def test_the_teacher_passes_through_the_students_nodes():
    path = Path.flow(3.0)
    points = nodes(path, 6, "trailing")
    fine, at = refined(points, 60)
    assert [fine[k].key for k in at] == [n.key for n in points] and len(fine) == 61
    assert all(s.lam < t.lam for s, t in pairwise(fine))


# ---------------------------------------------------------------------- real pipelines
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_through_a_pipeline(name, tmp_path):
    """Guidance, flow matching and packed latents; the pipeline is left as it was."""
    pipe = build(name)
    before, given = pipe.scheduler, call_kwargs(name)
    call = {k: v for k, v in given.items() if k in ("height", "width", "max_sequence_length")}
    scale = given.get("guidance_scale", 3.0)
    options = {"pairs": 2, "held_out": 8, "teacher_calls": 4, "batch": 8, "progress": False}
    out = tmp_path / "dc.safetensors"
    made = calibrate.dc(pipe, ["a", "b"], calls=[4], guidance=scale, call=call, out=out, **options)
    assert pipe.scheduler is before and Artifact.load(out, "dc") == made
    assert made.meta["cost"]["calls"] > 0 and len(made.tensors["ratios_0"]) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dc.safetensors"]
    pipe.scheduler = DCSolverScheduler.from_config(pipe.scheduler.config, artifact=made, pipe=pipe)
    images = pipe(**{**given, "num_inference_steps": 4})[0]
    assert torch.isfinite(torch.as_tensor(np.asarray(images))).all()


# ---------------------------------------------------------------------- stopping
@pytest.mark.parametrize("objective", ["trajectory", "final"])
def test_stopped_anywhere_it_goes_on_to_the_same_artifact(tmp_path, monkeypatch, objective):
    options = {"calls": [4, 5], "held_out": 8, "pairs": 4, "batch": 2, "teacher_calls": 10, "progress": False}
    options["objective"] = objective

    def make(out):
        return calibrate.dc(mixture_pipe(), ["0"], out=out, **options)

    whole = make(tmp_path / "a.safetensors")
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    run_pipeline, left = Engine.run, [0]

    def dies(self, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return run_pipeline(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "run", dies)
    stops = 0
    for _ in range(60):
        left[0] = 17
        try:
            resumed = make(tmp_path / "b.safetensors")
            break
        except KeyboardInterrupt:
            stops += 1
            assert (tmp_path / "b.safetensors.partial").exists()
    assert stops > 3
    for name, values in whole.tensors.items():
        np.testing.assert_array_equal(resumed.tensors[name], values)
    told = ("cost", "receipt")
    assert {k: v for k, v in resumed.meta.items() if k not in told} == {
        k: v for k, v in whole.meta.items() if k not in told
    }
    for label in ("4 calls", "5 calls"):
        assert resumed.receipt[label] == whole.receipt[label]
    assert resumed.meta["cost"]["calls"] >= whole.meta["cost"]["calls"]
    assert not (tmp_path / "b.safetensors.partial").exists()


@pytest.mark.parametrize("batch", [3, 64])
def test_processes_share_the_work_also_where_one_batch_would_hold_all(batch):
    options = {"calls": [4], "held_out": 9, "pairs": 5, "teacher_calls": 10, "progress": False, "batch": batch}
    alone = calibrate.dc(mixture_pipe(), ["0"], **options)
    both = as_ranks(2, lambda world: calibrate.dc(mixture_pipe(), ["0"], world=world, **options))
    for made in both:
        for name, values in alone.tensors.items():
            np.testing.assert_allclose(made.tensors[name], values, atol=1e-9)
        found, expected = (m.receipt["4 calls"]["held-out error"] for m in (made, alone))
        assert found["images"] == 9 and found["calibrated"] == pytest.approx(expected["calibrated"], rel=1e-6)
        assert made.meta["cost"]["calls"] == alone.meta["cost"]["calls"] + 2  # each asks twice where the nodes lie


def test_a_stopped_calibration_of_other_settings_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "output", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    options = {"held_out": 8, "pairs": 4, "teacher_calls": 10, "progress": False, "out": tmp_path / "a.safetensors"}
    with pytest.raises(KeyboardInterrupt):
        calibrate.dc(mixture_pipe(), ["0"], calls=[4], **options)
    with pytest.raises(OptionError, match=r"another calibration \(calls differ\)"):
        calibrate.dc(mixture_pipe(), ["0"], calls=[5], **options)
    with pytest.raises(OptionError, match=r"another calibration \(model differ\)"):
        calibrate.dc(mixture_pipe(phase=0.5), ["0"], calls=[4], **options)


# ---------------------------------------------------------------------- the polynomial
def test_cpr_finds_a_polynomial_again():
    coef = np.random.default_rng(0).standard_normal((4, 3, 3)) * 0.3
    runs = [
        (n, g, np.array([cpr_ratio(coef, i, n, g) for i in range(1, n + 1)]))
        for n in (5, 8, 10, 15, 20)
        for g in (1.0, 4.0, 7.5, 10.0)
    ]
    found = fit_cpr(runs, ridge=1e-12)
    for n, g in ((6, 2.0), (12, 9.0)):
        ours = [cpr_ratio(found.coef, i, n, g) for i in range(1, n + 1)]
        np.testing.assert_allclose(ours, [cpr_ratio(coef, i, n, g) for i in range(1, n + 1)], atol=1e-5)
    assert found.box == {"calls": [5.0, 20.0], "guidance": [1.0, 10.0]} and found.receipt["largest miss"] < 1e-5


def test_cpr_of_few_runs_is_tame_and_one_number_of_calls_has_none():
    runs = [(5, None, np.array([1, 1, 1.2, 1.1, 1.0])), (8, None, np.array([1, 1, 1.1, 1.2, 1.2, 1.1, 1.0, 1.0]))]
    assert fit_cpr(runs[:1]) is None
    found = fit_cpr(runs)
    assert all(0.8 < cpr_ratio(found.coef, i, n, 1.0) < 1.4 for n in (5, 6, 7, 8) for i in range(1, n + 1))


def test_cpr_serves_other_numbers_of_calls_inside_its_box_only():
    made = run(mixture_pipe(), 5, calls=[5, 8], held_out=8, pairs=2, grid="linspace", teacher_calls=10)
    config = mixture_pipe().scheduler.config
    scheduler = DCSolverScheduler.from_config(config, artifact=made)
    with pytest.raises(ArtifactError, match=r"5 calls .*8 calls .*[\s\S]*this run: 6 calls[\s\S]*cpr=True"):
        scheduler.set_timesteps(6)
    polynomial = DCSolverScheduler.from_config(config, artifact=made, cpr=True)
    polynomial.set_timesteps(6)
    assert len(polynomial.table) == 6
    with pytest.raises(ArtifactError, match=r"5 to 8 calls .*9 calls"):
        polynomial.set_timesteps(9)


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "heun"}, "unknown sampler 'heun'"),
        ({"objective": "last"}, "unknown objective 'last'"),
        ({"calls": [2]}, "more calls than dc_order"),
        ({"held_out": 4}, "8 held_out"),
        ({"eta": 0.5}, "takes no option 'eta'"),
        ({"batch": 0}, "batch of 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(OptionError, match=message):
        calibrate.dc(mixture_pipe(), ["0"], **{"calls": [4], "progress": False, **options})


def test_a_denoiser_with_a_cache_is_refused():
    pipe = models.load("tiny-sd")
    pipe.unet.__class__ = type("Cached", (type(pipe.unet),), {"is_cache_enabled": True})
    with pytest.raises(OptionError, match="cache enabled"):
        calibrate.dc(pipe, ["a"], calls=[4], progress=False)
