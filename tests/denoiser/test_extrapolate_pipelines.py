"""`extrapolate` on unmodified pipelines: calls counted in the model, what is answered, what is left behind."""

from __future__ import annotations

import itertools

import hooked_runs as runs
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FirstBlockCacheConfig, HeunDiscreteScheduler

import diffaccel as da
from diffaccel.denoiser.extrapolation_hook import ExtrapolationHook
from diffaccel.errors import OptionError, RunError
from diffaccel.schedulers import FSamplerScheduler, TableScheduler
from diffaccel.testing.pipelines import build, call_kwargs, denoiser

each_case = pytest.mark.parametrize("case", list(runs.CASES))


def gap(a, b):
    return float((a - b).abs().max() / (1 + b.abs().max()))


# ---------------------------------------------------------------------- calls, and nothing left behind
@each_case
def test_calls_are_saved_and_the_pipeline_comes_back(case):
    pipe = runs.made(case)
    model, branches = denoiser(pipe), runs.CASES[case][3]
    before = runs.run(pipe, case)
    attributes = set(model.__dict__) | {"_diffusers_hook"}  # which diffusers makes itself, where it has cache contexts
    with runs.counted(model) as seen, da.extrapolate(pipe, "h2/s2") as handle:
        first = runs.run(pipe, case)
        assert len(seen) == branches * 11
        again = runs.run(pipe, case)
        report = handle.report()
    assert report.skipped == [[4, 7, 10]] and report.calls == [11] and report.saved == [3]
    assert report.forwards == 11 * branches and report.nodes == 14
    assert report.seconds_model > 0 and report.seconds_outside > 0
    assert torch.equal(first, again)
    assert not torch.equal(first, before)
    assert torch.equal(runs.run(pipe, case), before)
    assert set(model.__dict__) <= attributes and "forward" not in model.__dict__


@each_case
def test_without_skips_every_bit_is_the_models(case):
    pipe = runs.made(case)
    before = runs.run(pipe, case, steps=5)
    with da.extrapolate(pipe, None) as handle:
        assert torch.equal(runs.run(pipe, case, steps=5), before)
    assert handle.report().calls == [5]


def by_hand(pipe, case, skipped, sigma_of, steps=14):
    """The run with a model that counts its own calls and extrapolates in sigma: no hook, no contract."""
    model, branches = denoiser(pipe), runs.CASES[case][3]
    true, past, count = model.forward, {b: [] for b in range(branches)}, itertools.count()

    def forward(*args, **kwargs):
        step, branch = divmod(next(count), branches)
        s = sigma_of(pipe.scheduler, step)
        if step in skipped:
            (s1, y1), (s2, y2) = past[branch][:2]
            return (y1 * ((s - s2) / (s1 - s2)) + y2 * ((s - s1) / (s2 - s1)),)
        output = true(*args, **kwargs)
        past[branch].insert(0, (s, output[0].clone()))
        return output

    model.forward = forward
    try:
        return runs.run(pipe, case, steps)
    finally:
        del model.forward


@pytest.mark.parametrize("case", ["sd15", "flux", "flux-cfg", "qwen", "wan"])
def test_answers_are_the_line_through_the_last_two(case):
    pipe = runs.made(case)
    wanted = by_hand(pipe, case, {4, 7, 10}, lambda scheduler, i: float(scheduler.sigmas[i]))
    with da.extrapolate(pipe, "h2/s2"):
        assert gap(runs.run(pipe, case), wanted) < 1e-6
    with da.extrapolate(pipe, "h2/s2", coordinate="index"):
        assert gap(runs.run(pipe, case), wanted) > 1e-6


def test_two_experts_have_histories_of_their_own():
    pipe = runs.two_experts()
    with runs.counted(pipe.transformer) as a, runs.counted(pipe.transformer_2) as b, da.extrapolate(pipe) as handle:
        runs.run(pipe, "wan", steps=16)
    assert len(a) + len(b) == 26 and len(a) == 8
    assert handle.report().skipped == [[4, 9, 12]]


