"""Runs that begin in the middle: img2img, video to video, refiners, and intervals that are cut."""

from __future__ import annotations

import pytest
import torch
from scheduler_runs import cases, generator, label, loop, make, model, noise

from diffaccel import TableScheduler
from diffaccel.errors import RunError
from diffaccel.testing.pipelines import build, call_kwargs, denoiser

STRENGTHS = [round(0.05 * k, 2) for k in range(1, 21)]
CLEAN = noise(1, 2, 4, 4, seed=9)


def point_mass(scheduler, clean=CLEAN):
    """The exact denoiser of data that is the one point `clean`; it knows the level of call i."""

    def predict(x, t):
        i = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index
        node = scheduler.table.rows[i].node
        if scheduler.config.prediction_type == "flow_prediction":
            return (x - clean) / node.sigma
        return (x - node.alpha * clean) / node.sigma

    return predict


def close(a, b, tol=2e-5):
    return torch.allclose(a, b, rtol=tol, atol=tol * max(1.0, float(b.abs().max())))


# ---------------------------------------------------------------------- img2img
@pytest.mark.parametrize("calls", range(1, 61))
def test_img2img_at_every_strength(calls):
    """As diffusers' `get_timesteps`: every (N, strength) runs len(timesteps) - begin calls, on the right level."""
    scheduler = make("sd15", "dpmpp")
    scheduler.set_timesteps(calls)
    fresh = noise(*CLEAN.shape, seed=1)
    for strength in STRENGTHS:
        begin = calls - min(int(calls * strength), calls)
        scheduler.set_begin_index(begin)
        if begin == calls:  # int(N * strength) = 0: no call is left, diffusers' pipelines refuse it themselves
            continue
        node, seen = scheduler.table.rows[begin].node, []
        x = scheduler.add_noise(CLEAN, fresh, scheduler.timesteps[begin : begin + 1])
        assert close(x, node.alpha * CLEAN + node.sigma * fresh, 1e-6)
        exact = point_mass(scheduler)
        out = loop(scheduler, x, begin, predict=lambda x, t, seen=seen, exact=exact: seen.append(t) or exact(x, t))
        assert seen == list(scheduler.timesteps[begin:])
        assert close(out, CLEAN)


@pytest.mark.parametrize(("name", "options"), cases(), ids=label)
@pytest.mark.parametrize("path", ["sd15", "flow"])
def test_every_sampler_begins_anywhere(path, name, options):
    """The level of the state is that of its node after every call; at the end stands the data."""
    calls = 7
    scheduler = make(path, name, **options)
    scheduler.set_timesteps(calls)
    many = CLEAN.expand(4096, -1, -1, -1)
    fresh = noise(*many.shape, seed=1)
    for begin in range(calls):
        scheduler.set_begin_index(begin)
        x = scheduler.scale_noise(many, scheduler.timesteps[begin], fresh)
        exact, source = point_mass(scheduler, many), generator(2)
        for i in range(begin, calls):
            node = scheduler.table.rows[i].node
            left = x - node.alpha * many
            assert left.var() == pytest.approx(node.sigma**2, rel=0.02, abs=1e-9), (begin, i)
            x = scheduler.step(exact(x, None), scheduler.timesteps[i], x, generator=source)[0]
        assert close(x, many, 2e-4)
        assert scheduler.step_index == calls


def test_begin_index_past_the_end():
    scheduler = make()
    scheduler.set_timesteps(4)
    for wrong in (-1, 5):
        with pytest.raises(RunError, match=rf"set_begin_index\({wrong}\): this run has calls 0..3"):
            scheduler.set_begin_index(wrong)


@pytest.mark.parametrize(("name", "options"), cases(variants=False), ids=label)
def test_sliced_timesteps_without_set_begin_index(name, options):
    """Wan V2V slices `timesteps` and tells nobody."""
    told, untold = make("flow", name, **options), make("flow", name, **options)
    x = noise(1, 4, 4, 4)
    for begin in (0, 2, 5):
        told.set_timesteps(6)
        untold.set_timesteps(6)
        levels = [s.add_noise(x, 0 * x, s.timesteps[begin : begin + 1]) for s in (told, untold)]
        assert torch.equal(*levels)
        told.set_begin_index(begin)
        given = untold.timesteps[begin:]
        if len(untold.timesteps.unique()) == 6:
            given = given.clone()  # known by value, not by its place in memory
        source, y = generator(), x
        for t in given:
            y = untold.step(model(y, t), t, y, generator=source)[0]
        assert torch.equal(y, loop(told, x, begin, generator=generator()))


