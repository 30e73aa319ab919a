"""Driving a stock pipeline for a batch of prompts: calls, seconds and noise are counted at the denoiser.

Nothing here knows a sampler, so that both `generate` and `diffaccel.eval` can use it.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import ArtifactError, OptionError, no_leftover
from .plain_tensors import plain_tensors

SAMPLE = 64  # values of each tensor that the hash of a checkpoint reads


@dataclass(frozen=True)
class Driven:
    """One run of a pipeline.

    Args:
        images: (B, H, W, C) float in [0, 1].
        latents: the last state (B, ...), on the CPU; None if not asked for, or if the pipeline does not show it.
        calls: model calls of each image; a pair for classifier-free guidance counts once.
        seconds: of the whole run.
        inside: of these, inside the denoiser.
        noisy: whether noise was drawn after the first call: the scheduler is stochastic.
    """

    images: np.ndarray
    latents: torch.Tensor | None
    calls: int
    seconds: float
    inside: float
    noisy: bool


def denoiser(pipe: Any) -> Any:
    """The network that a pipeline calls at each step."""
    for name in ("transformer", "unet"):
        found = getattr(pipe, name, None)
        if isinstance(found, torch.nn.Module):
            return found
    raise OptionError(f"{type(pipe).__name__} has neither a `unet` nor a `transformer`")


def classes(pipe: Any) -> int | None:
    """How many classes a class-conditional pipeline knows; None for others."""
    if "class_labels" not in inspect.signature(pipe.__call__).parameters:
        return None
    config = denoiser(pipe).config
    return config.get("num_class_embeds") or config.get("num_embeds_ada_norm")


class Driver:
    """Runs one pipeline for batches of prompts.

    Args:
        pipe: text-to-image, or class-conditional (the prompts are then class numbers).
        options: further arguments of the pipeline's call (guidance_scale, height, ...).
        on_call: called before each pass of the denoiser.

    Raises:
        OptionError: an option that this pipeline does not take, or a pipeline that takes no prompts.
    """

    def __init__(self, pipe: Any, options: Mapping[str, Any], on_call: Callable[[], None] = lambda: None) -> None:
        self.pipe, self.options, self._on_call = pipe, dict(options), on_call
        taken = inspect.signature(pipe.__call__).parameters
        kind = type(pipe).__name__
        self.key = next((k for k in ("prompt", "class_labels") if k in taken), "")
        if not self.key:
            raise OptionError(f"{kind} takes neither prompts nor class labels: it cannot be driven")
        fixed = {self.key, "generator", "num_inference_steps", "output_type"}
        no_leftover(kind, self.options, set(taken) - fixed - {"latents", "return_dict"})
        needed = [k for k, p in taken.items() if p.default is p.empty and k not in {*fixed, *options}]
        needed = [k for k in needed if taken[k].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        if needed:
            raise OptionError(f"{kind} needs {', '.join(needed)}, which is not made here")
        self.shows_latents = "callback_on_step_end" in taken
        self.takes_sigmas = "sigmas" in taken

    def __call__(
        self,
        prompts: Sequence[str],
        generators: list[torch.Generator],
        steps: int,
        *,
        latents: bool = False,
        **more: Any,
    ) -> Driven:
        """One batch, each image from its own generator. latents: also keep the last state. more: of the call."""
        given = list(prompts) if self.key == "prompt" else [_label(p) for p in prompts]
        last: list[torch.Tensor] = []

        def keep(pipe: Any, step: int, t: Any, found: dict[str, Any]) -> dict[str, Any]:
            last[:] = [found["latents"]]
            return {}

        if latents and self.shows_latents:
            more["callback_on_step_end"] = keep
        network = denoiser(self.pipe)
        start = _now(network)
        with Passes(network, self._on_call, generators) as passes, torch.no_grad():
            found = self.pipe(
                **{self.key: given},
                **self.options,
                **more,
                generator=generators,
                num_inference_steps=steps,
                output_type="np",
            )
            noisy = passes.noise_was_drawn()
        seconds = _now(network) - start
        if not hasattr(found, "images"):
            raise OptionError(f"{type(self.pipe).__name__} makes {', '.join(found)}, not images")
        state = last[0].detach().float().cpu() if last else None
        return Driven(np.asarray(found.images), state, passes.calls, seconds, passes.inside, noisy)


def _label(text: str) -> int:
    if not text.isdecimal():
        raise OptionError(f"this model is told class numbers: a prompt must be a number, got {text!r}")
    return int(text)


def _now(network: torch.nn.Module) -> float:
    """Seconds, once everything that was asked of the network's device is done."""
    device = next(network.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Passes:
    """Counts model calls: passes of the denoiser, but two in a row on the same state (guidance done in two passes).

    Args:
        network: the denoiser; passes are seen inside the `with` block.
        on_call: called before each pass.
        generators: further sources of noise that are watched, beside torch's own.

    Attributes:
        calls: model calls so far.
        inside: seconds inside of the network.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        on_call: Callable[[], None] = lambda: None,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self.calls, self.inside = 0, 0.0
        self._network, self._on_call, self._generators = network, on_call, generators
        self._last: torch.Tensor | None = None
        self._noise: list[bytes] | None = None

    def __enter__(self) -> Passes:
        self._handles = [
            self._network.register_forward_pre_hook(self._before, with_kwargs=True),
            self._network.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = None

    def noise_was_drawn(self) -> bool:
        """Whether any source of noise moved since the first pass."""
        return self._noise is not None and self._noise != self._sources()

    def _sources(self) -> list[bytes]:
        states = [*(g.get_state() for g in self._generators), torch.get_rng_state()]
        device = next(self._network.parameters()).device
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        return [s.numpy().tobytes() for s in states]

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._on_call()
        if self._noise is None:
            self._noise = self._sources()
        given = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        state = given if isinstance(given, torch.Tensor) else None
        before = self._last
        twin = state is not None and before is not None and state.shape == before.shape and torch.equal(state, before)
        self.calls += not twin
        self._last = None if twin else state
        self._start = _now(module)

    def _after(self, module: torch.nn.Module, *_: Any) -> None:
        self.inside += _now(module) - self._start


# ---------------------------------------------------------------------- budgets of calls
def calls_near(scheduler: Any, calls: int) -> dict[int, int] | None:
    """`num_inference_steps` -> model calls that a scheduler makes with it (PNDM and Heun make more), near `calls`.

    None if it needs what only its pipeline knows (mu): the count of the first batch decides then. A number that its
    artifact has no table for is left out.
    """
    found = {}
    for steps in dict.fromkeys([calls, calls - 1, calls + 1, (calls + 1) // 2, calls // 2]):
        trial = copy.deepcopy(scheduler)
        if steps < 1:
            continue
        try:
            trial.set_timesteps(steps)
        except ArtifactError:
            continue
        except Exception:
            # A scheduler that cannot do this number at all says so in the first batch, in its own words.
            return None
        found[steps] = len(trial.timesteps)
        if found[steps] == calls:
            break
    return found


def steps_for(scheduler: Any, calls: int) -> int:
    """The `num_inference_steps` with which a scheduler makes `calls` model calls.

    Raises:
        OptionError: there is none.
        ArtifactError: there is none because the scheduler's artifact has nothing for it.
    """
    near = calls_near(scheduler, calls)
    if not near:
        return calls  # the first batch says why there is none
    exact = next((steps for steps, made in near.items() if made == calls), None)
    if exact is not None:
        return exact
    copy.deepcopy(scheduler).set_timesteps(calls)  # an artifact says what it holds
    shown = ", ".join(f"{made} ({steps} steps)" for steps, made in sorted(near.items()))
    raise OptionError(
        f"{type(scheduler).__name__} cannot spend exactly {calls} model calls; nearby it can make {shown}"
    )


# ---------------------------------------------------------------------- what an image depends on
def fingerprint(pipe: Any) -> str:
    """Hash of a pipeline's weights: names, shapes, dtypes and evenly spread values of every tensor."""
    found = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if not isinstance(part, torch.nn.Module):
            continue
        tensors = [found for key, value in part.state_dict().items() for found in plain_tensors(key, value)]
        for key, value in sorted(tensors, key=lambda pair: pair[0]):
            found.update(f"{name}.{key} {tuple(value.shape)} {value.dtype}".encode())
            flat = value.detach().flatten()
            few = flat[:: max(1, flat.numel() // SAMPLE)]
            found.update(few.to("cpu", torch.float64).numpy().tobytes())
    return found.hexdigest()


def plain_config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config as JSON, without the notes that diffusers keeps in it."""
    kept = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    return json.loads(json.dumps(kept, sort_keys=True, default=_as_list))


def _as_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def scheduler_name(scheduler: Any) -> str:
    """Class (and sampler) of a scheduler with a hash of its config, for the lines of a manifest."""
    settings = plain_config(scheduler)
    text = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    sampler = settings.get("sampler")
    return f"{type(scheduler).__name__}{f'({sampler})' if sampler else ''}-{text}"
