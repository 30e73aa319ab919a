"""Running one pipeline with many schedulers from the same noise, and measuring how far each lands from a teacher.

Nothing here re-implements a pipeline: the stock `__call__` runs, and model calls are counted at the denoiser.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from .core.families import Flow
from .drive import Passes, denoiser
from .errors import OptionError
from .schedulers import TableScheduler
from .schedulers.from_config import read


@dataclass(frozen=True)
class Candidate:
    """One scheduler setting.

    Args:
        name: for tables.
        stock: whether it is one of diffusers' own.
        make: from the config of the pipeline's scheduler.
        steps: `num_inference_steps` that makes this many model calls; None where no number does.
        ramp: pass `sigmas=linspace(1, 1/n, n)`, without which flow-matching Euler spends its last call on nothing.
    """

    name: str
    stock: bool
    make: Callable[[Mapping[str, Any]], Any]
    steps: Callable[[int], int | None] = int
    ramp: bool = False


@dataclass(frozen=True)
class Job:
    """What is generated: the same for every candidate.

    Args:
        inputs: arguments of the pipeline's call but the number of steps (prompts, guidance, size).
        latents: (B, ...) standard normal start noise.
    """

    inputs: Mapping[str, Any]
    latents: torch.Tensor


@dataclass(frozen=True)
class Outcome:
    """One run: final latents (B, ...) float32, model calls for each image, seconds."""

    latents: torch.Tensor
    calls: int
    seconds: float = field(compare=False)


# ---------------------------------------------------------------------- running
def counted(pipe: Any) -> Passes:
    """Count the model calls of a pipeline: `with counted(pipe) as count: ...; count.calls`."""
    return Passes(denoiser(pipe))


def generate(pipe: Any, scheduler: Any, steps: int, job: Job, *, ramp: bool = False, output: str = "latent") -> Outcome:
    """One run of the stock pipeline with another scheduler; the pipeline's own is put back afterwards.

    With `output="np"` the outcome's `latents` are images (B, 3, H, W) in [0, 1].
    """
    before, extra = pipe.scheduler, {}
    if ramp:
        extra["sigmas"] = torch.linspace(1.0, 1.0 / steps, steps).tolist()
    pipe.scheduler = scheduler
    try:
        with counted(pipe) as count, torch.no_grad():
            start = time.perf_counter()
            found = pipe(
                **job.inputs, **extra, latents=job.latents.clone(), num_inference_steps=steps, output_type=output
            ).images
            seconds = time.perf_counter() - start
    finally:
        pipe.scheduler = before
    result = found if isinstance(found, torch.Tensor) else torch.from_numpy(found).movedim(-1, 1)
    return Outcome(result.float().cpu(), count.calls, seconds)


def run(pipe: Any, candidate: Candidate, calls: int, job: Job, *, output: str = "latent") -> Outcome | None:
    """`generate` with a candidate at a budget of model calls; None if it cannot spend exactly that many.

    Raises:
        OptionError: if the denoiser saw another number of calls than was asked for.
    """
    steps = candidate.steps(calls)
    if steps is None:
        return None
    scheduler = candidate.make(pipe.scheduler.config)
    outcome = generate(pipe, scheduler, steps, job, ramp=candidate.ramp, output=output)
    if outcome.calls != calls:
        raise OptionError(f"{candidate.name} was asked for {calls} model calls and made {outcome.calls}")
    return outcome


def errors(outcome: Outcome, teacher: Outcome) -> torch.Tensor:
    """Relative distance of each image to the teacher's, `|z - z*| / |z*|`, (B,) float64; a NaN counts as infinity."""
    z, target = outcome.latents.double().flatten(1), teacher.latents.double().flatten(1)
    return ((z - target).norm(dim=1) / target.norm(dim=1)).nan_to_num(nan=float("inf"))


# ---------------------------------------------------------------------- candidates
def _odd(calls: int) -> int | None:
    return (calls + 1) // 2 if calls % 2 else None


def _stock(cls: str, name: str, steps: Callable[[int], int | None] = int, ramp: bool = False, **more: Any) -> Candidate:
    def make(config: Mapping[str, Any]) -> Any:
        return getattr(diffusers, cls).from_config(config, **more)

    return Candidate(name, True, make, steps, ramp)


def ours(
    sampler: str, grid: str | None = None, *, grid_options: dict[str, Any] | None = None, **options: Any
) -> Candidate:
    """`TableScheduler` with this sampler and grid."""

    def make(config: Mapping[str, Any]) -> Any:
        chosen = {} if grid is None else {"grid": grid, "grid_options": grid_options or {}}
        return TableScheduler.from_config(config, sampler=sampler, **chosen, **options)

    shown = [*(f"{k}={v}" for k, v in options.items()), *([grid] if grid else [])]
    shown += [f"{k}={v}" for k, v in (grid_options or {}).items()]
    return Candidate(f"diffaccel {sampler}({', '.join(map(str, shown))})", False, make)


def stock(config: Mapping[str, Any]) -> list[Candidate]:
    """Every deterministic scheduler of diffusers that accepts the path of this config, on all its grids.

    Stochastic ones are left out: they have no paired error to a teacher. So are the first-order forms of DPM-Solver++
    and DEIS, which are DDIM.
    """
    return _stock_flow(config) if isinstance(read(config).path, Flow) else _stock_vp()


