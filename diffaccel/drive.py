"""Driving a stock pipeline for a batch of prompts: calls, seconds and noise are counted at the denoiser.

Nothing here knows a sampler, so that both `generate` and `diffaccel.eval` can use it.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import ArtifactError, OptionError, RunError, no_leftover
from .plain_tensors import plain_tensors

SAMPLE = 64  # values of each tensor that the hash of a checkpoint reads
SIDES = ("height", "width")
TEXTS = re.compile(r"(negative_)?prompt(_\d)?")  # arguments that pipelines want in the type of `prompt`


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


def sized(pipe: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` of a pipeline's call with both sides of an image, or with none: pipelines of Stable Diffusion take
    their own size without a word unless both are given.

    Raises:
        OptionError: a side below 1 pixel, or one side alone where the pipeline's own size is not known.
    """
    given = {k: options[k] for k in SIDES if options.get(k) is not None}
    for side, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OptionError(f"{side} is a whole number of pixels, 1 or more; got {value!r}")
    other = "width" if "height" in given else "height"
    # an option that the call does not take is refused where the others are
    if len(given) != 1 or other not in inspect.signature(pipe.__call__).parameters:
        return dict(options)
    own = _own_side(pipe, other)
    if own is None:
        raise OptionError(f"the own size of {type(pipe).__name__} is not known: give height and width, not one of them")
    return {**options, other: own}


def _own_side(pipe: Any, side: str) -> int | None:
    """Height or width that a pipeline takes where none is given; None if it cannot be told."""
    named = inspect.signature(pipe.__call__).parameters[side].default
    if isinstance(named, int):
        return named
    found = getattr(pipe, "default_sample_size", None) or denoiser(pipe).config.get("sample_size")
    if isinstance(found, (list, tuple)):
        found = found[SIDES.index(side) - len(SIDES)] if len(found) >= len(SIDES) else None
    factor = getattr(pipe, "vae_scale_factor", None)
    return found * factor if isinstance(found, int) and isinstance(factor, int) else None


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
        self.options = sized(pipe, self.options)
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
        last: list[torch.Tensor] = []

        def keep(pipe: Any, step: int, t: Any, found: dict[str, Any]) -> dict[str, Any]:
            last[:] = [found["latents"]]
            return {}

        if latents and self.shows_latents:
            more["callback_on_step_end"] = keep
        network = denoiser(self.pipe)
        start = _now(network)
        noise = noise_of(generators, self.pipe.scheduler, next(network.parameters()).device)
        with noise, Passes(network, self._on_call, generators) as passes, torch.no_grad():
            found = self.pipe(
                **asked(self.key, prompts, {**self.options, **more}),
                generator=generators,
                num_inference_steps=steps,
                output_type="np",
            )
            noisy = passes.noise_was_drawn()
        seconds = _now(network) - start
        if not hasattr(found, "images"):
            raise OptionError(f"{type(self.pipe).__name__} makes {', '.join(found)}, not images")
        images = np.asarray(found.images)
        self._check_size(images)
        state = last[0].detach().float().cpu() if last else None
        return Driven(images, state, passes.calls, seconds, passes.inside, noisy)

    def _check_size(self, images: np.ndarray) -> None:
        if any(self.options.get(k) not in (None, n) for k, n in zip(SIDES, images.shape[1:3])):
            asked, made = "x".join(str(self.options.get(k)) for k in SIDES), "x".join(map(str, images.shape[1:3]))
            raise RunError(
                f"{type(self.pipe).__name__} was asked for images of {asked} pixels (height x width) and made {made}; "
                "ask for a size that it can make"
            )


@contextmanager
def noise_of(generators: list[torch.Generator], scheduler: Any, device: torch.device) -> Iterator[None]:
    """All noise comes from these generators: also that of a scheduler whose pipeline gives it none (SD3, FLUX), and
    what is drawn from torch's own source, which is seeded by them and put back."""
    digest = hashlib.sha256(repr([g.initial_seed() for g in generators]).encode()).digest()
    seed = int.from_bytes(digest[:8], "big") >> 1
    on_gpu = device.type == "cuda"
    # schedulers of this package have the attribute; it is their source where `step` gets no generator
    takes_them = hasattr(scheduler, "generator")
    before = scheduler.generator if takes_them else None
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        try:
            if takes_them:
                scheduler.generator = generators
            yield
        finally:
            if takes_them:
                scheduler.generator = before


def asked(key: str, prompts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a pipeline's call for these prompts (`key` "prompt") or classes, in which every text of `options`
    that belongs to a prompt (negative_prompt, prompt_2, ...) stands once for each prompt.

    Raises:
        OptionError: a class that is no number.
    """
    if key != "prompt":
        return {key: [_label(p) for p in prompts], **options}
    texts = {k: [v] * len(prompts) for k, v in options.items() if isinstance(v, str) and TEXTS.fullmatch(k)}
    return {key: list(prompts), **options, **texts}


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
    """`num_inference_steps` -> model calls that a scheduler makes with it (PNDM and Heun make more): all numbers up to
    one more than `calls` (and on from there, where none of those can be done), until one makes exactly `calls`.

    None if it needs what only its pipeline knows (mu): the count of the first batch decides then. A number that it
    cannot do, or that its artifact has no table for, is left out.
    """
    found: dict[int, int] = {}
    unknown = False
    likely = [calls, calls - 1, calls + 1, (calls + 1) // 2, calls // 2]
    for steps in dict.fromkeys([*likely, *range(calls - 2, 0, -1), *range(calls + 2, calls + 9)]):
        if steps < 1 or (steps > calls + 1 and found):
            continue
        trial = copy.deepcopy(scheduler)
        try:
            trial.set_timesteps(steps)
        except ArtifactError:
            continue
        except Exception:  # diffusers' schedulers raise whatever they like: for mu, and for too few steps
            unknown = True
            continue
        found[steps] = len(trial.timesteps)
        if found[steps] == calls:
            break
    return None if unknown and not found else found


def steps_for(scheduler: Any, calls: int) -> int:
    """The `num_inference_steps` with which a scheduler makes `calls` model calls.

    Raises:
        OptionError: there is none.
        ArtifactError: there is none because the scheduler's artifact has nothing for it.
    """
    near = calls_near(scheduler, calls)
    if near is None:
        return calls  # the first batch says why there is none
    exact = next((steps for steps, made in near.items() if made == calls), None)
    if exact is not None:
        return exact
    try:
        copy.deepcopy(scheduler).set_timesteps(calls)
    except ArtifactError:
        raise  # it says what the artifact holds
    except Exception:  # too few steps for this scheduler: what it can do is said below
        pass
    by_calls = {made: steps for steps, made in near.items()}
    sides = [m for m in by_calls if m < calls], [m for m in by_calls if m > calls]
    nearest = [choose(side) for choose, side in zip((max, min), sides) if side]
    shown = ", ".join(f"{made} ({by_calls[made]} steps)" for made in nearest)
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
    """A scheduler's config as JSON, without the notes that diffusers keeps in it; infinite values are their names."""
    kept = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    return json.loads(json.dumps(kept, sort_keys=True, default=_as_list), parse_constant=str)


def _as_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def scheduler_name(scheduler: Any) -> str:
    """Class (and sampler) of a scheduler with a hash of its config, for the lines of a manifest."""
    settings = plain_config(scheduler)
    text = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    sampler = settings.get("sampler")
    return f"{type(scheduler).__name__}{f'({sampler})' if sampler else ''}-{text}"
