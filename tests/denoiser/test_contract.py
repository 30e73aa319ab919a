"""What hooks stand on: steps, runs, branches, threads, and that no value is read from the device."""

from __future__ import annotations

import threading

import hooked_runs as runs
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

import diffaccel as da
from diffaccel.denoiser.clock import Clock, form_of_time, levels_of, position
from diffaccel.denoiser.contract import DenoiserHook, Signature, attach, detach, form_of, unpacked
from diffaccel.errors import OptionError, RunError
from diffaccel.schedulers import TableScheduler
from diffaccel.testing.pipelines import build, denoiser


class Seen(DenoiserHook):
    """Writes down (step, branch, opens) of every call."""

    def __init__(self, clock):
        super().__init__(clock)
        self.calls = []

    def answer(self, call):
        self.calls.append((call.step, call.branch, call.opens))
        return call.forward()


@pytest.mark.parametrize("case", list(runs.CASES))
def test_steps_and_branches(case):
    pipe = runs.made(case)
    hook = Seen(Clock(lambda: pipe.scheduler))
    attach(denoiser(pipe), hook, "diffaccel.seen")
    runs.run(pipe, case, steps=4)
    runs.run(pipe, case, steps=3)
    detach(denoiser(pipe), "diffaccel.seen")
    branches = runs.CASES[case][3]
    steps = [i for n in (4, 3) for i in range(n) for _ in range(branches)]
    assert [step for step, _, _ in hook.calls] == steps
    assert [opens for _, _, opens in hook.calls] == [k % branches == 0 for k in range(len(steps))]
    names = {"cond", "uncond"} if branches == 2 else None
    assert names is None or {branch for _, branch, _ in hook.calls} == names


@pytest.mark.parametrize(
    ("fed", "form"),
    [
        (lambda t: t, "t"),
        (lambda t: t / 1000, "t/T"),
        (lambda t: 1 - t / 1000, "1 - t/T"),
        (lambda t: 1000 - t, "T - t"),
    ],
)
def test_forms_of_time(fed, form):
    timesteps = torch.tensor([999.0, 750.0, 430.0, 120.5])
    for i, t in enumerate(timesteps):
        assert position(timesteps, fed(t.clone()), 1000.0, None if i == 0 else form)[0] == i
        assert form_of_time(fed(t.clone()), float(t), 1000.0) == form
        assert form_of_time(torch.tensor(333.3), float(t), 1000.0) is None
    assert position(timesteps, fed(timesteps[1].clone()), 1000.0, None) == (1, form)


def test_times_are_rounded_to_the_dtype_of_the_model():
    for t in (753.1, 999.0, 17.3):
        assert form_of_time(torch.tensor(t / 1000, dtype=torch.bfloat16), t, 1000.0) == "t/T"


def test_an_element_of_the_timesteps_is_not_read(monkeypatch):
    timesteps = torch.tensor([900, 600, 300])
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("a value was read"))
    for i, t in enumerate(timesteps):
        assert position(timesteps, t, 1000.0, None) == (i, "t")
        assert position(timesteps, t.expand(2), 1000.0, None) == (i, "t")


def test_a_time_of_another_scheduler_is_refused():
    with pytest.raises(RunError, match="none of the scheduler's timesteps"):
        position(torch.tensor([900.0, 600.0]), torch.tensor(777.0), 1000.0, None)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "qwen_image", "wan", "pixart", "dit"])
def test_signatures(name):
    model = denoiser(build(name))
    found = Signature(model)
    assert found.sample in ("sample", "hidden_states")
    assert found.bind((1, 2), {"x": 3}) == {found.names[0]: 1, found.names[1]: 2, "x": 3}


def test_outputs():
    y = torch.ones(2)
    assert form_of((y,))(y) == (y,) and form_of(y)(y) is y and unpacked((y,)) is y
    with pytest.raises(OptionError, match="more than one tensor"):
        unpacked((y, y))


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler])
def test_levels_are_those_of_our_own_scheduler(kind):
    stock = kind()
    ours = TableScheduler.from_config(stock.config)
    stock.set_timesteps(7)
    ours.set_timesteps(timesteps=stock.timesteps.tolist())
    a, b = levels_of(stock), levels_of(ours)
    for x, y in zip(a.nodes[:-1], b.nodes[:-1], strict=True):
        assert (x.alpha, x.sigma) == pytest.approx((y.alpha, y.sigma), abs=1e-5)
    assert a.output == b.output


# ---------------------------------------------------------------------- no waiting for the device
class Meta(torch.nn.Module):
    """A denoiser on the meta device, where reading any value raises."""

    def forward(self, sample, timestep, encoder_hidden_states=None, return_dict=True):
        return (sample * 0.5,)


class Holder:
    do_classifier_free_guidance = False

    def __init__(self, unet, scheduler):
        self.unet, self.scheduler = unet, scheduler


@pytest.mark.parametrize("kind", ["ours", "flow"])
def test_fixed_patterns_read_nothing_from_the_device(kind):
    config = FlowMatchEulerDiscreteScheduler(shift=3.0).config
    made = TableScheduler.from_config(config, sampler="ddim") if kind == "ours" else None
    scheduler = made or FlowMatchEulerDiscreteScheduler.from_config(config)
    pipe = Holder(Meta(), scheduler)
    x = torch.empty(1, 4, 8, 8, device="meta")
    with da.extrapolate(pipe, "h2/s2") as handle:
        scheduler.set_timesteps(12)
        scheduler.set_begin_index(0)
        for t in scheduler.timesteps.to("meta"):
            y = pipe.unet(x, t.expand(1), return_dict=False)[0]
            # the step of the scheduler itself is not under test
            if kind == "ours":
                x = scheduler.step(y, t, x).prev_sample
            else:
                scheduler._step_index = (scheduler._step_index or 0) + 1
    assert handle.report().skipped == [[4, 7]]


