"""`calibrate.ems` through pipelines: what is measured, whether it helps, refusals, going on after a stop."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from mixture_pipe import mixture_pipe
from ranks_in_threads import as_ranks

import diffaccel
from diffaccel import calibrate
from diffaccel.artifact import Artifact
from diffaccel.calibrate.ems_choice import Setting
from diffaccel.calibrate.ems_import import imported
from diffaccel.calibrate.ems_probe import TrajectoryProbe, stat_nodes
from diffaccel.calibrate.ems_stats import moments_of, stacked
from diffaccel.calibrate.engine import Engine
from diffaccel.calibrate.validate import errors
from diffaccel.core.prediction import pair
from diffaccel.errors import ArtifactError, OptionError
from diffaccel.schedulers import DPMSolverV3Scheduler, TableScheduler
from diffaccel.schedulers.settings import output_of, path_of
from diffaccel.testing.pipelines import build, call_kwargs, denoiser

QUICK = {"progress": False, "batch": 64, "images": 192, "nodes": 60, "chosen_on": 32, "held_out": 64}


@pytest.fixture(scope="module")
def made():
    return calibrate.ems(mixture_pipe(), ["0"], calls=[6, 10], **QUICK)


# ---------------------------------------------------------------------- whether it helps
def test_on_a_mixture_the_statistics_help_at_ten_calls(made):
    found = made.receipt["10 calls"]["held-out error"]
    assert found["verdict"] == "helps" and found["high"] < 0
    assert found["calibrated_median"] < 0.7 * found["parent_median"]
    assert made.receipt["result"].startswith("helps at")
    assert made.receipt["10 calls"]["best stock scheduler"]["tried"] > 5
    assert made.tensors["l"].shape == (61, 2, 2, 2) and made.tensors["lam"].dtype == np.float64
    assert made.meta["options"]["reduce"] == "element" and made.meta["options"]["method"] == "difference"


def test_the_user_s_scheduler_has_the_error_that_was_promised(made, tmp_path):
    """The same noise through a scheduler built from the file; nothing of the calibration's machinery."""
    file = made.save(tmp_path / "ems.safetensors")
    pipe = mixture_pipe()
    scheduler = DPMSolverV3Scheduler.from_config(pipe.scheduler.config, artifact=str(file))
    best = made.meta["scheduler"]["by_calls"]["10"][0]
    assert scheduler.config.grid == "by_calls" and scheduler.config.sampler_options is None
    engine = Engine(pipe, ["0"], batch=64, progress=False)
    held = engine.batches(192 + 32, 64)[0]
    teacher = TableScheduler.from_config(
        pipe.scheduler.config, sampler="dpmpp", order=3, form="exact", grid="mid", grid_options={"w": 0.5}
    )
    target, ours = engine.run(held, teacher, 64), engine.run(held, scheduler, 10)
    assert {**scheduler.table.options, **best["options"]} == scheduler.table.options
    mean = errors(ours.numpy(), target.numpy()).mean()
    assert mean == pytest.approx(made.receipt["10 calls"]["held-out error"]["calibrated"], rel=1e-3)


def test_each_number_of_calls_has_its_setting_and_the_receipt_says_by_how_much(made):
    by_calls = made.meta["scheduler"]["by_calls"]
    assert set(by_calls) == {"6", "10"}
    for n, settings in by_calls.items():
        told = made.receipt[f"{n} calls"]["with statistics"]
        shown = [str(Setting({"grid": s["grid"], "grid_options": s["grid_options"]}, s["options"])) for s in settings]
        assert shown[0] == told["setting"] and len(shown) == told["tried"] == len(set(shown))
        if told["setting"] == told.get("best where it was chosen", told["setting"]):
            errors_ = [s["error"] for s in settings]
            assert errors_ == sorted(errors_) and errors_[0] == told["error where it was chosen"]["setting"]
            assert (told["verdict"] == "helps") == (told.get("held-out error", {"high": 0})["high"] < 0)
        else:
            assert shown[0] == told["default"] and told["held-out error"]["difference"] >= 0
    assert any(made.receipt[f"{n} calls"]["with statistics"]["verdict"] == "helps" for n in by_calls)
    kinds = [made.receipt["10 calls"][k]["held-out error"] for k in ("with statistics", "without")]
    assert made.receipt["10 calls"]["held-out error"]["calibrated"] == kinds[0]["calibrated"]
    assert made.receipt["10 calls"]["held-out error"]["parent"] in (kinds[1]["calibrated"], kinds[1]["parent"])


