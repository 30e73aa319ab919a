"""`step`: what it returns, what it reads, what it keeps from call to call, and what it refuses."""

from __future__ import annotations

import inspect

import pytest
import torch
from scheduler_runs import PATHS, cases, generator, label, loop, make, model, noise, sampled

from diffaccel import TableScheduler, TableSchedulerOutput
from diffaccel.core.prediction import pair
from diffaccel.errors import OptionError, RunError
from diffaccel.schedulers.settings import output_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
X = noise(2, 4, 6, 6)


def ready(calls: int = 4, path: str = "sd15", sampler: str = "dpmpp", settings=None, **options):
    scheduler = make(path, sampler, settings, **options)
    scheduler.set_timesteps(calls)
    return scheduler


# ---------------------------------------------------------------------- signature and result
def test_signature_has_a_generator_and_no_eta():
    names = list(inspect.signature(TableScheduler.step).parameters)
    assert names == ["self", "model_output", "timestep", "sample", "generator", "return_dict", "kwargs"]
    set_names = list(inspect.signature(TableScheduler.set_timesteps).parameters)
    assert set_names == ["self", "num_inference_steps", "device", "sigmas", "timesteps", "mu"]
    assert TableScheduler.order == 1


def test_tuple_of_two_or_an_output_class():
    one, two = ready(), ready()
    pair = one.step(X, one.timesteps[0], X, return_dict=False)
    out = two.step(X, two.timesteps[0], X)
    assert isinstance(pair, tuple) and len(pair) == 2
    assert isinstance(out, TableSchedulerOutput)
    assert torch.equal(out.prev_sample, pair[0]) and torch.equal(out[0], pair[0])
    assert torch.equal(out.pred_original_sample, pair[1]) and torch.equal(out[1], pair[1])


@pytest.mark.parametrize("path", PATHS)
def test_second_of_the_tuple_is_the_x0_prediction(path):
    scheduler = ready(5, path, "ddim")
    x = X
    for i, t in enumerate(scheduler.timesteps):
        node = scheduler.table.rows[i].node
        output = model(x, t)
        state, x0 = scheduler.step(output, t, x, return_dict=False)
        a, s = node.alpha, node.sigma
        if path == "edm":
            data = 0.5
            true = x * data**2 / (s**2 + data**2) + output * s * data / (s**2 + data**2) ** 0.5
        else:
            kinds = {"epsilon": (x - s * output) / (a or 1), "v_prediction": a * x - s * output}
            kinds |= {"sample": output, "flow_prediction": x - s * output}
            true = kinds[scheduler.config.prediction_type]
        assert torch.allclose(x0, true, rtol=1e-5, atol=1e-5 * float(true.abs().max()))
        x = state
    assert torch.allclose(x, x0, atol=1e-6)  # the end is free of noise


# ---------------------------------------------------------------------- dtype
@pytest.mark.parametrize("output", DTYPES, ids=str)
@pytest.mark.parametrize("sample", DTYPES, ids=str)
def test_result_has_the_dtype_of_the_sample(sample, output):
    scheduler, exact = ready(5), ready(5)
    x, reference = X.to(sample), X.to(sample).double()
    for t in scheduler.timesteps:
        eps = model(x.float(), t).to(output)
        state, x0 = scheduler.step(eps, t, x, return_dict=False)
        true = exact.step(eps.double(), t, reference, return_dict=False)[0]
        assert state.dtype == x0.dtype == sample
        # the arithmetic is in float32 at least: only the rounding of the result to its own dtype is left
        unit = max(torch.finfo(sample).eps, torch.finfo(torch.float32).eps * 16) if sample != torch.float64 else 1e-14
        assert torch.allclose(state.double(), true, rtol=unit, atol=unit * float(true.abs().max()))
        x, reference = state, state.double()


def test_history_of_half_precision_runs_is_float32():
    scheduler = ready(4, order=2)
    x = X.half()
    scheduler.step(x, scheduler.timesteps[0], x)
    assert [p.dtype for p in scheduler.model_outputs] == [torch.float32]


def test_memory_format_and_shape_are_kept():
    x = X.to(memory_format=torch.channels_last)
    out = sampled(make(), x, 3, predict=lambda x, t: model(x, t))
    assert out.is_contiguous(memory_format=torch.channels_last)
    for shape in ((3,), (2, 5), (1, 4, 3, 6, 6)):
        assert sampled(make(), noise(*shape), 3).shape == shape