@pytest.mark.parametrize("skip", [[5, 9], "h2, 5 9", lambda i, n: i in (5, 9) and n == 14])
def test_lists_and_functions(skip):
    pipe = runs.made("flux")
    with da.extrapolate(pipe, skip) as handle:
        runs.run(pipe, "flux")
    assert handle.report().skipped == [[5, 9]]


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DDIMScheduler])
def test_image_to_image_counts_from_where_it_begins(kind):
    pipe = build("sd15_img2img")
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    with runs.counted(pipe.unet) as seen, da.extrapolate(pipe, "h2/s2") as handle:
        pipe(**call_kwargs("sd15_img2img", num_inference_steps=16, strength=0.75))
    assert handle.report().nodes == 12 and handle.report().skipped == [[8, 11]] and len(seen) == 10


def test_a_static_pattern_is_the_scheduler_without_a_hook():
    pipe = runs.made("sd15")
    config = pipe.scheduler.config
    preset = FSamplerScheduler.from_config(config, skip="h2/s2", quantity="eps", coordinate="sigma")
    pipe.scheduler = preset
    wanted = runs.run(pipe, "sd15", steps=11)
    assert preset.nodes == 14
    pipe.scheduler = TableScheduler.from_config(config, sampler="ddim")
    for quantity in ("output", "eps"):
        with da.extrapolate(pipe, "h2/s2", quantity=quantity):
            assert gap(runs.run(pipe, "sd15", steps=14), wanted) < 1e-6
    with da.extrapolate(pipe, "h2/s2", quantity="x0"):
        assert gap(runs.run(pipe, "sd15", steps=14), wanted) > 1e-5


@pytest.mark.parametrize("quantity", ["x0", "eps", "flow", "residual"])
@pytest.mark.parametrize("coordinate", ["index", "sigma", "lam"])
def test_quantities_on_a_flow_model_equal_the_table(quantity, coordinate):
    pipe = runs.made("flux")
    config = pipe.scheduler.config
    pipe.scheduler = FSamplerScheduler.from_config(config, quantity=quantity, coordinate=coordinate)
    wanted = runs.run(pipe, "flux", steps=11)
    pipe.scheduler = TableScheduler.from_config(config, sampler="ddim")
    with da.extrapolate(pipe, "h2/s2", quantity=quantity, coordinate=coordinate):
        assert gap(runs.run(pipe, "flux", steps=14), wanted) < 1e-5


@pytest.mark.parametrize("return_dict", [True, False])
def test_outputs_keep_their_form(return_dict):
    pipe = runs.made("sd15")
    pipe.scheduler.set_timesteps(8)
    text, x = torch.zeros(1, 4, 32), torch.randn(1, 4, 8, 8)
    with da.extrapolate(pipe, [3]):
        for t in pipe.scheduler.timesteps:
            output = pipe.unet(pipe.scheduler.scale_model_input(x, t), t, text, return_dict=return_dict)
            assert isinstance(output, tuple) != return_dict
            y = output.sample if return_dict else output[0]
            x = pipe.scheduler.step(y, t, x).prev_sample


def test_predictions_in_the_history_are_noticed(monkeypatch):
    """Mutation: a predicted answer is stored like a real one."""
    true = ExtrapolationHook._predict

    def remembering(self, call, state, decision):
        true(self, call, state, decision)
        for name, answers in decision.answers.items():
            for g, answer in enumerate(answers):
                if answer is not None:
                    state.branches[name].memories[g].add(state.frame.position(call.step) + 1e-3, answer.float() * 1.01)

    monkeypatch.setattr(ExtrapolationHook, "_predict", remembering)
    with pytest.raises(AssertionError):
        test_answers_are_the_line_through_the_last_two_also_in_a_row()