def test_a_setting_that_is_not_better_on_other_noise_is_not_kept():
    """The choice is made on noise of its own; an error that only those images have does not survive the others."""
    module = importlib.import_module("diffaccel.calibrate.ems_choice")
    config = TableScheduler.from_config(mixture_pipe().scheduler.config, grid="trailing").config
    assert str(module.default(config)) == "trailing, order=2, corrector=plus"

    class Lucky:
        """Errors of 16 images by setting: one is better than the others by `gain`."""

        def __init__(self, tag, gain, spread):
            self.tag, self.config, self.gain, self.spread = tag, config, gain, spread

        ranking = module.Trial.ranking

        def errors(self, setting, statistics, n):
            own = np.random.default_rng(len(str(setting))).normal(0, 0.01, 16)
            special = "uniform_lambda" in str(setting)
            return 0.3 + (own - own.mean()) * (self.spread if special else 1) - (self.gain if special else 0)

    cases = ((0.2, 1, "helps", True), (0.02, 10, "no benefit found", True), (-0.02, 10, "the default stays", False))
    for gain, spread, word, kept in cases:
        found = module.chosen(Lucky("choose", 0.2, 1), Lucky("valid", gain, spread), "none", 5)
        first = str(found.ranking[0][1])
        assert ("uniform_lambda" in first) == kept and found.receipt["setting"] == first
        assert word in found.receipt["verdict"] and ("no benefit" in found.receipt["verdict"]) == (word != "helps")
        assert found.errors.mean() == pytest.approx(0.3 - (gain if kept else 0))
        assert len(found.ranking) == found.receipt["tried"] == 10 + 7


def test_processes_share_the_choice_and_the_validation():
    few = {
        **QUICK,
        "batch": 64,
        "images": 8,
        "nodes": 6,
        "chosen_on": 4,
        "held_out": 9,
        "calls": [3],
        "teacher_calls": 8,
    }
    alone = calibrate.ems(mixture_pipe(), ["0"], **few)
    for made in as_ranks(2, lambda world: calibrate.ems(mixture_pipe(), ["0"], world=world, **few)):
        for name, values in alone.tensors.items():
            np.testing.assert_allclose(made.tensors[name], values, rtol=1e-4, atol=1e-5)
        found, expected = (m.receipt["3 calls"]["held-out error"] for m in (made, alone))
        assert found["images"] == 9 and found["calibrated"] == pytest.approx(expected["calibrated"], rel=1e-3)


def test_where_nothing_is_gained_the_receipt_says_so():
    """Statistics of one Gaussian are a poor guide to a few steps of another model: noise in, no benefit out."""
    pipe = mixture_pipe()
    made = calibrate.ems(pipe, ["0"], calls=[40], **{**QUICK, "images": 2, "nodes": 3, "ridge": 1e6})
    assert made.receipt["result"] == "no benefit found"
    assert made.receipt["40 calls"]["held-out error"]["verdict"] == "no benefit found"


@pytest.mark.parametrize("points", ["trajectory", "forward"])
def test_jvp_and_differences_agree_through_a_pipeline(points):
    few = {**QUICK, "images": 16, "nodes": 20, "chosen_on": 2, "held_out": 8, "calls": [2], "points": points}
    one, two = (calibrate.ems(mixture_pipe(), ["0"], method=m, **few) for m in ("jvp", "difference"))
    gap = np.abs(one.tensors["l"] - two.tensors["l"])
    assert gap.mean() < 2e-2 * np.abs(one.tensors["l"]).mean()  # the mixture is curved on the scale of delta
    np.testing.assert_allclose(one.tensors["l"].mean(), two.tensors["l"].mean(), rtol=5e-3)


# ---------------------------------------------------------------------- real pipelines
CASES = {"sd15": {}, "sd3": {}, "flux": {}}