# ---------------------------------------------------------------------- the index, not the timestep
def test_rows_follow_the_counter_and_not_the_timestep():
    right, wrong = ready(5), ready(5)
    x = y = X
    for i, t in enumerate(right.timesteps):
        eps = model(x, t)
        x = right.step(eps, t, x)[0]
        y = wrong.step(eps, t if i == 0 else torch.tensor(-7), y)[0]
        assert right.step_index == i + 1
    assert torch.equal(x, y)


def test_past_the_end_is_an_error_and_set_timesteps_begins_again():
    scheduler = ready(3)
    first = loop(scheduler, X)
    with pytest.raises(RunError, match=r"\(3 calls\) has ended; call set_timesteps"):
        scheduler.step(X, scheduler.timesteps[-1], X)
    scheduler.set_timesteps(3)
    assert scheduler.step_index is None and scheduler.begin_index is None and scheduler.model_outputs == []
    assert torch.equal(loop(scheduler, X), first)


def test_step_before_set_timesteps():
    with pytest.raises(RunError, match="call set_timesteps before step"):
        make().step(X, 999, X)
    with pytest.raises(RunError, match="call set_timesteps"):
        make().set_begin_index(0)


def test_unknown_first_timestep_lists_both_sides():
    scheduler = ready(3)
    with pytest.raises(RunError, match=r"timestep 123, which is none of its timesteps \[999"):
        scheduler.step(X, torch.tensor(123), X)


def test_counter_may_not_be_set_from_outside():
    scheduler = ready()
    scheduler.step(X, scheduler.timesteps[0], X)
    with pytest.raises(RunError, match=r"to 0\), as Cosmos 1 and LEDITS"):
        scheduler._step_index -= 1
    assert scheduler.step_index == 1


# ---------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("output", "sample", "message"),
    [
        (X[:, :3], X, r"output has shape \(2, 3, 6, 6\) and the sample \(2, 4, 6, 6\)"),
        (X[:1], X, r"shape \(1, 4, 6, 6\)"),
        (torch.cat([X, X, X], 1), X, "twice the channels"),
        (X.to(torch.complex64), X, "model.s output as a real tensor .* got torch.complex64"),
        (X.long(), X, "torch.int64"),
        (X.numpy(), X, "got ndarray"),
        (None, X, "got NoneType"),
        (X, X.long(), "torch.int64"),
        (X, X.to(torch.complex64), "torch.complex64"),
        (X, X.numpy(), "ndarray"),
    ],
    ids=["channels", "batch", "thrice", "complex", "integer", "numpy", "none", "int-sample", "c-sample", "np-sample"],
)
def test_wrong_tensors_are_named(output, sample, message):
    scheduler = ready()
    with pytest.raises(RunError, match=message):
        scheduler.step(output, scheduler.timesteps[0], sample)
    assert scheduler.step_index in (None, 0)


NEUTRAL = {
    "eta": 0.0,
    "use_clipped_model_output": False,
    "variance_noise": None,
    "per_token_timesteps": None,
    "s_churn": 0,
}


def test_neutral_arguments_of_pipelines_are_accepted():
    with_them, without = ready(3), ready(3)
    assert torch.equal(loop(with_them, X, **NEUTRAL), loop(without, X))


@pytest.mark.parametrize(
    "given",
    [
        {"eta": 0.5},
        {"use_clipped_model_output": True},
        {"variance_noise": X},
        {"s_churn": 1.0},
        {"per_token_timesteps": X},
    ],
    ids=lambda d: next(iter(d)),
)
def test_arguments_that_would_have_no_effect_are_refused(given):
    scheduler = ready()
    with pytest.raises(OptionError, match=next(iter(given)) + ".*would have no effect"):
        scheduler.step(X, scheduler.timesteps[0], X, **given)
    with pytest.raises(OptionError, match="no argument 'strength'"):
        scheduler.step(X, scheduler.timesteps[0], X, strength=0.5)


# ---------------------------------------------------------------------- learned variance
@pytest.mark.parametrize("path", ["sd15", "flow"])
def test_learned_variance_is_dropped(path):
    plain, learned = ready(4, path), ready(4, path)
    a = loop(plain, X)
    b = loop(learned, X, predict=lambda x, t: torch.cat([model(x, t), torch.full_like(x, 9.0)], dim=1))
    assert torch.equal(a, b)


# ---------------------------------------------------------------------- noise for each image
@pytest.mark.parametrize(("name", "options"), cases(stochastic=True), ids=label)
def test_image_of_a_batch_equals_the_image_alone(name, options):
    together = sampled(make("sd15", name, **options), X, 6, generator=[generator(s) for s in (5, 6)])
    for i, seed in enumerate((5, 6)):
        alone = sampled(make("sd15", name, **options), X[i : i + 1], 6, generator=generator(seed))
        assert torch.equal(together[i : i + 1], alone)
    other = sampled(make("sd15", name, **options), X, 6, generator=[generator(s) for s in (5, 7)])
    assert torch.equal(together[0], other[0]) and not torch.equal(together[1], other[1])


