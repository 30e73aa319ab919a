"""Scenarios of tests/parallel/test_patch_processes.py, run in one process that forks; prints one JSON object. No test
file."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import accelerate  # noqa: F401 - imported once, before the forks
import torch
from ranks import say, timed

from diffaccel.parallel.patch import PatchHook
from diffaccel.parallel.patch_arguments import arguments
from diffaccel.parallel.patch_settings import Settings
from diffaccel.parallel.world import open_world
from diffaccel.parallel.world_emulated import EmulatedWorld
from diffaccel.pipelines.patch_parallel import patch_parallel
from diffaccel.testing.pipelines import build, call_kwargs, denoiser

WORK = Path(sys.argv[1])
TIMES = (900.0, 800.0, 700.0, 650.0, 600.0, 550.0)
torch.set_grad_enabled(False)


def chain(model, hook, times=TIMES) -> list[torch.Tensor]:
    """Calls of a denoiser whose input moves from call to call; what each returned."""
    hook.attach(model)
    found = []
    for i, t in enumerate(times):
        given = arguments(model, 17, 12, 2, 7, seed=i // 2)
        given["timestep"] = torch.tensor(t) if given["timestep"].ndim == 0 else torch.full((2,), t / 1000)
        found.append(model(**given, return_dict=False)[0])
    hook.detach(model)
    return found


CASES = {
    f"{name} {mode} {guidance}": (name, Settings(mode, guidance=guidance, warmup=None if mode == "sync" else 2))
    for name, mode, guidance in (
        ("sd15", "sync", "patches"),
        ("sd15", "displaced", "patches"),
        ("sd15", "partial", "auto"),
        ("sd15", "fresh_halo", "patches"),
        ("sdxl", "fresh_halo", "auto"),
        ("sd3", "partial", "patches"),
        ("sd3", "fresh_halo", "patches"),
        ("flux", "displaced", "patches"),
    )
}
MODELS = {name: denoiser(build(name)) for name in ("sd15", "sdxl", "sd3", "flux")}
PIPE = build("sd15")


def same_as_emulated() -> int:
    """Every case, on real ranks; rank 0 keeps the results for the test."""
    world = open_world(cpu=True, timeout=30)
    for name, (model, settings) in CASES.items():
        found = chain(MODELS[model], PatchHook(world, settings))
        torch.save(
            {"outputs": found, "bytes": dict(world.traffic.bytes)}, WORK / f"{name} {world.size} {world.rank}.pt"
        )
    world.close()
    return 0


def emulated(ranks: int) -> None:
    """The same on emulated ranks, for all of them."""
    for name, (model, settings) in CASES.items():
        world = EmulatedWorld(ranks)
        found = chain(MODELS[model], PatchHook(world, settings))
        counted = [dict(t.bytes) for t in world.traffics]
        torch.save({"outputs": found, "bytes": counted}, WORK / f"{name} {ranks} emulated.pt")


def image() -> int:
    """A whole pipeline through the public function, twice, without a generator: all ranks get the seed of rank 0."""
    with patch_parallel(PIPE, "displaced", warmup=2, guidance="patches", timeout=20) as h:
        torch.manual_seed(h.world.rank)  # which would give other images
        kwargs = call_kwargs("sd15", generator=None)
        first = h(**kwargs).images
        kwargs = call_kwargs("sd15")
        second, third = h(**kwargs).images, h(**call_kwargs("sd15")).images
    torch.save([first, second, third], WORK / f"image {h.world.size} {h.world.rank}.pt")
    h.world.close()
    return 0


def _fail(act) -> int:
    """Run a pipeline of which one rank does something else; print what each rank is told."""
    world = open_world(cpu=True, timeout=15)
    world.timeout = 4 if act is hangs else 15
    try:
        chosen = "displaced" if act is mode and world.rank == 1 else "sync"
        h = patch_parallel(PIPE, chosen, guidance="patches", world=world)
        h.pipe(**act(world, call_kwargs("sd15", num_inference_steps=6)))
    except Exception as error:
        say(f"RANK {world.rank} {type(error).__name__}: {error}")
        return 2
    finally:
        world.close()
    return 0


def at_call(world, kwargs, then):
    """Do something in the middle of rank 1's run."""

    def callback(pipe, step, timestep, values):
        if world.rank == 1 and step == 2:
            then()
        return {}

    return {**kwargs, "callback_on_step_end": callback}


def raises(world, kwargs):
    def broken(module, args):
        if world.rank == 1:
            raise MemoryError("out of memory")

    PIPE.unet.mid_block.register_forward_pre_hook(broken)
    return kwargs


def dies(world, kwargs):
    return at_call(world, kwargs, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hangs(world, kwargs):
    return at_call(world, kwargs, lambda: time.sleep(8))


def seed(world, kwargs):
    return {**kwargs, "generator": torch.Generator("cpu").manual_seed(world.rank)}


def prompt(world, kwargs):
    return {**kwargs, "prompt": "a red fox" if world.rank == 0 else "a blue fox"}


def size(world, kwargs):
    return {**kwargs, "height": 32 if world.rank == 0 else 48}


def steps(world, kwargs):
    return {**kwargs, "num_inference_steps": 6 + world.rank}


def mode(world, kwargs):
    return kwargs  # what differs is chosen in _fail


def failing(act):
    return lambda: _fail(act)


found = {
    "same 2": timed(2, same_as_emulated, WORK / "same 2.log"),
    "same 4": timed(4, same_as_emulated, WORK / "same 4.log"),
    "image": timed(3, image, WORK / "image.log"),
    **{
        act.__name__: timed(3 if act in (raises, dies) else 2, failing(act), WORK / f"{act.__name__}.log")
        for act in (raises, dies, hangs, seed, prompt, size, steps, mode)
    },
}
emulated(2)  # after the forks: a process with threads is not to be forked
emulated(4)
print(json.dumps(found))