SIGMAS: dict[str, str] = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}


def _stock_vp() -> list[Candidate]:
    found = []
    for spacing in ("linspace", "leading", "trailing"):
        at: dict[str, Any] = {"timestep_spacing": spacing}
        found.append(_stock("DDIMScheduler", f"DDIM {spacing}", clip_sample=False, **at))
        found.append(_stock("PNDMScheduler", f"PNDM {spacing}", lambda n: n - 1 or None, skip_prk_steps=True, **at))
        found.append(_stock("EulerDiscreteScheduler", f"Euler {spacing}", **at))
        found.append(_stock("HeunDiscreteScheduler", f"Heun {spacing}", _odd, **at))
        found.append(_stock("KDPM2DiscreteScheduler", f"KDPM2 {spacing}", _odd, **at))
        found.append(_stock("LMSDiscreteScheduler", f"LMS {spacing}", **at))
        found += [
            _stock(cls, f"{short}-{order} {spacing} {final}", solver_order=order, final_sigmas_type=final, **at, **more)
            for cls, short, orders, more in _MULTISTEP
            for order in orders
            for final in ("zero", "sigma_min")
        ]
    for name, key in {**SIGMAS, "lu": "use_lu_lambdas"}.items():
        on: dict[str, Any] = {key: True}
        found += [
            _stock(cls, f"{short}-{order} {name}", solver_order=order, **on, **more)
            for cls, short, orders, more in _MULTISTEP
            for order in orders
            if name != "lu" or short == "DPM++"
        ]
        if name != "lu":
            found.append(_stock("EulerDiscreteScheduler", f"Euler {name}", **on))
            found.append(_stock("HeunDiscreteScheduler", f"Heun {name}", _odd, **on))
            found.append(_stock("KDPM2DiscreteScheduler", f"KDPM2 {name}", _odd, **on))
            found.append(_stock("LMSDiscreteScheduler", f"LMS {name}", **on))
    return found


_MULTISTEP: tuple[tuple[str, str, tuple[int, ...], dict[str, Any]], ...] = (
    ("DPMSolverMultistepScheduler", "DPM++", (2, 3), {}),
    ("DPMSolverSinglestepScheduler", "DPM++ single", (2, 3), {}),
    ("UniPCMultistepScheduler", "UniPC", (1, 2, 3), {}),
    ("UniPCMultistepScheduler", "UniPC bh1", (2, 3), {"solver_type": "bh1"}),
    ("DEISMultistepScheduler", "DEIS", (2, 3), {}),
)


def _stock_flow(config: Mapping[str, Any]) -> list[Candidate]:
    shift = config.get("shift", config.get("flow_shift", 1.0))
    flow: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    euler = "FlowMatchEulerDiscreteScheduler"
    found = [
        _stock(euler, "flow Euler (as shipped)"),
        _stock(euler, "flow Euler, explicit sigmas", ramp=True),
        *(_stock(euler, f"flow Euler {name}", int, True, **{key: True}) for name, key in SIGMAS.items()),
        _stock("FlowMatchHeunDiscreteScheduler", "flow Heun", _odd),
    ]
    found += [
        _stock(cls, f"{short}-{order} flow {final}", solver_order=order, final_sigmas_type=final, **flow, **more)
        for cls, short, orders, more in _MULTISTEP
        for order in orders
        for final in ("zero", "sigma_min")
        if not (short == "DEIS" and final == "sigma_min")  # DEIS has no such setting
    ]
    return found


def teacher(config: Mapping[str, Any]) -> Candidate:
    """diffusers' own second-order solver; run it at many calls.

    On a Karras grid where there is one: timesteps that are spread evenly leave a jump in noise before the end (on
    tiny-pixel 100 calls land .0008 from 200 on the Karras grid there, .015 on even timesteps).
    """
    if isinstance(read(config).path, Flow):
        return next(c for c in stock(config) if c.name == "DPM++-2 flow zero")
    return next(c for c in stock(config) if c.name == "DPM++-2 karras")


def job_for(pipe: Any, name: str, images: int, seed: int, *, guidance: float = 4.0, size: int = 32) -> Job:
    """Prompts and noise for an embedded model.

    Args:
        pipe: from `diffaccel.models.load(name)`.
        name: "tiny-sd", "tiny-flow" or "tiny-pixel" (class labels, no guidance).
        images: batch size B.
        seed: of prompts and noise; image i of a seed is the same whatever B is.
        size: pixels.
    """
    from . import models

    generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(images)]
    if name == "tiny-pixel":
        shape: tuple[int, ...] = (1, pipe.unet.config.in_channels, size, size)
        inputs: dict[str, Any] = {"class_labels": models.labels(images, seed)}
    else:
        shape = (1, denoiser(pipe).config.in_channels, size // pipe.vae_scale_factor, size // pipe.vae_scale_factor)
        inputs = {"prompt": models.prompts(images, seed), "guidance_scale": guidance, "height": size, "width": size}
        inputs |= models.CALL_DEFAULTS.get(name, {})
    return Job(inputs, torch.cat([torch.randn(*shape, generator=g) for g in generators]))
