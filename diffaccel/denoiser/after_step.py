"""Something done to the state after each step of any scheduler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .clock import position

Act = Callable[[int, torch.Tensor, Any], torch.Tensor]


def with_action(scheduler: Any, act: Act) -> Any:
    """A scheduler that is this one, its state included, but whose `step` ends in `act`.

    It is of a subclass of the scheduler's class and shares its attributes, so that pipelines that look at class,
    config or the signature of `step` see what they know, and the original goes on where this one stopped.

    Args:
        scheduler: any that has `step` and `timesteps`.
        act: `act(step, state, scheduler)` returns the state (B, ...) that the pipeline goes on with; the step counts
            from the start of the scheduler's timesteps.
    """
    kind = type(scheduler)

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = kind.step(self, *args, **kwargs)
        as_tuple = isinstance(output, tuple)
        state = output[0] if as_tuple else output.prev_sample
        after = getattr(self, "step_index", None)
        t = kwargs["timestep"] if "timestep" in kwargs else args[1]
        done = int(after) - 1 if after is not None else position(self.timesteps, t, 1.0, "t")[0]
        changed = act(done, state, self)
        if as_tuple:
            return (changed, *output[1:])
        output.prev_sample = changed
        return output

    body = {"step": step, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    made: Any = object.__new__(type(kind.__name__, (kind,), body))
    made.__dict__ = scheduler.__dict__
    return made
