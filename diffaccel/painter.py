"""From the name of a model to a function that paints a chunk of images, with model calls counted at the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import torch

from . import models
from . import schedulers as ours
from .drive import Driver, steps_for
from .errors import DiffaccelError, OptionError, RunError, no_leftover, one_of
from .parallel.generate import Painted, Task
from .samplers.registry import samplers

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# ---------------------------------------------------------------------- model
def load(model: str, dtype: str = "float32") -> Any:
    """The pipeline of an embedded model, a folder or a hub id, on the CPU, without bars.

    Raises:
        OptionError: no such model or dtype; the message says what diffusers said.
    """
    wanted = DTYPES[one_of("dtype", dtype, DTYPES)]
    from diffusers.pipelines import pipeline_utils

    option = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
    try:
        if model in models.names():
            pipe = models.load(model, torch_dtype=wanted)
        else:
            pipe = diffusers.DiffusionPipeline.from_pretrained(model, **{option: wanted})
    except (OSError, ValueError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OptionError(
            f"cannot load the model {model!r}: {said} (a model is {', '.join(models.names())}, a folder saved by "
            "diffusers, or a hub id)"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------------- scheduler
def scheduler_for(config: Mapping[str, Any], own: type, name: str | None, options: Mapping[str, Any]) -> Any:
    """A scheduler for the model that `config` belongs to.

    Args:
        config: of the checkpoint's scheduler.
        own: its class, taken where `name` is None.
        name: a registered sampler, a scheduler class of diffaccel, or one of diffusers.
        options: of the sampler or the class.

    Raises:
        OptionError: an unknown name or option.
    """
    if name is None and "artifact" in options:
        own = ours.TableScheduler  # the artifact says which sampler
    kind: Any = own if name is None else _scheduler_class(name)
    if issubclass(kind, ours.TableScheduler):
        chosen = {"sampler": name} if name in samplers() else {}
        # a NaN is counted image by image; an error would end the whole run
        return kind.from_config(config, **{"check_finite": "never", **chosen, **options})
    no_leftover(kind.__name__, options, kind._get_init_keys(kind) - {"self"})
    try:
        return kind.from_config(config, **options)
    except DiffaccelError:
        raise
    except Exception as error:  # whatever diffusers says of a config that this class cannot read
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OptionError(f"{kind.__name__} cannot be made from this checkpoint's scheduler config: {said}") from error


def _scheduler_class(name: str) -> Any:
    if name in samplers():
        return ours.TableScheduler
    mine = [n for n in ours.__all__ if n.endswith("Scheduler")]
    stock = [n for n in dir(diffusers) if n.endswith("Scheduler") and "Flax" not in n]
    one_of("scheduler", name, {*samplers(), *mine, *stock})
    return getattr(ours if name in mine else diffusers, name)


# ---------------------------------------------------------------------- painting
class Painter:
    """Paints chunks with one pipeline; every image gets exactly `calls` model calls, or it is an error.

    Args:
        pipe: text-to-image, or class-conditional (the prompts are then class numbers).
        calls: model calls an image; a pair for classifier-free guidance counts once.
        options: further arguments of the pipeline's call (guidance_scale, height, ...).
        on_call: called before each pass of the denoiser.

    Raises:
        OptionError: an option that this pipeline does not take, or a scheduler that cannot spend these calls.
    """

    def __init__(
        self, pipe: Any, calls: int, options: Mapping[str, Any], on_call: Callable[[], None] = lambda: None
    ) -> None:
        if calls < 1:
            raise OptionError(f"an image needs 1 model call or more, got {calls}")
        self.pipe, self.calls = pipe, calls
        self._drive = Driver(pipe, options, on_call)
        self.steps = steps_for(pipe.scheduler, calls)

    def __call__(self, tasks: Sequence[Task]) -> Painted:
        """The images of these tasks, each from its own generator."""
        made = self._drive([t.prompt for t in tasks], [t.generator() for t in tasks], self.steps)
        if made.calls != self.calls:
            raise RunError(
                f"{type(self.pipe.scheduler).__name__} was asked for {self.calls} model calls an image and made "
                f"{made.calls}; choose another --calls or --scheduler"
            )
        return Painted(made.images, made.calls)
