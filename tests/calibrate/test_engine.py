"""The engine of calibrations: what it captures is what the denoiser computed, and the pipeline is left as it was."""

from __future__ import annotations

import importlib
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from mixture_pipe import mixture_pipe

import diffaccel as da
from diffaccel import models
from diffaccel.calibrate.captured import Captured
from diffaccel.calibrate.checkpoint import Checkpoint
from diffaccel.calibrate.engine import Engine
from diffaccel.calibrate.validate import FEWEST, Verdict, best_stock, ends, errors, verdict
from diffaccel.calibrate.watched import watched
from diffaccel.errors import ArtifactError, OptionError
from diffaccel.parallel.protocol import SoloWorld
from diffaccel.testing.pipelines import build, call_kwargs, denoiser


def engine_of(name, batch=2, **more):
    pipe, given = build(name), call_kwargs(name)
    keep = ("height", "width", "max_sequence_length", "true_cfg_scale", "negative_prompt", "use_resolution_binning")
    call = {k: v for k, v in given.items() if k in (*keep, "clean_caption")}
    more.setdefault("guidance", given.get("guidance_scale"))
    return Engine(pipe, ["a red fox", "a hat"], call=call, batch=batch, progress=False, **more)


# ---------------------------------------------------------------------- what is captured
@pytest.mark.parametrize(("name", "guided"), [("sd15", True), ("sd3", True), ("flux", False)])
def test_the_output_is_the_denoisers_own_after_guidance(name, guided):
    engine = engine_of(name)
    seen, raw = [], []
    hook = denoiser(engine.pipe).register_forward_hook(lambda m, a, out: raw.append(out[0].detach().clone()))
    scheduler = Captured.of(engine.pipe.scheduler.config, "unipc", see=lambda i, x, out, z: seen.append((i, x, out, z)))
    engine.run(engine.batches(0, 2)[0], scheduler, 3)
    hook.remove()
    assert [i for i, *_ in seen] == [0, 1, 2] and len(raw) == 3
    for (_, x, out, _), found in zip(seen, raw):
        if guided:
            empty, text = found.chunk(2)
            found = empty + engine.guidance * (text - empty)
        torch.testing.assert_close(out, found, rtol=1e-5, atol=1e-5)
        assert out.shape == x.shape
    for (_, _, _, z), (_, x, _, _) in pairwise(seen):
        assert torch.equal(z, x)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_one_call_at_a_node_is_the_call_of_the_run(name):
    engine = engine_of(name)
    seen = []
    scheduler = Captured.of(engine.pipe.scheduler.config, "dpmpp", see=lambda i, x, out, z: seen.append((x, out)))
    batch = engine.batches(0, 2)[0]
    engine.run(batch, scheduler, 4)
    config = engine.pipe.scheduler.config
    start, first = engine.output(batch, scheduler.nodes[0], None, config)
    torch.testing.assert_close(start.float(), seen[0][0], rtol=0, atol=0)
    torch.testing.assert_close(first.float(), seen[0][1], rtol=1e-5, atol=1e-5)
    for k in (1, 3):
        _, out = engine.output(batch, scheduler.nodes[k], seen[k][0], config)
        torch.testing.assert_close(out.float(), seen[k][1], rtol=1e-5, atol=1e-5)


def test_a_pipeline_that_takes_no_state_is_refused():
    with pytest.raises(OptionError, match=r"DiTPipeline takes no latents="):
        Engine(build("dit"), ["1", "2"], progress=False)


def test_edm_states_are_handed_over_unscaled():
    """EDM pipelines multiply start noise by init_noise_sigma; a state that is handed in must stay as it is."""
    from diffusers import EDMEulerScheduler

    pipe = mixture_pipe()
    pipe.scheduler = EDMEulerScheduler()
    engine = Engine(pipe, ["0"], batch=2, progress=False)
    batch, seen = engine.batches(0, 2)[0], []
    scheduler = Captured.of(pipe.scheduler.config, "ddim", see=lambda i, x, o, z: seen.append(x))
    pipe.unet.forward = lambda sample, t, class_labels=None, return_dict=True: (0.5 * sample,)
    engine.run(batch, scheduler, 3)
    assert float(seen[0].std()) > 10
    x, out = engine.output(batch, scheduler.nodes[1], seen[1], pipe.scheduler.config)
    torch.testing.assert_close(x, seen[1].double(), rtol=0, atol=0)
    assert float(out.abs().max()) < float(x.abs().max())  # the model saw x / sqrt(sigma^2 + sigma_data^2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    engine = Engine(models.load("tiny-sd", torch_dtype=dtype), ["a red bag"], guidance=4.0, batch=2, progress=False)
    batch, seen = engine.batches(0, 2)[0], []
    scheduler = Captured.of(engine.pipe.scheduler.config, "unipc", see=lambda i, x, o, z: seen.append((x, o)))
    engine.run(batch, scheduler, 2)
    assert {t.dtype for pair in seen for t in pair} == {dtype}
    x, out = engine.output(batch, scheduler.nodes[1], seen[1][0].double(), engine.pipe.scheduler.config)
    assert torch.equal(x, seen[1][0].double()) and torch.isfinite(out).all()


