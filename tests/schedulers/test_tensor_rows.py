"""`step()` with coefficients of a sample's shape: DPM-Solver-v3 with statistics, in every precision and place."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scheduler_runs import PATHS, loop, model, noise

from diffaccel import DPMSolverV3Scheduler
from diffaccel.artifact import Artifact, path_identity
from diffaccel.core.prediction import Prediction, convert
from diffaccel.errors import ArtifactError, OptionError
from diffaccel.schedulers.settings import output_of, path_of

SHAPE = (2, 6, 4)


def artifact(path="sd15", shape=SHAPE, span=(-11.0, 9.0)):
    """Some statistics, as a file would hold them."""
    settings = DPMSolverV3Scheduler(**PATHS[path], sampler_options={"statistics": "none"}).config
    rng, lam = np.random.default_rng(0), np.linspace(*span, 41)
    l, s, b = (rng.standard_normal((41, *shape)).astype(np.float32) for _ in range(3))
    tensors = {"lam": lam, "l": 1 / (1 + np.exp(lam.reshape(-1, *[1] * len(shape)))) + 0.05 * l, "s": -0.5 + 0.2 * s}
    tensors = {k: v if k == "lam" else v.astype(np.float32) for k, v in tensors.items()} | {"b": 0.05 * b}
    return Artifact("ems", tensors, {"path": path_identity(path_of(settings), settings["prediction_type"])})


def scheduler(path="sd15", shape=SHAPE, **options):
    return DPMSolverV3Scheduler(**PATHS[path], artifact=artifact(path, shape), sampler_options=options)


def by_table(made, x):
    """The last state by the table itself."""
    kind = output_of(made.config)

    def predict(state, node, space):
        return convert(Prediction(model(state, node.t), kind.kind, kind.sigma_data), space, state, node)

    return made.table.apply(x, predict)


@pytest.mark.parametrize("path", ["sd15", "zero_snr", "cosine", "flow"])
@pytest.mark.parametrize("shape", [SHAPE, (2, 1, 1), ()])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_step_is_the_table(path, shape, order):
    made = scheduler(path, shape, order=order)
    made.set_timesteps(7)
    assert made.table.scalar == (shape == ())
    x = noise(3, *SHAPE, dtype=torch.float64)
    want = by_table(made, x)
    torch.testing.assert_close(loop(made, x), want, rtol=1e-10, atol=1e-10)
    made.set_timesteps(7)
    torch.testing.assert_close(loop(made, x.float()), want.float(), rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype):
    made = scheduler()
    made.set_timesteps(5)
    x = noise(2, *SHAPE).to(dtype)
    out = made.step(torch.zeros_like(x), made.timesteps[0], x).prev_sample
    assert out.dtype is dtype and torch.isfinite(out).all()


def test_a_run_begins_anywhere_and_a_copy_goes_on_as_the_original():
    made, x = scheduler(order=3), noise(2, *SHAPE)
    made.set_timesteps(8)
    made.set_begin_index(3)
    first = made.step(model(x, 400), made.timesteps[3], x).prev_sample
    twin = copy.deepcopy(made)
    for t in made.timesteps[4:]:
        ours, theirs = (s.step(model(first, t), t, first).prev_sample for s in (made, twin))
        assert torch.equal(ours, theirs)
        first = ours
    made.set_timesteps(8)
    whole = loop(made, x)
    made.set_timesteps(8)
    assert torch.equal(loop(made, x), whole)


def test_saved_beside_the_config_and_read_again(tmp_path):
    made = scheduler(order=3, corrector="same")
    made.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"scheduler_config.json", "ems.safetensors"}
    again = DPMSolverV3Scheduler.from_pretrained(tmp_path)
    for s in (made, again):
        s.set_timesteps(6)
    assert made.table == again.table and again.config.sampler_options == {"order": 3, "corrector": "same"}
    assert "<Ems: 41 nodes" in made.explain()


def test_statistics_must_be_named_and_must_fit():
    with pytest.raises(ArtifactError, match=r"diffaccel calibrate ems MODEL(.|\n)*statistics=\"none\""):
        DPMSolverV3Scheduler(**PATHS["sd15"])
    with pytest.raises(ArtifactError, match="another path"):
        DPMSolverV3Scheduler(**PATHS["flow"], artifact=artifact("sd15"))
    made = scheduler()
    made.set_timesteps(4)
    with pytest.raises(ArtifactError, match=r"\(2, 6, 4\).*\(2, 8, 8\)"):
        made.step(noise(1, 2, 8, 8), made.timesteps[0], noise(1, 2, 8, 8))


def test_a_policy_changes_x0_before_the_row():
    """Clamped x0: with l = 1 everywhere the row combines x0 itself, so the state is that of the plain sampler."""
    clip = {"clip_sample": True, "clip_sample_range": 0.3}
    found = artifact()
    ones = {**found.tensors, "l": np.ones_like(found.tensors["l"]), "s": 0 * found.tensors["s"]}
    ones["b"] = 0 * ones["s"]
    same = Artifact("ems", ones, found.meta)
    tensors = DPMSolverV3Scheduler(**PATHS["sd15"], artifact=same, **clip)
    plain = DPMSolverV3Scheduler(**PATHS["sd15"], sampler_options={"statistics": "none"}, **clip)
    x = noise(2, *SHAPE, dtype=torch.float64)
    for s in (tensors, plain):
        s.set_timesteps(6)
    assert not tensors.table.scalar or tensors.table == plain.table
    torch.testing.assert_close(loop(tensors, x), loop(plain, x), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------- samples of another size
@pytest.mark.parametrize("path", ["sd15", "flow"])
def test_resampled_statistics_are_those_of_the_run_s_size(path):
    """The same rows as with statistics interpolated beforehand; the calibrated size runs as it did; begun anywhere."""
    made, held = scheduler(path, (2, 8, 8), order=3, resample="bilinear"), artifact(path, (2, 8, 8))
    for size, begin in (((12, 6), 0), ((8, 8), 0), ((4, 4), 2), ((12, 6), 0)):
        parts = {
            k: v
            if k == "lam"
            else torch.nn.functional.interpolate(
                torch.tensor(v), size=size, mode="bilinear", align_corners=False
            ).numpy()
            for k, v in held.tensors.items()
        }
        fitting = DPMSolverV3Scheduler(
            **PATHS[path], artifact=Artifact("ems", parts, held.meta), sampler_options={"order": 3}
        )
        x, states = noise(2, 2, *size), []
        for s in (made, fitting):
            s.set_timesteps(6)
            s.set_begin_index(begin)
            state = x
            for t in s.timesteps[begin:]:
                state = s.step(model(state, t), t, state).prev_sample
            states.append(state)
        torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4 * float(x.abs().max()))
        assert ("resampled" in made.explain()) == (size != (8, 8))


def test_resampling_is_asked_for_and_only_where_it_does_something(tmp_path):
    plain = scheduler(shape=(2, 8, 8))
    plain.set_timesteps(4)
    with pytest.raises(ArtifactError, match=r"reduce='channel'.*resample='bilinear'"):
        plain.step(noise(1, 2, 4, 4), plain.timesteps[0], noise(1, 2, 4, 4))
    with pytest.raises(OptionError, match="no effect"):
        scheduler(shape=(2, 1, 1), resample="bilinear").set_timesteps(4)
    with pytest.raises(OptionError, match="unknown resample 'cubic'"):
        scheduler(resample="cubic").set_timesteps(4)
    made = scheduler(shape=(2, 8, 8), resample="bilinear")
    made.save_pretrained(tmp_path)
    again = DPMSolverV3Scheduler.from_pretrained(tmp_path)
    again.set_timesteps(4)
    with pytest.raises(OptionError, match="serve samples"):
        again.step(noise(1, 3, 4, 4), again.timesteps[0], noise(1, 3, 4, 4))
    again.set_timesteps(4)
    x = noise(1, 2, 4, 4)
    first = again.step(x, again.timesteps[0], x).prev_sample
    assert first.shape == x.shape
    bigger = noise(1, 2, 8, 8)  # a pipeline that changes the size between two calls
    state = again.step(bigger, again.timesteps[1], bigger).prev_sample
    assert state.shape == bigger.shape and torch.isfinite(state).all()