def test_without_a_generator_noise_is_the_global_one():
    torch.manual_seed(3)
    a = sampled(make(sampler="ddpm"), X, 4)
    torch.manual_seed(3)
    assert torch.equal(sampled(make(sampler="ddpm"), X, 4), a)
    assert not torch.equal(sampled(make(sampler="ddpm"), X, 4), a)


# ---------------------------------------------------------------------- a change of shape in mid-run
@pytest.mark.parametrize("name", ["dpmpp", "unipc", "deis", "ghvb", "pndm", "heun", "dpmpp_2s", "dpmpp_2m_sde"])
def test_change_of_shape_drops_the_history(name):
    scheduler, fresh = ready(8, sampler=name), ready(8, sampler=name)
    big = noise(2, 4, 8, 8, seed=1)
    loop_until(scheduler, X, 4)
    fresh.set_begin_index(4)
    after = loop(scheduler, big, 4, generator=generator())
    assert torch.equal(after, loop(fresh, big, 4, generator=generator()))  # as a run that begins there
    assert "call 4: the state became (2, 4, 8, 8); the history was dropped" in scheduler.explain()
    assert "dropped" not in fresh.explain()


def loop_until(scheduler, x, end):
    for t in scheduler.timesteps[:end]:
        x = scheduler.step(model(x, t), t, x, generator=generator())[0]


def test_live_history_may_be_cut_from_outside():
    """ChronoEdit drops frames in mid-run and shortens `model_outputs` in the same way."""
    scheduler, whole = ready(6), ready(6)
    x, kept = X, [0]
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(model(x, t), t, x)[0]
        if i == 2:
            x = x[kept]
            scheduler.model_outputs[:] = [p[kept] for p in scheduler.model_outputs]
    assert scheduler.last_sample is None
    assert torch.equal(x, loop(whole, X[kept]))
    assert "dropped" not in scheduler.explain()


# ---------------------------------------------------------------------- NaN from the model
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_found_at_its_call(bad):
    def predict(x, t):
        out = model(x, t)
        if t == scheduler.timesteps[2]:
            out[0, 0, 0, 0] = bad
        return out

    for mode in ("cpu", "always"):
        scheduler = ready(5, settings={"check_finite": mode})
        with pytest.raises(RunError, match=r"call 2 of 5: the model's output holds NaN or infinity.*prediction_type"):
            loop(scheduler, X, predict=predict)
        with pytest.raises(RunError, match=r"this run \(5 calls\) has ended"):  # its history holds the NaN
            scheduler.step(X, scheduler.timesteps[2], X)
    scheduler = ready(5, settings={"check_finite": "never"})
    assert not torch.isfinite(loop(scheduler, X, predict=predict)).all()


def test_large_but_finite_states_pass():
    scheduler = ready(2, settings={"check_finite": "always"})
    big = torch.full((1, 1, 64, 64), 3e36)  # the sum overflows, no value does
    assert torch.isfinite(scheduler.step(torch.zeros_like(big), scheduler.timesteps[0], big)[0]).all()


# ---------------------------------------------------------------------- the arithmetic of a row
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("name", "options"), cases(), ids=label)
def test_steps_are_the_rows_of_the_table(name, options, path):
    scheduler, x = make(path, name, **options), X.double()
    scheduler.set_timesteps(7)
    output, source = output_of(scheduler.config), generator()

    def predict(state, node, space):
        u, w = pair(output, space, node)
        return u * state + w * torch.tanh(state)

    def drawn(state):
        return torch.randn(state.shape, generator=source, dtype=state.dtype)

    states = scheduler.table.apply(x, predict, drawn, trajectory=True)
    assert len(states) == len(scheduler.table.rows) + 1
    again = generator()
    for t, state in zip(scheduler.timesteps, states[1:], strict=True):
        x = scheduler.step(torch.tanh(x), t, x, generator=again)[0]
        torch.testing.assert_close(x, state, rtol=1e-9, atol=1e-9)


def test_a_momentum_takes_one_operation():
    scheduler = ready(6, sampler="ghvb", order=2.7)
    scheduler.step(X, scheduler.timesteps[0], X)
    run = scheduler._runs.need()
    assert [c.mean is not None for c in run.rows] == [False] + [True] * 4 + [False]  # the ends have none
    other = ready(6, sampler="ghvb", order=2.7, kind="nesterov")  # a mean with more than this call's prediction
    other.step(X, other.timesteps[0], X)
    assert not any(c.mean for c in other._runs.need().rows[1:])