def test_the_scale_is_what_the_run_has():
    assert engine_of("sd15", guidance=None).scale == 7.5
    pipe = build("sd15")
    engine = Engine(pipe, ["a"], call={"guidance_scale": 1.0}, progress=False)
    assert engine.guidance == engine.scale == 1.0 and not engine.own
    engine.guide(3.0)
    assert engine.call == {"guidance_scale": 3.0}
    with pytest.raises(OptionError, match=r"guidance=2.0 and guidance_scale=1.0 say the same"):
        Engine(pipe, ["a"], guidance=2.0, call={"guidance_scale": 1.0}, progress=False)
    with pytest.raises(OptionError, match=r"guidance must be one number, got \[4, 7\]"):
        Engine(pipe, ["a"], guidance=[4, 7], progress=False)


def test_guidance_is_true_guidance_where_the_model_knows_no_other():
    pipe, seen = build("qwen_image"), []
    size = {"height": 32, "width": 32}
    engine = Engine(pipe, ["a red fox", "a hat"], guidance=4.0, call=size, batch=2, progress=False)
    hook = denoiser(pipe).register_forward_hook(lambda *_: seen.append(1))
    batch, config = engine.batches(0, 2)[0], pipe.scheduler.config
    guided = engine.run(batch, Captured.of(config, "ddim"), 2)
    assert len(seen) == 4 and engine.scale == 4.0 and engine.call["negative_prompt"] == " "
    plain = Engine(pipe, ["a red fox", "a hat"], call=size | {"true_cfg_scale": 4.0}, batch=2, progress=False)
    assert plain.scale == 1.0  # without a negative prompt the pipeline does not guide
    assert not torch.equal(plain.run(batch, Captured.of(config, "ddim"), 2), guided) and len(seen) == 6
    hook.remove()
    with pytest.raises(OptionError, match="both mean true_cfg_scale"):
        Engine(pipe, ["a"], guidance=4.0, call={"true_cfg_scale": 2.0}, progress=False)


def test_an_offloaded_model():
    from accelerate import cpu_offload

    plain, engine = engine_of("sd15"), engine_of("sd15")
    cpu_offload(engine.pipe.unet, execution_device=torch.device("cpu"))
    found = []
    for one in (plain, engine):
        scheduler = Captured.of(one.pipe.scheduler.config, "unipc")
        found.append(one.run(one.batches(0, 2)[0], scheduler, 2))
    torch.testing.assert_close(*found)


# ---------------------------------------------------------------------- cost and cleanliness
def test_a_guidance_pair_is_one_call_for_each_image():
    engine = engine_of("sd15", batch=2)
    for batch in engine.batches(0, 3):
        engine.run(batch, Captured.of(engine.pipe.scheduler.config, "ddim"), 4)
    assert engine.calls == 3 * 4 and engine.cost["calls"] == 12
    assert [len(b) for b in engine.batches(0, 3)] == [2, 1]
    assert [b.seeds for b in engine.batches(5, 3)] == [(5, 6), (7,)]
    assert engine.batches(5, 3)[0].prompts == ("a hat", "a red fox")