def test_answers_are_the_line_through_the_last_two_also_in_a_row():
    pipe = runs.made("flux")
    wanted = by_hand(pipe, "flux", {5, 6, 9}, lambda scheduler, i: float(scheduler.sigmas[i]))
    with da.extrapolate(pipe, [5, 6, 9]):
        assert gap(runs.run(pipe, "flux"), wanted) < 1e-6


@pytest.mark.parametrize(
    ("name", "calls"),
    [("sd15_controlnet", 12), ("sd15_inpaint_9ch", 12), ("sdxl_refiner", 10), ("pixart", 12), ("dit", 12)],
)
@pytest.mark.parametrize("skip", ["h2/s2", "adaptive"])
def test_other_models(name, calls, skip):
    """Further inputs of the model, other output channels than input channels, a batch that does not tell its images."""
    pipe = build(name)
    if name.startswith("sd15"):
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with da.extrapolate(pipe, skip) as handle:
        pipe(**call_kwargs(name, num_inference_steps=16))
    report = handle.report()
    assert report.forwards == calls if skip == "h2/s2" else 5 < report.forwards < calls
    assert bool(report.notes) == (skip == "adaptive" and name in ("pixart", "dit"))


# ---------------------------------------------------------------------- runs that end early
class Stop(Exception):
    pass


@pytest.mark.parametrize("case", ["sd15", "sd15-ddim", "flux-cfg", "wan"])
@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("inside", [False, True])
def test_a_run_after_an_exception_is_clean(case, at, inside):
    pipe = runs.made(case)

    def stop(_, i, __, kwargs):
        if i == at:
            raise Stop
        return kwargs

    with da.extrapolate(pipe, "h2/s2") as handle:
        wanted = runs.run(pipe, case, steps=10)
        first = pipe.unet.conv_in if hasattr(pipe, "unet") else runs.embedder(pipe.transformer)
        calls = itertools.count()
        blow = first.register_forward_pre_hook(lambda *_: _raise() if inside and next(calls) == at else None)
        with pytest.raises(Stop):
            runs.run(pipe, case, steps=10, **({} if inside else {"callback_on_step_end": stop}))
        blow.remove()
        runs.run(pipe, case, steps=7)
        assert torch.equal(runs.run(pipe, case, steps=10), wanted)
        assert handle.report().skipped == [[4, 7]]


def _raise():
    raise Stop


# ---------------------------------------------------------------------- refusals
def test_several_calls_a_step_are_refused():
    pipe = runs.made("sd15")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with da.extrapolate(pipe), pytest.raises(OptionError, match="2 model calls a step"):
        runs.run(pipe, "sd15")
    pipe = build("sd15")
    with da.extrapolate(pipe), pytest.raises(OptionError, match="repeats timesteps"):
        runs.run(pipe, "sd15")


def test_wrapping_twice_is_refused():
    pipe = runs.made("flux")
    before = runs.run(pipe, "flux", steps=4)
    with da.extrapolate(pipe):
        with pytest.raises(OptionError, match="already"):
            da.extrapolate(pipe)
        runs.run(pipe, "flux", steps=4)
    assert torch.equal(runs.run(pipe, "flux", steps=4), before)


def test_other_wrappers_are_refused_in_either_order():
    pipe = runs.made("sd15")
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="ddim")
    with da.paradigms(pipe), pytest.raises(OptionError, match=r"wrapped by '\w+' already"):
        da.extrapolate(pipe)
    with da.extrapolate(pipe), pytest.raises(OptionError, match="wrapped by 'extrapolate' already"):
        da.paradigms(pipe)


def test_models_with_other_arguments_are_refused():
    pipe = build("z_image")
    with pytest.raises(OptionError, match="no sample or hidden_states"):
        da.extrapolate(pipe)


def test_a_report_before_the_first_run_is_an_error():
    with da.extrapolate(runs.made("flux")) as handle, pytest.raises(RunError, match="no run"):
        handle.report()