def probed(name, method):
    """(moments, what step was given, the pipeline, nodes) of one run of a tiny pipeline."""
    pipe = build(name)
    call = {k: v for k, v in call_kwargs(name).items() if k not in ("prompt", "generator", "num_inference_steps")}
    call.pop("output_type", None)
    engine = Engine(pipe, ["a red fox"], call=call, batch=2, progress=False)
    config = TableScheduler.from_config(pipe.scheduler.config).config
    lams = np.linspace(-1.5, 1.5, 5)
    nodes, skip = stat_nodes(path_of(config), lams)
    batch = engine.batches(0, 2)[0]
    probe = TrajectoryProbe.probing(config, nodes, batch.seeds, method=method, reduce="element").begin(skip, lams)
    seen = []
    step = TrajectoryProbe.step

    def recorded(self, output, t, sample, *args, **kwargs):
        seen.append((output, sample))
        return step(self, output, t, sample, *args, **kwargs)

    probe.step = recorded.__get__(probe)
    return (
        importlib.import_module("diffaccel.calibrate.ems")._run(engine, batch, probe, method),
        seen,
        pipe,
        (nodes, skip, lams, config),
    )


@pytest.mark.parametrize("name", CASES)
def test_any_pipeline_is_measured_at_its_scheduler(name):
    """What is accumulated is what step was handed: differences of the pipeline's own outputs, packed or guided."""
    found, seen, _, (nodes, skip, lams, config) = probed(name, "difference")
    assert len(seen) == skip + 2 * len(lams)
    entries = []
    for k in range(len(lams)):
        node, (out, x), (out_v, x_v) = nodes[skip + k], seen[skip + 2 * k], seen[skip + 2 * k + 1]
        u, w = pair(output_of(config), "eps", node)
        eps, eps_v = (u * a.double() + w * b.double() for a, b in ((x, out), (x_v, out_v)))
        move = x_v.double() - x.double()
        size = 0.01 * np.hypot(node.alpha, node.sigma)
        assert torch.allclose(move.abs(), torch.full_like(move, size), rtol=1e-3)
        entries.append((node.sigma * move * (eps_v - eps) / size**2, x.double() / node.alpha, eps))
    eps = np.stack([e[2].numpy() for e in entries])
    slopes = np.gradient(eps, lams, axis=0, edge_order=2)
    level = np.exp(-lams)
    direct = stacked(
        [
            moments_of(l, (y, level[k] * e, level[k] * torch.from_numpy(slopes[k])), "element")
            for k, (l, y, e) in enumerate(entries)
        ]
    )
    for key in direct:
        np.testing.assert_allclose(found[key], direct[key], rtol=1e-5, atol=1e-5 * np.abs(direct[key]).max())