def test_a_run_that_draws_noise_can_be_made_again():
    """SD3 gives its scheduler no generator; each image has its own all the same, whatever its batch."""
    engine = engine_of("sd3")
    scheduler = da.TableScheduler.from_config(engine.pipe.scheduler.config, sampler="dpmpp_2m_sde")
    before = torch.random.get_rng_state()
    first, again = (engine.run(engine.group([0, 1]), scheduler, 4) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(torch.random.get_rng_state(), before)
    for k in range(2):
        assert torch.allclose(engine.run(engine.group([k]), scheduler, 4), first[k : k + 1], atol=1e-4)
    assert scheduler.generator is None


def test_the_pipeline_is_left_as_it_was_also_after_a_failure():
    engine = engine_of("sd15")
    pipe, before = engine.pipe, engine.pipe.scheduler
    pipe.set_progress_bar_config(disable=True, desc="mine")

    def fails(*_):
        raise ValueError("no")

    for see, expected in ((None, None), (fails, ValueError)):
        scheduler = Captured.of(before.config, "ddim", see=see)
        if expected is None:
            engine.run(engine.batches(0, 1)[0], scheduler, 2)
        else:
            with pytest.raises(expected):
                engine.run(engine.batches(0, 1)[0], scheduler, 2)
        assert pipe.scheduler is before and pipe._progress_bar_config == {"disable": True, "desc": "mine"}
        assert "step" not in vars(scheduler)
    seen = []
    copy = watched(before, state=lambda i, z: seen.append(i) or z)
    for run in (1, 2):
        engine.run(engine.batches(0, 1)[0], copy, 2)
        assert len(seen) == 3 * run  # its own step is put back (PNDM makes three calls of two steps)


def test_bad_engines():
    for options, message in (({"batch": 0}, "batch of 1"), ({"call": {"steps": 3}}, "takes no option 'steps'")):
        with pytest.raises(OptionError, match=message):
            Engine(mixture_pipe(), ["0"], progress=False, **options)
    with pytest.raises(OptionError, match="needs a prompt"):
        Engine(mixture_pipe(), [], progress=False)


def test_state_is_written_once_something_is_finished(tmp_path):
    engine = engine_of("sd15", out=tmp_path / "x.safetensors")
    for arrays in ({}, {"a": np.ones(1)}):
        engine.kept.arrays |= arrays
        with pytest.raises(KeyboardInterrupt), engine.working(4, "test"):
            engine.calls += 1
            raise KeyboardInterrupt
        assert [p.name for p in tmp_path.iterdir()] == (["x.safetensors.partial"] if arrays else [])


def test_a_wrapped_pipeline_is_refused():
    pipe = build("sd3")
    with da.quant_cache(pipe, cache=da.Cache.every(3)), pytest.raises(OptionError, match="wrapped by 'quant_cache'"):
        Engine(pipe, ["a"], progress=False)
    Engine(pipe, ["a"], progress=False)


# ---------------------------------------------------------------------- sharing and going on
class Two(SoloWorld):
    """Rank `rank` of two processes; what the other said is played back."""

    size = 2

    def __init__(self, rank, said):
        super().__init__()
        self.rank, self.said = rank, said

    def gather(self, name, payload, **_):
        self.said.setdefault(name, {})[self.rank] = payload
        return [self.said[name][r] for r in sorted(self.said[name])]


def moments(batch):
    values = np.array(batch.seeds, dtype=float)
    powers = np.stack([values, values**2], axis=1)
    return {"n": np.array(float(len(values))), "outer": (powers.T @ powers)[:, ::-1].T}  # not contiguous


def added(a, b):
    return {k: a[k] + b[k] for k in a}


def test_processes_share_the_batches_and_merge():
    alone = Engine(mixture_pipe(), ["0"], batch=2, progress=False)
    whole = alone.accumulate("m", alone.batches(0, 7), moments, added)
    said, found = {}, None
    for rank in (0, 1):
        engine = Engine(mixture_pipe(), ["0"], batch=2, progress=False, world=Two(rank, said))
        found = engine.accumulate("m", engine.batches(0, 7), moments, added)
    for name, values in whole.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize(
    ("count", "size", "ranks"), [(16, 8, 3), (9, 8, 4), (5, 8, 2), (7, 2, 2), (4, 4, 4), (3, 9, 1)]
)
def test_every_process_has_a_batch_where_there_are_images_enough(count, size, ranks):
    shares = []
    for rank in range(ranks):
        world = Two(rank, {})
        world.size = ranks
        engine = Engine(mixture_pipe(), ["0"], batch=size, progress=False, world=world)
        shares.append(engine.batches(3, count))
    assert all(shares) and all(len(b) <= size for share in shares for b in share)
    assert sorted(s for share in shares for b in share for s in b.seeds) == list(range(3, 3 + count))


def test_accumulation_goes_on_where_it_stopped(tmp_path):
    def engine():
        return Engine(mixture_pipe(), ["0"], batch=2, progress=False, out=tmp_path / "a")

    first, worked = engine(), []

    def stops(batch):
        if batch.index == 2:
            raise KeyboardInterrupt
        worked.append(batch.index)
        return moments(batch)

    with pytest.raises(KeyboardInterrupt), first.working(10, "test"):
        first.accumulate("m", first.batches(0, 8), stops, added)
    again = engine()
    found = again.accumulate("m", again.batches(0, 8), lambda b: (worked.append(b.index), moments(b))[1], added)
    assert worked == [0, 1, 2, 3] and float(found["n"]) == 8
    again.kept.remove()
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_refused(tmp_path):
    kept = Checkpoint(tmp_path / "p", {"a": 1})
    kept.arrays["x"] = np.ones(3)
    kept.save()
    assert np.array_equal(Checkpoint(tmp_path / "p", {"a": 1}).arrays["x"], np.ones(3))
    with pytest.raises(OptionError, match="a differ"):
        Checkpoint(tmp_path / "p", {"a": 2})
    (tmp_path / "p").write_bytes((tmp_path / "p").read_bytes()[:-5])
    with pytest.raises(ArtifactError, match="truncated"):
        Checkpoint(tmp_path / "p", {"a": 1})


def test_what_a_killed_writer_left_goes_with_the_checkpoint(tmp_path):
    kept = Checkpoint(tmp_path / "p[1]", {})
    kept.save()
    for name in (".p[1].abc", ".p1.abc", "p[1]x"):
        (tmp_path / name).touch()
    kept.remove()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".p1.abc", "p[1]x"]