@pytest.mark.parametrize(
    ("skip", "options", "says"),
    [
        ("h2/s2", {"tol": 0.1}, "tol is an option of the adaptive gate"),
        ("adaptive", {"history": 3}, "history is an option of lists"),
        ([5], {"protect": (2, 2)}, "protect has no effect"),
        (None, {"stabilizer": "ema"}, "stabilizer is an option of skips"),
        ("h2/s2", {"beta": 0.9}, "beta belongs to stabilizer"),
        ("h2/s2", {"history": 3}, "names its predictor"),
        ("h3/s2", {}, "unknown skip pattern"),
        ("h2/s2", {"quantity": "noise"}, "unknown quantity"),
        ("adaptive", {"gate": "pixel"}, "unknown gate"),
        ("adaptive", {"tol": 0.0}, "needs tol > 0"),
    ],
)
def test_wrong_options_are_errors(skip, options, says):
    with pytest.raises(OptionError, match=says):
        da.extrapolate(runs.made("flux"), skip, **options)


def test_rejected_predictions_become_calls():
    pipe = runs.made("sd15")
    with runs.counted(pipe.unet) as seen, da.extrapolate(pipe, "h2/s2", max_ratio=1e-3) as handle:
        plain = runs.run(pipe, "sd15")
    assert len(seen) == 14 and handle.report().refusals == {"too large": 3}
    assert torch.equal(plain, runs.run(pipe, "sd15"))


def test_with_hooks_of_others():
    """Offloading before: inside, and spared by a skip. After: outside, said in the report, and left in place."""
    pipe = runs.made("sd15")
    wanted = runs.run(pipe, "sd15")
    with da.extrapolate(pipe):
        skipped = runs.run(pipe, "sd15")
    add_hook_to_module(pipe.unet, Noting())
    with da.extrapolate(pipe) as handle:
        assert torch.equal(runs.run(pipe, "sd15"), skipped)
    assert handle.report().notes == [] and pipe.unet._hf_hook.calls == 11
    assert torch.equal(runs.run(pipe, "sd15"), wanted) and pipe.unet._hf_hook.calls == 25
    remove_hook_from_module(pipe.unet)
    with da.extrapolate(pipe) as handle:
        add_hook_to_module(pipe.unet, Noting())
        assert torch.equal(runs.run(pipe, "sd15"), skipped)
    assert "call extrapolate last" in handle.report().notes[0] and pipe.unet._hf_hook.calls == 14
    assert torch.equal(runs.run(pipe, "sd15"), wanted) and pipe.unet._hf_hook.calls == 28


class Noting(ModelHook):
    """What accelerate's offloading is to a model: something that happens at every call."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_a_block_cache_of_diffusers_works_inside():
    pipe = runs.made("flux-cfg")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    with runs.counted(pipe.transformer) as seen, da.extrapolate(pipe) as handle:
        image = runs.run(pipe, "flux-cfg")
    assert image.isfinite().all() and len(seen) == 22 and handle.report().notes == []


def test_notes_say_what_limits_the_result():
    pipe = runs.made("sd15")
    with da.extrapolate(pipe) as handle:
        runs.run(pipe, "sd15", guidance_rescale=0.7)
    assert any("guidance_rescale" in note for note in handle.report().notes)
    assert "guidance_rescale" in str(handle.report())
    assert handle.report().to_dict()["calls"] == [11]


def test_half_precision():
    """Times are rounded to it, answers keep it, and four points are warned of."""
    pipe = runs.made("flux-cfg").to(torch.bfloat16)
    with da.extrapolate(pipe, "adaptive") as handle:
        assert runs.run(pipe, "flux-cfg").dtype == torch.bfloat16
    assert handle.report().calls == [7] and not handle.report().notes
    with da.extrapolate(pipe, "h4") as handle, pytest.warns(UserWarning, match="h4 multiplies rounding errors"):
        runs.run(pipe, "flux-cfg")
    assert any("h4" in note for note in handle.report().notes)