def test_what_step_is_handed_is_a_direct_call_of_the_guided_denoiser():
    _, seen, pipe, (nodes, skip, _, _) = probed("sd15", "difference")
    out, x = seen[skip]
    both = pipe.encode_prompt(["a red fox"] * 2, "cpu", 1, True)
    text = torch.cat([both[1], both[0]])
    with torch.no_grad():
        t = torch.tensor(nodes[skip].t, dtype=torch.float32)
        raw = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=text).sample
    free, told = raw.chunk(2)
    torch.testing.assert_close(out, free + 4.0 * (told - free), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_forward_differentiation_goes_through_the_whole_pipeline(name):
    """Dual numbers pass guidance, packing and attention; the derivative is that of small differences."""
    a, seen, pipe, _ = probed(name, "jvp")
    b, *_ = probed(name, "difference")
    assert np.abs(a["l"] - b["l"]).max() < 0.02 * max(1.0, np.abs(b["l"]).max())
    assert not any(m._forward_pre_hooks for m in pipe.components.values() if isinstance(m, torch.nn.Module))
    assert all(not isinstance(v, torch.Tensor) or v.grad_fn is None for v in seen[-1])


@pytest.mark.parametrize(("name", "unguided"), [("sd15", True), ("flux", False)])
def test_forward_points_are_taken_without_guidance(name, unguided):
    """Images are made with the pipeline's guidance; at the points around them the model sees each state once."""
    module = importlib.import_module("diffaccel.calibrate.ems")
    pipe = build(name)
    engine = Engine(pipe, ["a"], call={"height": 32, "width": 32}, batch=2, progress=False)
    config = TableScheduler.from_config(pipe.scheduler.config).config
    sizes = []
    hook = denoiser(pipe).register_forward_pre_hook(
        lambda m, args, kwargs: sizes.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    lams = np.linspace(-1, 1, 3)
    found = module._forward(engine, engine.batches(0, 2)[0], config, lams, "difference", "scalar", None)
    hook.remove()
    assert found["l"].shape == (3,) and np.isfinite(found["m2"]).all()
    made, points = sizes[: module.CLEAN_CALLS], sizes[module.CLEAN_CALLS :]
    assert len(points) == 9 and set(points) == {2}
    assert set(made) == ({4} if unguided else {2})
    assert engine.guidance is None and "guidance_scale" not in engine.call


# ---------------------------------------------------------------------- stopping
def test_stopped_anywhere_it_goes_on_to_the_same_artifact(tmp_path, monkeypatch):
    few = {**QUICK, "batch": 4, "images": 12, "nodes": 6, "chosen_on": 4, "held_out": 8, "calls": [2]}
    few["teacher_calls"] = 8
    whole = calibrate.ems(mixture_pipe(), ["0"], **few, out=tmp_path / "a.safetensors")
    run, count = Engine.run, [0]

    def failing(self, *args, **kwargs):
        count[0] += 1
        if count[0] % 5 == 0:
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "run", failing)
    stops, got = 0, None
    while got is None:
        try:
            got = calibrate.ems(mixture_pipe(), ["0"], **few, out=tmp_path / "b.safetensors")
        except KeyboardInterrupt:
            stops += 1
            assert (tmp_path / "b.safetensors.partial").exists()
    assert stops > 3 and not (tmp_path / "b.safetensors.partial").exists()
    for key, value in whole.tensors.items():
        np.testing.assert_array_equal(got.tensors[key], value)
    for side in (whole, got):
        side.meta["cost"].pop("seconds")
        side.meta["receipt"]["cost"].pop("seconds")
    assert got.meta == whole.meta
    assert Artifact.load(tmp_path / "b.safetensors", "ems").tensors.keys() == whole.tensors.keys()


# ---------------------------------------------------------------------- sizes, refusals, imports
def test_statistics_by_channel_serve_every_size(made, tmp_path):
    few = {**QUICK, "images": 8, "nodes": 6, "chosen_on": 2, "held_out": 8, "calls": [2]}
    pipe = build("sd15")
    call = {"guidance_scale": 2.0, "height": 32, "width": 32}
    by = {
        reduce: calibrate.ems(pipe, ["a"], **{**few, "batch": 8, "call": call, "reduce": reduce, "nodes": 3})
        for reduce in ("channel", "element")
    }
    assert by["channel"].tensors["l"].shape[1:] == (4, 1, 1)
    pipe.scheduler = DPMSolverV3Scheduler.from_config(pipe.scheduler.config, artifact=by["channel"])
    wide = {**call, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    assert torch.isfinite(pipe("a", **wide).images).all()
    pipe.scheduler = DPMSolverV3Scheduler.from_config(pipe.scheduler.config, artifact=by["element"])
    with pytest.raises(ArtifactError, match="reduce='channel'"):
        pipe("a", **wide)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduce": "pixel"}, "reduce"),
        ({"points": "random"}, "points"),
        ({"method": "autograd"}, "method"),
        ({"images": 1}, "needs 2 nodes, 2 images"),
        ({"calls": []}, r"calls=\[\]"),
        ({"lam_range": (2.0, -2.0)}, "lam_range"),
        ({"lam_range": (-9.0, 2.0)}, "training range"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_call(options, words):
    with pytest.raises(OptionError, match=words):
        calibrate.ems(mixture_pipe(), ["0"], **{**QUICK, **options})


def test_published_statistics_are_read_with_the_user_s_range(tmp_path):
    rng = np.random.default_rng(0)
    l, s, b = rng.standard_normal((3, 11, 2, 2, 2)).astype(np.float32)
    np.savez(tmp_path / "l.npz", l=l)
    with pytest.raises(OptionError, match=r"sb\.npz is missing"):
        imported(tmp_path, path=diffaccel.Path.vp_linear(), prediction_type="epsilon", t_start=1.0, t_end=1e-3)
    np.savez(tmp_path / "sb.npz", s=s, b=b)
    path = path_of(TableScheduler().config)
    made = imported(tmp_path, path=path, prediction_type="epsilon", t_start=999, t_end=0, guidance=7.5)
    np.testing.assert_array_equal(made.tensors["s"], s)
    assert made.tensors["lam"][[0, -1]] == pytest.approx([path.first.lam, path.last.lam])
    scheduler = DPMSolverV3Scheduler(artifact=made)
    scheduler.set_timesteps(5)
    x = torch.ones(1, 2, 2, 2)
    assert torch.isfinite(scheduler.step(x, scheduler.timesteps[0], x).prev_sample).all()
    with pytest.raises(OptionError, match="noisier"):
        imported(tmp_path, path=path, prediction_type="epsilon", t_start=0, t_end=999)
