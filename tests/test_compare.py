"""Comparing schedulers on one pipeline: calls are counted, noise is shared, errors are relative."""

import pytest
import torch

from diffaccel import compare, models
from diffaccel.errors import OptionError
from diffaccel.testing import pipelines

KEPT = ("DDIM trailing", "PNDM leading", "Heun linspace", "DPM++-2 karras", "UniPC-3 linspace zero")


@pytest.fixture(scope="module")
def setup():
    pipe = pipelines.build("sd15")
    inputs = pipelines.call_kwargs("sd15")
    for name in ("generator", "output_type", "num_inference_steps"):
        inputs.pop(name)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return pipe, compare.Job({**inputs, "prompt": [inputs["prompt"]]}, noise)


def test_every_candidate_makes_the_calls_that_it_was_asked_for(setup):
    pipe, job = setup
    for candidate in compare.stock(pipe.scheduler.config):
        if candidate.name in KEPT:
            outcome = compare.run(pipe, candidate, 5, job)
            assert outcome is not None
            assert outcome.calls == 5, candidate.name
    assert compare.run(pipe, compare.ours("heun"), 6, job).calls == 6


def test_a_candidate_that_cannot_spend_the_calls_is_left_out(setup):
    pipe, job = setup
    heun = next(c for c in compare.stock(pipe.scheduler.config) if c.name == "Heun linspace")
    assert compare.run(pipe, heun, 6, job) is None


def test_a_wrong_number_of_calls_is_an_error(setup):
    pipe, job = setup
    wrong = compare.Candidate("one more", True, lambda c: pipe.scheduler, lambda n: n + 1)
    with pytest.raises(OptionError, match="one more was asked for 5"):
        compare.run(pipe, wrong, 5, job)


def test_the_pipelines_own_scheduler_is_put_back(setup):
    pipe, job = setup
    before = pipe.scheduler
    compare.run(pipe, compare.ours("dpmpp"), 3, job)
    assert pipe.scheduler is before
    broken = compare.Candidate("broken", False, lambda c: object())
    with pytest.raises(AttributeError):
        compare.run(pipe, broken, 3, job)
    assert pipe.scheduler is before


def test_the_same_setting_has_no_error_and_a_shorter_run_has_one(setup):
    pipe, job = setup
    long = compare.run(pipe, compare.ours("dpmpp"), 30, job)
    again = compare.run(pipe, compare.ours("dpmpp"), 30, job)
    short = compare.run(pipe, compare.ours("dpmpp"), 3, job)
    assert torch.equal(compare.errors(again, long), torch.zeros(1, dtype=torch.float64))
    assert compare.errors(short, long).item() > 1e-3
    nan = compare.Outcome(torch.full_like(long.latents, float("nan")), 30, 0.0)
    assert compare.errors(nan, long).item() == float("inf")


def test_the_teacher_is_converged():
    pipe = models.load("tiny-sd")
    pipe.set_progress_bar_config(disable=True)
    job = compare.job_for(pipe, "tiny-sd", 2, 5)
    limit = compare.run(pipe, compare.ours("dpmpp", "uniform_lambda", order=2), 200, job)
    assert compare.errors(compare.run(pipe, compare.teacher(pipe.scheduler.config), 100, job), limit).max() < 3e-3


def test_flow_models_have_rivals_of_their_own():
    config = pipelines.build("sd3").scheduler.config
    names = [c.name for c in compare.stock(config)]
    assert "flow Euler, explicit sigmas" in names
    assert not any("DDIM" in n for n in names)
    assert compare.teacher(config).name == "DPM++-2 flow zero"
