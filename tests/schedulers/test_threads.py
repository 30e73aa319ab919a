"""One scheduler for many threads, copies in mid-run, and pickles."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scheduler_runs import generator, loop, make, model, noise, sampled

from diffaccel import TableScheduler
from diffaccel.errors import RunError
from diffaccel.testing.pipelines import build, call_kwargs

X = noise(1, 4, 8, 8)


def in_threads(work, jobs, count):
    """`work(job)` of all jobs in `count` threads that start together."""
    barrier = threading.Barrier(count)

    def many(mine):
        barrier.wait()
        return [work(job) for job in mine]

    with ThreadPoolExecutor(count) as pool:
        parts = list(pool.map(many, [jobs[i::count] for i in range(count)]))
    return {job: out for i, part in enumerate(parts) for job, out in zip(jobs[i::count], part, strict=True)}


# ---------------------------------------------------------------------- threads
@pytest.mark.parametrize("name", ["unipc", "dpmpp_2m_sde", "ghvb"])
def test_eight_threads_of_twenty_runs_equal_the_serial_runs(name):
    """Each run has its own number of calls, begin and seed."""
    shared = make("sd15", name)

    def run(job):
        calls, seed = job
        begin = seed % 3
        shared.set_timesteps(calls)
        shared.set_begin_index(begin)
        x = shared.add_noise(noise(*X.shape, seed=seed), noise(*X.shape, seed=seed + 1), shared.timesteps[begin])
        out = loop(shared, x, begin, generator=generator(seed))
        assert shared.step_index == shared.num_inference_steps == len(shared.timesteps) == calls
        return out

    jobs = [(4 + (thread + turn) % 9, 20 * thread + turn) for thread in range(8) for turn in range(20)]
    serial = {job: run(job) for job in jobs}
    together = in_threads(run, jobs, 8)
    assert all(torch.equal(serial[job], together[job]) for job in jobs)


@pytest.mark.parametrize(("sampler", "options"), [("unipc", {"order": 3}), ("dpmpp_2m_sde", {})])
def test_eight_threads_of_twenty_runs_share_a_pipeline(sampler, options):
    """Prompts are embedded beforehand: tokenizers keep their padding in shared state, and mix up threads."""
    pipe = build("sd15")
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt("a red fox", "cpu", 1, True, "")))
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler=sampler, **options)

    def run(job):
        calls, seed = job
        return pipe(**call_kwargs("sd15", num_inference_steps=calls, seed=seed, prompt=None, **embeds)).images

    jobs = [(2 + seed % 3, seed) for seed in range(160)]
    serial = {job: run(job) for job in jobs}
    together = in_threads(run, jobs, 8)
    assert {job: float((serial[job] - together[job]).abs().max()) for job in jobs} == dict.fromkeys(jobs, 0.0)
    assert len({tuple(out.flatten()[:4].tolist()) for out in serial.values()}) == len(jobs)


def test_a_thread_without_a_run_sees_the_last_one():
    shared = make()
    shared.set_timesteps(6)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: len(shared.timesteps)).result() == 6
        pool.submit(shared.set_timesteps, 3).result()
        assert pool.submit(lambda: len(shared.timesteps)).result() == 3
    assert len(shared.timesteps) == 6 == shared.num_inference_steps


# ---------------------------------------------------------------------- copies
@pytest.mark.parametrize("name", ["dpmpp", "unipc", "deis", "heun", "ghvb", "dpmpp_3m_sde"])
@pytest.mark.parametrize("at", [0, 1, 4, 8])
def test_deepcopy_in_mid_run_goes_on_by_itself(name, at):
    """LTX2 copies its scheduler for the audio."""
    scheduler = make("sd15", name)
    whole = sampled(make("sd15", name), X, 8, generator=generator())
    scheduler.set_timesteps(8)
    source, x = generator(), X
    for t in scheduler.timesteps[:at]:
        x = scheduler.step(model(x, t), t, x, generator=source)[0]
    twin, state = copy.deepcopy(scheduler), source.get_state()
    assert twin.step_index == scheduler.step_index
    a = loop(scheduler, x, at, generator=source)
    assert scheduler.step_index == 8 and twin.step_index == (at or None)
    again = generator()
    again.set_state(state)
    assert torch.equal(loop(twin, x, at, generator=again), a)
    assert torch.equal(a, whole)
    twin.set_timesteps(3)
    assert scheduler.num_inference_steps == 8
    twin.register_to_config(clip_sample_range=2.0)
    assert scheduler.config.clip_sample_range == 1.0


def test_pickle_keeps_the_settings_and_drops_the_run():
    scheduler = make("flow", "unipc", order=3)
    scheduler.set_timesteps(4)
    table = scheduler.table
    scheduler.step(X, scheduler.timesteps[0], X)
    twin = pickle.loads(pickle.dumps(scheduler))
    assert type(twin) is TableScheduler and dict(twin.config) == dict(scheduler.config)
    assert twin.num_inference_steps is None
    with pytest.raises(RunError, match="call set_timesteps"):
        twin.step(X, 1000.0, X)
    twin.set_timesteps(4)
    assert twin.table == table