class Small(torch.nn.Module):
    def forward(self, sample, timestep, encoder_hidden_states=None, return_dict=True):
        return (sample.sin() * 0.5,)


def twelve_steps(pipe):
    x = torch.linspace(-1, 1, 8)[None]
    pipe.scheduler.set_timesteps(12)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.unet(x, t, return_dict=False)[0], t, x).prev_sample
    return x


@pytest.mark.parametrize(("since", "skipped", "late"), [(5, [4, 7, 10], 0), (7, [4, 7, 10], 1), (9, [4, 7], 0)])
def test_a_branch_that_appears_late(since, skipped, late):
    """Its history is its own: a skip at its first call is a real call there, and one answer is too few."""
    scheduler = TableScheduler.from_config(FlowMatchEulerDiscreteScheduler().config, sampler="ddim")
    pipe, x = Holder(Small(), scheduler), torch.linspace(-1, 1, 8)[None]
    scheduler.set_timesteps(14)
    with da.extrapolate(pipe, "h2/s2") as handle:
        for i, t in enumerate(scheduler.timesteps):
            y = pipe.unet(x, t)[0]
            if i >= since:
                y = y + 0.5 * (pipe.unet(-x, t)[0] - y)
            x = scheduler.step(y, t, x).prev_sample
    assert handle.report().skipped == [skipped]
    assert handle.report().refusals["late branch"] == late
    assert handle.report().refusals["history"] == 3 - len(skipped)


def test_a_name_seen_twice_in_a_step_is_an_error():
    pipe = runs.made("flux")
    hook = Seen(Clock(lambda: pipe.scheduler))
    attach(pipe.transformer, hook, "diffaccel.seen")
    true, pipe.transformer.forward = pipe.transformer.forward, None
    pipe.transformer.forward = lambda **kwargs: (true(**kwargs), true(**kwargs))[1]
    with pytest.raises(RunError, match="twice as 'cond'"):
        runs.run(pipe, "flux", steps=3)


def test_a_compiled_model_stays_compiled():
    scheduler = TableScheduler.from_config(FlowMatchEulerDiscreteScheduler().config, sampler="ddim")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    plain, compiled = Holder(Small(), scheduler), Holder(torch.compile(Small(), backend=backend), scheduler)
    with da.extrapolate(plain):
        wanted = twelve_steps(plain)
    with da.extrapolate(compiled) as handle:
        assert torch.equal(twelve_steps(compiled), wanted)
    assert handle.report().calls == [10] and len(graphs) == 1
    plain.unet.compile(backend=backend)
    with pytest.raises(OptionError, match="compiled in place"):
        da.extrapolate(plain)


# ---------------------------------------------------------------------- threads
def in_threads(jobs):
    """Results of the jobs, each in a thread of its own, all begun together."""
    found, gate = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(i):
        gate.wait()
        try:
            found[i] = jobs[i]()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    return found


def family(case, count, ours=True):
    """Pipelines that share one denoiser, each with a scheduler of its own."""
    first = runs.made(case)
    if ours:
        first.scheduler = TableScheduler.from_config(first.scheduler.config, sampler="dpmpp")
    pipes = [first]
    for _ in range(count - 1):
        scheduler = type(first.scheduler).from_config(first.scheduler.config)
        pipes.append(type(first)(**{**first.components, "scheduler": scheduler}))
        pipes[-1].set_progress_bar_config(disable=True)
    return pipes


def embedded(pipe):
    """Arguments in place of prompts: tokenizers change their own settings while they work, so threads disturb them."""
    found = {}
    for kind, prompt in (("", "a red fox"), ("negative_", "a cat")):
        embeds, pooled, _ = pipe.encode_prompt(prompt, prompt_2=None, max_sequence_length=16)
        found |= {f"{kind}prompt": None, f"{kind}prompt_embeds": embeds, f"{kind}pooled_prompt_embeds": pooled}
    return {"flux-cfg": found, "flux": {k: v for k, v in found.items() if not k.startswith("negative")}}


@pytest.mark.parametrize("skip", ["h2/s2", "adaptive"])
def test_threads_on_one_denoiser_equal_serial_runs(skip):
    pipes = family("flux", 3)
    asked = [("flux", 9), ("flux-cfg", 12), ("flux", 14)]
    texts = embedded(pipes[0])

    def job(i):
        def work():
            image = runs.run(pipes[i], asked[i][0], steps=asked[i][1], **texts[asked[i][0]])
            return image, handle.report().skipped, handle.report().forwards

        return work

    with da.extrapolate(pipes[0], skip) as handle:
        serial = [job(i)() for i in range(3)]
        assert len({str(skipped) for _, skipped, _ in serial}) > 1
        for _ in range(3):
            for (image, skipped, forwards), got in zip(serial, in_threads([job(i) for i in range(3)]), strict=True):
                assert not isinstance(got, Exception), got
                assert torch.equal(got[0], image) and got[1:] == (skipped, forwards)


def test_a_second_pipeline_with_a_foreign_scheduler_is_refused():
    pipes = family("flux", 2, ours=False)
    with da.extrapolate(pipes[0]):
        runs.run(pipes[0], "flux", steps=6)
        with pytest.raises(RunError, match="another pipeline"):
            runs.run(pipes[1], "flux", steps=6)


def test_a_hook_that_never_saw_a_run_refuses_another_pipeline():
    pipes = family("flux", 2, ours=False)
    with da.extrapolate(pipes[0]), pytest.raises(RunError, match="another pipeline"):
        runs.run(pipes[1], "flux", steps=6)