# ---------------------------------------------------------------------- verdicts
def test_verdicts():
    rng = np.random.default_rng(0)
    parent = rng.uniform(0.1, 0.3, 64)
    better = verdict(parent, 0.9 * parent)
    assert better.helps and better.difference == pytest.approx(-0.1 * parent.mean()) and better.low < better.high < 0
    assert not verdict(parent, parent).helps and not verdict(parent, 1.1 * parent).helps
    assert not verdict(parent, parent + rng.normal(0, 0.1, 64)).helps
    broken = 0.5 * parent
    broken[3] = np.nan
    assert not verdict(parent, broken).helps and "no benefit found" in str(verdict(parent, broken))
    assert better.to_json()["verdict"] == "helps" and isinstance(better, Verdict)
    with pytest.raises(OptionError, match=f"{FEWEST} pairs"):
        verdict(parent[:7], parent[:7])


def test_a_stock_setting_that_diverges_is_told_in_json(monkeypatch):
    """NaN and infinity are no JSON: a calibration must not fail on them when it is finished."""
    module = importlib.import_module("diffaccel.calibrate.validate")
    values = iter([np.array([np.nan, 1.0]), np.array([np.inf, np.inf])] * 20)
    monkeypatch.setattr(module, "run_errors", lambda *a, **k: next(values))
    pipe = mixture_pipe()
    engine = Engine(pipe, ["0"], batch=2, progress=False)
    found = best_stock(engine, "stock", engine.batches(0, 2), np.ones((2, 2, 2, 2)), 3, pipe.scheduler.config)
    assert found["tried"] > 2 and json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_interval_is_false_about_one_time_in_forty():
    """No difference but noise: `helps` is one side of a 95 % interval."""
    rng = np.random.default_rng(1)
    wrong = sum(verdict(a := rng.normal(1, 0.1, 32), a + rng.normal(0, 0.1, 32)).helps for _ in range(300))
    assert wrong <= 20


def test_errors_are_relative_to_each_teacher():
    z, target = np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([[3.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(errors(z, target), [4 / 3, 1.0])


def test_a_pipeline_without_sigmas_has_rivals_too():
    """The call of Wan's pipeline has no argument `sigmas`."""
    pipe = build("wan")
    call = {k: v for k, v in call_kwargs("wan").items() if k in ("height", "width", "num_frames")}
    engine = Engine(pipe, ["a fox"], call=call, batch=1, progress=False)
    batches = engine.batches(0, 1)
    teacher = ends(engine, "teacher", batches, lambda: pipe.scheduler, 4)
    found = best_stock(engine, "stock", batches, teacher, 3, pipe.scheduler.config)
    assert found["tried"] > 2 and 0 < found["error"] < 2
    assert not any("sigmas" in why for why in found.get("failed", {}).values())
