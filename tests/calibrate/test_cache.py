"""calibrate.cache: what is measured against runs that do the same, what is kept, what it serves, what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import diffaccel as da
from diffaccel import calibrate, models
from diffaccel.artifact import Artifact
from diffaccel.calibrate.cache_measure import Measure, Measurement, sources
from diffaccel.calibrate.cache_runs import Runs
from diffaccel.calibrate.engine import Engine
from diffaccel.calibrate.schedule import every, intervals, letters
from diffaccel.calibrate.watched import watched
from diffaccel.cli import main
from diffaccel.denoiser.cache import Cache
from diffaccel.denoiser.cache_attach import cached
from diffaccel.denoiser.quant import Quant
from diffaccel.errors import ArtifactError, OptionError

STEPS, FULL = 10, 4
FEW = {"images": 2, "select": 4, "fit": 8, "held_out": 8, "thresholds": (0.1, 0.3), "progress": False, "guidance": 1.0}


@pytest.fixture(scope="module")
def pipe():
    found = models.load("tiny-sd")
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def made(pipe, tmp_path_factory):
    file = tmp_path_factory.mktemp("calibrated") / "cache.safetensors"
    found = calibrate.cache(pipe, models.prompts(32), calls=STEPS, full=FULL, out=file, **FEW)
    assert Artifact.load(file, "cache") == found
    return found


def engine(pipe, guidance=1.0):
    return Engine(pipe, models.prompts(32), guidance=guidance, batch=4, progress=False)


def runs_of(pipe, settings):
    return Runs(engine(pipe), copy.deepcopy(pipe.scheduler), STEPS, settings)


# ---------------------------------------------------------------------- what is measured
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_errors_and_what_arrives_are_those_of_real_runs(pipe, guidance):
    """A run that is full but at step j makes the measured error there, and nearly the predicted one at the end."""
    e, settings = engine(pipe, guidance), Cache("mask", forecast=1, level="deep")
    measure = Measure(e, pipe.scheduler, STEPS, settings, window=3)
    (batch,) = e.batches(0, 4)
    found, record = measure(batch), measure.record(batch)
    for j in (3, 6, 8):
        mask = tuple(int(i != j) for i in range(STEPS))
        seen = []
        with cached(pipe, replace(Cache.mask(mask), forecast=1, level="deep")):
            scheduler = watched(pipe.scheduler, lambda i, x, seen=seen: (seen.append(x), x)[1])
            last = e.run(batch, scheduler, STEPS)
        error = (seen[j] - record.guided[j]).double()
        assert float(error.square().mean()) == pytest.approx(found.errors[j - 2, j - 1, j], rel=1e-3)
        away = (last - record.states[-1]).double().flatten(1).square().sum(1)
        assert float((away / error.flatten(1).square().sum(1)).mean()) == pytest.approx(found.arriving[j], rel=0.35)


def test_every_pair_of_full_steps_within_the_window_is_measured(pipe):
    e = engine(pipe)
    (batch,) = e.batches(0, 2)
    for forecast in (0, 1):
        measure = Measure(e, pipe.scheduler, 6, Cache("mask", forecast=forecast, level="deep"), window=3)
        before = e.calls
        found = measure(batch)
        known = ~np.isnan(found.errors)
        for p, l, j in np.ndindex(6, 6, 6):
            if forecast == 0:
                assert known[p, l, j] == (p <= l < j < l + 3 and p <= l), (p, l, j)
            else:
                within = l < j < l + 3 and (p < l <= p + 3 or p == l == 0)
                assert known[p, l, j] == within, (p, l, j)
        # full record 6, partial passes 2 behind x 3 gaps (or 1), nudged runs 4 + 3 + 2 + 1; of 2 images
        assert e.calls - before < 2 * (6 + (6 if forecast else 2) * 6 + 10)


def test_sources():
    assert sources(4, 1, 2) == (1, 3) and sources(4, 2, None) == (2, 2)
    assert sources(2, 2, 3) == (0, 0)  # nothing lies before step 0: its value is reused
    assert sources(2, 1, 2) is None and sources(1, 2, 1) is None


def test_measurements_of_batches_add(pipe):
    rng = np.random.default_rng(0)
    a, b = (Measurement(rng.random((3, 3, 3)), rng.random(3), rng.random(3), n) for n in (2, 6))
    both = Measurement.of({k: a.tensors()[k] + b.tensors()[k] for k in a.tensors()})
    np.testing.assert_allclose(both.errors, (a.errors + 3 * b.errors) / 4)
    assert both.images == 8


# ---------------------------------------------------------------------- what is kept
def test_the_kept_mask_is_no_worse_than_any_interval_of_as_many_full_steps(pipe, made):
    (learned,) = [r for r in made.meta["runs"] if r["learned"]]
    runs = runs_of(pipe, Cache("mask", forecast=1, level="deep"))
    images = runs.images("s", FEW["images"], FEW["select"])  # chosen on these; nothing was measured on them

    def error(mask):
        return float(np.sqrt(np.mean(runs.errors(images, runs.masked(mask)) ** 2)))

    kept = tuple(learned["mask"])
    assert sum(kept) == FULL == learned["full"] and kept[0] == 1
    rivals = {mask: error(mask) for mask in intervals(STEPS, FULL) if sum(mask[: mask.index(0)]) >= 1}
    assert rivals and error(kept) <= min(rivals.values()) + 1e-9
    told = made.receipt[learned["name"]]["choice (root mean square error)"]
    assert told["kept"].startswith(letters(kept)) and "coefficients" in " ".join(told)


def test_the_pipeline_is_left_as_it_was(pipe, made):
    assert not any(hasattr(m, "_diffusers_hook") for m in pipe.unet.modules())
    assert not pipe.unet._forward_pre_hooks and made.meta["key"]["number of model calls a step"] == 1
    assert "step" not in vars(pipe.scheduler)


def test_the_receipt_compares_with_plain_runs(made):
    for run in made.meta["runs"]:
        receipt = made.receipt[run["name"]]
        plain = [key for key in receipt if key.startswith("held-out error, plain")]
        assert len(plain) == 2 and any("as many full calls" in key for key in plain)
        against = receipt[next(key for key in plain if "->" in key)]
        assert (against["verdict"] == "helps") == run["benefit"]
        assert receipt["plain calls that take as long"] > 0
        assert run["compensated"] == (f"gain_{made.meta['runs'].index(run)}" in made.tensors)
    assert ("no benefit found" in made.receipt["result"]) == (not any(r["benefit"] for r in made.meta["runs"]))


def test_the_receipt_tells_what_thresholds_do(pipe, made):
    told = made.receipt["first_block"]
    quartiles = [float(q) for q in told["quartiles of d"].split()]
    assert quartiles == sorted(quartiles) and told["nothing is reused below"] == pytest.approx(quartiles[0], rel=0.01)
    low, high = told["nothing is reused below"] * 0.99, told["nothing is reused below"] * 1.01
    runs = runs_of(pipe, Cache("mask", forecast=1, level="deep"))
    images = runs.images("s", FEW["images"], FEW["select"])
    found = runs.thresholds(images, (low, high))
    assert found[f"{low:g}"].startswith(f"error 0.0000, {STEPS}.0 of") and "CLIFF" not in found[f"{low:g}"]
    assert f"{STEPS}.0 of" not in found[f"{high:g}"]


def test_a_stopped_calibration_goes_on_to_the_same_artifact(pipe, made, tmp_path, monkeypatch):
    file, own, tries = tmp_path / "cache.safetensors", Runs.compensate, []

    def stop(self, *args):
        tries.append(args)
        if len(tries) == 2:
            raise KeyboardInterrupt
        return own(self, *args)

    monkeypatch.setattr(Runs, "compensate", stop)
    settings = {"calls": STEPS, "full": FULL, "out": file, **FEW}
    with pytest.raises(KeyboardInterrupt):
        calibrate.cache(pipe, models.prompts(32), **settings)
    assert not file.exists() and (tmp_path / "cache.safetensors.partial").exists()
    before = len(tries)
    again = calibrate.cache(pipe, models.prompts(32), **settings)
    assert len(tries) == before + 2 and not (tmp_path / "cache.safetensors.partial").exists()
    assert again.meta["mask"] == made.meta["mask"] and again.meta["key"] == made.meta["key"]
    assert again.tensors.keys() == made.tensors.keys()
    for name, values in made.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], values)


# ---------------------------------------------------------------------- what it serves
def run(pipe, cache, made, steps=STEPS, guidance=1.0, **call):
    generator = [torch.Generator().manual_seed(s) for s in (900, 901)]
    with da.quant_cache(pipe, cache=cache, artifact=made) as h:
        out = h(models.prompts(2), num_inference_steps=steps, guidance_scale=guidance, generator=generator,
                output_type="latent", **call).images  # fmt: skip
        return out, h.report()


def test_quant_cache_runs_what_was_learned(pipe, made):
    out, report = run(pipe, Cache.learned(made, force=True), made)
    assert report.cache.decisions["0"][0] == letters(tuple(made.meta["mask"]))
    assert out.isfinite().all()


def test_a_fixed_policy_is_found_by_its_decisions(pipe, made):
    number = [r["learned"] for r in made.meta["runs"]].index(False)
    _, report = run(pipe, Cache.every(3, forecast=1), made)
    assert (report.gains is not None) == made.meta["runs"][number]["compensated"]
    with pytest.raises(ArtifactError, match=r"not calibrated for every\(2"):
        run(pipe, Cache.every(2, forecast=1), made)


@pytest.mark.parametrize(("what", "change"), [("guidance", {"guidance": 3.0}), ("shape", {"height": 48, "width": 48})])
def test_another_setting_is_refused_by_name(pipe, made, what, change):
    with pytest.raises(ArtifactError, match=f"another {what}"):
        run(pipe, Cache.every(3, forecast=1), made, **change)


def test_another_grid_scheduler_or_checkpoint_is_refused_by_name(pipe, made):
    own = pipe.scheduler
    try:
        pipe.scheduler = type(own).from_config(own.config, timestep_spacing="leading")
        with pytest.raises(ArtifactError, match="another scheduler config"):
            run(pipe, Cache.every(3, forecast=1), made)
        pipe.scheduler = da.TableScheduler.from_config(own.config, sampler="ddim")
        with pytest.raises(ArtifactError, match="another scheduler"):
            run(pipe, Cache.every(3, forecast=1), made)
    finally:
        pipe.scheduler = own
    with pytest.raises(ArtifactError, match="another model"):
        other = models.load("tiny-sd")
        with torch.no_grad():
            other.unet.conv_out.bias.add_(0.5)
        run(other, Cache.every(3, forecast=1), made)


# ---------------------------------------------------------------------- whether it helps
def test_forecast_and_compensation_beat_plain_runs_of_equal_work(pipe):
    """Work is counted in multiplications, so that the machine plays no part."""
    steps, images = 24, 16
    cache = Cache.every(3, forecast=1)
    runs = Runs(engine(pipe), copy.deepcopy(pipe.scheduler), steps, Cache("mask", forecast=1, level="deep"))
    runs.engine.batch = images
    fit, held = runs.share(0, images), runs.images("held", images, images)

    def work(mask):
        counter = FlopCounterMode(display=False)
        with cached(pipe, replace(Cache.mask(mask), forecast=0)), counter:
            runs.engine.run(held.batches[0], copy.deepcopy(pipe.scheduler), len(mask))
        return counter.get_total_flops()

    ones = work((1, 1))
    partial = work((1, 0)) - ones / 2
    full = sum(every(steps, 3, 3, 1))
    equal = int(np.ceil(full + (steps - full) * partial / (ones / 2)))
    assert full < equal < steps
    compensation = runs.compensate(fit, runs.trajectory(fit), cache, "std")
    cheap, mine = runs.plain_errors(held, equal) ** 2, runs.errors(held, cache, compensation) ** 2
    assert mine.mean() < 0.7 * cheap.mean()


def test_with_quantisation_the_pipeline_comes_back_in_float(tmp_path):
    pipe = models.load("tiny-flow")
    weights = {name: p for name, p in pipe.transformer.named_parameters()}  # noqa: C416
    before = {name: p.clone() for name, p in weights.items()}
    made = calibrate.cache(
        pipe, models.prompts(32), calls=6, full=(), cache=Cache.every(2, 2, 0, forecast=0),
        quant=Quant("w8a8", min_features=128), call=models.CALL_DEFAULTS["tiny-flow"], **FEW,
    )  # fmt: skip
    assert made.meta["quant"]["mode"] == "w8a8" and "mask" not in made.meta
    assert made.meta["key"]["quantisation"]["layers"] == made.meta["quant"]["layers"]
    assert all(p is weights[name] and torch.equal(p, before[name]) for name, p in pipe.transformer.named_parameters())
    with pytest.raises(ArtifactError, match="no learned mask"):
        Cache.learned(made)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "c.safetensors"
    few = [f"--set={k}={v}" for k, v in FEW.items() if k != "guidance"]
    command = ["calibrate", "cache", "tiny-sd", "--out", str(out), "--calls", "6", "--guidance", "1", "--cpu", *few]
    assert main([*command, "--set", "full=()", "--set", "forecast=0"]) == 0
    assert "every(2, warmup=3, tail=1)" in capsys.readouterr().out
    assert Artifact.load(out, "cache").meta["key"]["steps"] == 6
    assert main([*command, "--set", "forecast=2"]) == 2
    assert "order 0 and 1" in capsys.readouterr().err


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"forecast": 2}, "order 0 and 1"),
        ({"full": 10}, "1 to 9"),
        ({"held_out": 7}, "8 held_out"),
        ({"fit": 7}, "8 to fit on"),
        ({"compensation": "affine"}, "compensation"),
        ({"cache": Cache.first_block(0.1)}, "decides during the run"),
        ({"full": (), "cache": ()}, "nothing to calibrate"),
        ({"full": (), "compensation": "none"}, "nothing to calibrate"),
        ({"calls": (10, 20)}, "one number of calls"),
        ({"calls": 8, "cache": Cache.every(3)}, "up to 8 steps an interval of 2"),
    ],
)
def test_refusals(pipe, options, text):
    with pytest.raises(OptionError, match=text):
        calibrate.cache(pipe, models.prompts(4), **{"calls": STEPS, **FEW, **options})