# ---------------------------------------------------------------------- intervals that are cut
@pytest.mark.parametrize("name", ["heun", "dpmpp_2s", "dpmpp_3s", "pndm"])
def test_cut_intervals_keep_the_samplers_own_rows(name):
    """Calls of an interval that was cut are first-order steps; from where the next one opens, all is as before."""
    calls, x = 8, CLEAN
    scheduler = make("sd15", name)
    scheduler.set_timesteps(calls)
    table = scheduler.table
    for begin in range(calls):
        scheduler.set_begin_index(begin)
        scheduler.step(x, scheduler.timesteps[begin], x)
        rows = [c.row for c in scheduler._runs.need().rows]
        cut = next((i for i in range(begin, calls) if table.rows[i].opens), calls) - begin
        assert [(r.t, r.node.key, r.next.key) for r in rows] == [
            (r.t, r.node.key, r.next.key) for r in table.rows[begin:]
        ]
        assert all(r.space == "x0" and len(r.out.p) == 1 for r in rows[:cut])
        if name != "pndm":  # a multistep method has no history yet
            assert [r.out.p for r in rows[cut:]] == [r.out.p for r in table.rows[begin + cut :]]


# ---------------------------------------------------------------------- base and refiner
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_handover_of_a_first_order_sampler_is_one_run(share):
    whole, base, refiner = (make("sd15", "ddim", {"grid": "leading"}) for _ in range(3))
    for scheduler in (whole, base, refiner):
        scheduler.set_timesteps(10)
    x = noise(1, 4, 4, 4)
    cutoff = round(1000 * (1 - share))
    high = [t for t in base.timesteps if t >= cutoff]
    begin = 10 - int((refiner.timesteps < cutoff).sum())
    assert len(high) == begin
    y = x
    for t in high:
        y = base.step(model(y, t), t, y)[0]
    refiner.set_begin_index(begin)
    assert torch.equal(loop(refiner, y, begin), loop(whole, x))


@pytest.mark.parametrize("sampler", ["dpmpp", "unipc", "heun"])
@pytest.mark.parametrize("share", [0.35, 0.8])
def test_sdxl_hands_over_to_the_refiner(sampler, share):
    base, refiner = build("sdxl"), build("sdxl_refiner")
    seen = []
    for pipe in (base, refiner):
        pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler=sampler)
        denoiser(pipe).register_forward_pre_hook(lambda _, args: seen.append(float(args[1])))
    kwargs = call_kwargs("sdxl", num_inference_steps=8, denoising_end=share)
    latents = base(**kwargs).images
    handed = len(seen)
    level = base.scheduler.table.nodes[handed]
    assert level.t < 1000 * (1 - share) <= seen[-1]
    kwargs = call_kwargs("sdxl_refiner", num_inference_steps=8, denoising_start=share, image=latents)
    out = refiner(**kwargs).images
    assert seen == base.scheduler.timesteps.tolist()
    assert refiner.scheduler.begin_index == handed
    assert torch.isfinite(torch.as_tensor(out)).all()


@pytest.mark.parametrize("name", ["sd15_img2img", "sd3_img2img", "flux_img2img", "wan_video2video"])
def test_img2img_pipelines_make_the_calls_that_their_timesteps_say(name):
    pipe = build(name)
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="unipc", order=3)
    fed = []
    denoiser(pipe).register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(float(torch.as_tensor(kwargs.get("timestep", args[1:2] or 0)).flatten()[0])),
        with_kwargs=True,
    )
    for calls, strength in ((1, 1.0), (3, 0.4), (7, 0.3), (7, 1.0), (10, 0.55)):
        fed.clear()
        out = pipe(**call_kwargs(name, num_inference_steps=calls, strength=strength))[0]
        done = sorted(set(fed), reverse=True)
        scale = 1 if max(done) > 1 else 1000  # FLUX is fed t/1000
        begin = calls - len(done)
        assert torch.allclose(torch.tensor(done) * scale, pipe.scheduler.timesteps[begin:].float(), rtol=1e-5)
        assert len(done) in (int(calls * strength), -int(-calls * strength // 1))
        assert torch.isfinite(torch.as_tensor(out)).all()
