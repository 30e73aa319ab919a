"""`step` never waits for the device: it reads no value of a tensor that lives there."""

from __future__ import annotations

import pytest
import torch
from scheduler_runs import PATHS, cases, generator, label, loop, make, model, noise
from torch.utils._python_dispatch import TorchDispatchMode

# `aten.equal` is left out: it compares `sigmas` with its copy, both of which are on the CPU by contract
READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.masked_select")
META = torch.device("meta")


class NoReads(TorchDispatchMode):
    """Raises on every operation whose result Python must know."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(READS):
            raise AssertionError(f"{func} reads a tensor")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "options"), cases(), ids=label)
def test_whole_loop_on_the_meta_device(name, options):
    """Nothing on the meta device has a value, so any read raises."""
    for path, begin in (("sd15", 0), ("flow", 0), ("edm", 0), ("sd15", 3)):
        scheduler = make(path, name, **options)
        scheduler.set_timesteps(6, device=META)
        if begin and scheduler._sampler()[0].begin is not None and "churn" in str(options):
            continue  # such a run has no node to begin at, and says so
        scheduler.set_begin_index(begin)
        x = torch.empty(2, 4, 4, 4, device=META, dtype=torch.float16)
        out = loop(scheduler, x, begin, predict=lambda x, t: torch.cat([x, x], dim=1))
        assert out.device == META and out.shape == x.shape and out.dtype == x.dtype
        assert scheduler.step_index == 6


@pytest.mark.parametrize("path", PATHS)
def test_policies_and_scaling_on_the_meta_device(path):
    for policy in ({"clip_sample": True}, {"thresholding": True}):
        scheduler = make(path, settings=policy)
        scheduler.set_timesteps(4, device=META)
        scheduler.set_begin_index(0)
        loop(scheduler, torch.empty(2, 3, 4, 4, device=META), predict=lambda x, t: x * 1.0)
        assert scheduler.step_index == 4


def test_the_meta_device_raises_on_a_read():
    """The instrument works: a run that must compare its first timestep by value cannot do so on meta."""
    scheduler = make()
    scheduler.set_timesteps(4, device=META)
    x = torch.empty(1, 4, device=META)
    with pytest.raises(RuntimeError, match="meta"):
        scheduler.step(x, torch.empty((), device=META), x)


@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("path", ["sd15", "flow", "edm"])
def test_first_timestep_is_known_by_its_place_in_memory(path, begin):
    """A pipeline that never calls set_begin_index hands in elements of `timesteps`, or of a slice of them."""
    scheduler = make(path, settings={"check_finite": "never"})
    scheduler.set_timesteps(6)
    x, given = noise(1, 4, 4, 4), scheduler.timesteps[begin:]
    with NoReads():
        for t in given:
            x = scheduler.step(scheduler.scale_model_input(x, t) * 0.1, t, x)[0]
    assert scheduler.step_index == 6
    assert torch.isfinite(x).all()


def test_a_foreign_timestep_is_read_once():
    scheduler = make(settings={"check_finite": "never"})
    scheduler.set_timesteps(4)
    x, (first, *rest) = noise(1, 4), scheduler.timesteps.clone()
    with pytest.raises(AssertionError, match="reads a tensor"), NoReads():
        scheduler.step(x, first, x)
    x = scheduler.step(x, first, x)[0]
    with NoReads():
        for t in rest:
            x = scheduler.step(x, t, x)[0]


@pytest.mark.parametrize("place", ["begin", "middle"])
def test_noise_helpers_read_nothing_during_a_run(place):
    scheduler = make(settings={"check_finite": "never"})
    scheduler.set_timesteps(6, device=META)
    scheduler.set_begin_index(2)
    x, t = torch.empty(2, 4, 4, 4, device=META), torch.empty((), device=META)
    if place == "middle":
        scheduler.step(x, t, x)
    assert scheduler.add_noise(x, x, t[None].repeat(2)).device == META
    assert scheduler.scale_noise(x, t[None], x).shape == x.shape


def test_finite_check_reads_nothing_on_devices():
    """The default looks for NaN only where the state is on the CPU; "always" looks everywhere."""
    scheduler = make(settings={"check_finite": "always"})
    scheduler.set_timesteps(4, device=META)
    scheduler.set_begin_index(0)
    x = torch.empty(1, 4, device=META)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_generator_on_the_cpu_serves_a_state_elsewhere():
    scheduler = make(sampler="ddpm")
    scheduler.set_timesteps(4, device=META)
    scheduler.set_begin_index(0)
    x = torch.empty(1, 4, device=META)
    assert loop(scheduler, x, predict=lambda x, t: x * 1.0, generator=generator()).device == META
    assert model(x, 1.0).device == META
