"""Scenarios of tests/parallel/test_ulysses.py, run in one process that forks; prints one JSON object. No test file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import accelerate  # noqa: F401 - imported once, before the forks
import torch
from ranks import say, timed

from diffaccel.denoiser.contract import hooks_of
from diffaccel.errors import OptionError
from diffaccel.parallel.patch_settings import Settings
from diffaccel.parallel.ulysses import UlyssesHook
from diffaccel.parallel.world import open_world
from diffaccel.pipelines.patch_parallel import patch_parallel
from diffaccel.testing.pipelines import build, call_kwargs, denoiser

WORK = Path(sys.argv[1])
torch.set_grad_enabled(False)
PIPES = {name: build(name) for name in ("qwen_image", "wan", "flux")}
for pipe in PIPES.values():
    pipe.set_progress_bar_config(disable=True)


def final(name: str, **changes) -> torch.Tensor:
    return PIPES[name](**{**call_kwargs(name), "output_type": "latent", **changes})[0]


def traces(model) -> list[str]:
    """Hooks left on a model (an empty registry is what `cache_context` of the pipeline itself leaves)."""
    return [name for name, _ in hooks_of(model)]


def same() -> int:
    """Pipelines that only diffusers can share, through the public function; FLUX, by asking for the hook."""
    world = open_world(cpu=True, timeout=30)
    for name in ("qwen_image", "wan"):
        before = final(name)
        with patch_parallel(PIPES[name], "sync", world=world) as h:
            shared = [h(**{**call_kwargs(name), "output_type": "latent"})[0] for _ in range(2)]
            report, text = h.report(), h.explain(32, 32)
        found = {"before": before, "shared": shared, "after": final(name), "traces": traces(denoiser(PIPES[name]))}
        torch.save({**found, "calls": report.calls, "text": f"{report}\n{text}"}, WORK / f"{name} {world.rank}.pt")
    model, before = denoiser(PIPES["flux"]), final("flux")
    hook = UlyssesHook(world, Settings("sync"), lambda: PIPES["flux"].scheduler.timesteps, dict)
    hook.attach(model)
    shared = [final("flux"), final("flux")]
    hook.detach(model)
    found = {"before": before, "shared": shared, "after": final("flux"), "traces": traces(model)}
    torch.save({**found, "calls": hook.calls, "text": ""}, WORK / f"flux {world.rank}.pt")
    world.close()
    return 0


def told(act) -> int:
    """What each rank is told when one of them does something else."""
    world = open_world(cpu=True, timeout=20)
    try:
        act(world)
    except Exception as error:
        say(f"RANK {world.rank} {type(error).__name__}: {error}")
        return 2
    finally:
        world.close()
    return 0


def prompt(world) -> None:
    with patch_parallel(PIPES["qwen_image"], "sync", world=world) as h:
        h.pipe(**call_kwargs("qwen_image", prompt="a red fox" if world.rank == 0 else "a blue fox"))


def raises(world) -> None:
    def broken(module, args):
        if world.rank == 1:
            raise MemoryError("out of memory")

    PIPES["qwen_image"].transformer.transformer_blocks[0].register_forward_pre_hook(broken)
    with patch_parallel(PIPES["qwen_image"], "sync", world=world) as h:
        h.pipe(**call_kwargs("qwen_image"))


def heads(world) -> None:
    patch_parallel(PIPES["qwen_image"], "sync", world=world)


def late(world) -> None:
    patch_parallel(PIPES["wan"], "displaced", world=world)


def split(world) -> None:
    patch_parallel(PIPES["wan"], "sync", guidance="split", world=world)


def twice(world) -> None:
    with patch_parallel(PIPES["wan"], "sync", world=world):
        try:
            patch_parallel(PIPES["wan"], "sync", world=world)
        except OptionError as error:
            raise OptionError(f"as it should: {error}") from error


def of(act):
    return lambda: told(act)


found = {"same": timed(2, same, WORK / "same.log")}
for act, ranks in ((prompt, 2), (raises, 2), (heads, 3), (late, 2), (split, 2), (twice, 2)):
    found[act.__name__] = timed(ranks, of(act), WORK / f"{act.__name__}.log")
print(json.dumps(found))
