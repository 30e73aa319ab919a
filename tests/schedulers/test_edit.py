"""Edits between the calls survive: inpainting keeps its known region, callbacks reach the result as the table says."""

from __future__ import annotations

import pytest
import torch
from scheduler_runs import cases, generator, label, loop, make, model, noise

from diffaccel import TableScheduler
from diffaccel.core.prediction import Output, pair
from diffaccel.testing.pipelines import build, call_kwargs, known_region

CLEAN, FRESH = noise(1, 2, 6, 6, seed=3), noise(1, 2, 6, 6, seed=4)
KNOWN = torch.zeros(1, 1, 6, 6)
KNOWN[..., :3] = 1.0
STRENGTHS = (0.05, 0.3, 0.55, 0.8, 1.0)


# ---------------------------------------------------------------------- inpainting, as StableDiffusionInpaintPipeline
@pytest.mark.parametrize("path", ["sd15", "zero_snr", "flow"])
@pytest.mark.parametrize(("name", "options"), cases(), ids=label)
def test_inpainting_keeps_the_known_region(path, name, options):
    """The model knows the picture in the known region; each state before the pipeline's repair must agree with it.

    Deterministic samplers carry the noise of the known region along, so that they meet `add_noise` of the next
    timestep after every call; the others meet the picture itself at the end.
    """
    calls = 20
    scheduler = make(path, name, **options)
    for strength in STRENGTHS:
        scheduler.set_timesteps(calls)
        begin = calls - int(calls * strength)
        scheduler.set_begin_index(begin)
        timesteps = scheduler.timesteps[begin:]
        table, source = scheduler.table, generator(5)
        x = scheduler.add_noise(CLEAN, FRESH, timesteps[:1])
        for i, t in enumerate(timesteps):
            row = table.rows[begin + i]
            output = KNOWN * exact(scheduler, row.node, x) + (1 - KNOWN) * model(x, t)
            x = scheduler.step(output, t, x, generator=source)[0]
            last = i == len(timesteps) - 1
            noised = CLEAN if last else scheduler.add_noise(CLEAN, FRESH, torch.tensor([timesteps[i + 1]]))
            level = row.next
            assert torch.allclose(noised, level.alpha * CLEAN + level.sigma * FRESH, atol=1e-6)
            if last or not table.stochastic:
                assert torch.allclose(x * KNOWN, noised * KNOWN, rtol=2e-5, atol=2e-5), (strength, i)
            x = KNOWN * noised + (1 - KNOWN) * x
        assert torch.equal(x * KNOWN, CLEAN * KNOWN)
        assert torch.isfinite(x).all()


def exact(scheduler, node, x):
    """The raw output of a model that knows the picture."""
    a, s = node.alpha, node.sigma
    kinds = {"epsilon": lambda: (x - a * CLEAN) / s, "flow_prediction": lambda: (x - CLEAN) / s}
    kinds["v_prediction"] = lambda: (a * x - CLEAN) / s
    return kinds[scheduler.config.prediction_type]()


# ---------------------------------------------------------------------- the real pipelines
def latents(pipe, name, **changes):
    return pipe(**call_kwargs(name, **changes)).images


def test_inpaint_pipeline_keeps_the_known_region_with_every_sampler():
    pipe = build("sd15_inpaint")
    source = pipe.scheduler.config
    half = known_region(size=16).bool().expand(1, 4, -1, -1)
    kept = latents(pipe, "sd15_inpaint", num_inference_steps=5)[half]
    for name, options in cases(variants=False):
        pipe.scheduler = TableScheduler.from_config(source, sampler=name, **options)
        out = latents(pipe, "sd15_inpaint", num_inference_steps=5)
        assert torch.equal(out[half], kept), name
        assert torch.isfinite(out).all() and out[~half].std() > 0, name


@pytest.mark.parametrize("name", ["sd15_inpaint", "sdxl_inpaint"])
def test_inpaint_pipeline_at_every_strength(name):
    pipe = build(name)
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="unipc", order=3)
    half = known_region(size=16).bool().expand(1, 4, -1, -1)
    for strength in (0.2, 0.4, 0.6, 0.8, 1.0):
        one, other = (
            latents(pipe, name, num_inference_steps=5, strength=strength, prompt=text, seed=1) for text in ("a", "zzz")
        )
        assert torch.equal(one[half], other[half]), strength
        assert not torch.equal(one[~half], other[~half])
    with pytest.raises(ValueError, match="num_inference_steps"):  # diffusers' own: int(5 * 0.1) = 0 calls
        latents(pipe, name, num_inference_steps=5, strength=0.1)


# ---------------------------------------------------------------------- callbacks
def fixed(scheduler, predictions):
    """Outputs whose prediction in the row's own space does not depend on the state: only the state carries an edit."""
    table = scheduler.table

    def predict(x, t):
        i = scheduler.step_index or 0
        row, p = table.rows[i], predictions[i]
        u, w = pair(Output("x0"), row.space, row.node)
        return (p - u * x) / w

    return predict


@pytest.mark.parametrize(("name", "options"), cases(), ids=label)
def test_an_edit_reaches_every_later_state_by_the_rows_own_coefficients(name, options):
    """d(state k)/d(edit after call j) is the product of row.a over the rows between: nobody keeps a hidden copy."""
    calls = 7
    scheduler = make("sd15", name, {"prediction_type": "sample"}, **options)
    x = noise(1, 2, 4, 4, dtype=torch.float64)
    predictions = noise(calls, 1, 2, 4, 4, seed=2, dtype=torch.float64)
    delta = noise(1, 2, 4, 4, seed=8, dtype=torch.float64)

    def states(j):
        seen = []
        scheduler.set_timesteps(calls)

        def edit(i, state):
            state = state + delta if i == j else state
            seen.append(state)
            return state

        loop(scheduler, x, predict=fixed(scheduler, predictions), edit=edit, generator=generator())
        return seen

    plain = states(None)
    rows = scheduler.table.rows
    for j in range(calls):
        expected = delta
        edited = states(j)
        for i in range(j, calls):
            expected = expected * rows[i].a if i > j else expected
            assert torch.allclose(edited[i] - plain[i], expected, rtol=1e-9, atol=1e-12), (j, i)


def test_callback_of_a_pipeline_may_change_the_latents():
    pipe = build("sd15")
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="unipc", order=3)

    def run(at):
        def callback(pipe, i, t, kwargs):
            if i == at:
                kwargs["latents"] = kwargs["latents"] + 0.25
            return kwargs

        return latents(pipe, "sd15", num_inference_steps=5, callback_on_step_end=callback)

    plain, last, middle = run(None), run(4), run(1)
    assert torch.allclose(last, plain + 0.25, atol=1e-6)
    assert (middle - plain).abs().max() > 1e-3


def test_interrupted_pipeline_begins_afresh():
    pipe = build("sd15")
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="dpmpp")

    def stop(pipe, i, t, kwargs):
        pipe._interrupt = i == 1
        return kwargs

    whole = latents(pipe, "sd15", num_inference_steps=5)
    cut = latents(pipe, "sd15", num_inference_steps=5, callback_on_step_end=stop)
    assert pipe.scheduler.step_index == 2
    assert not torch.equal(cut, whole)
    assert torch.equal(latents(pipe, "sd15", num_inference_steps=5), whole)
