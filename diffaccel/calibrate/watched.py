"""A copy of a pipeline's own scheduler whose steps are seen and changed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

Change = Callable[[int, torch.Tensor], torch.Tensor]  # (step, tensor) -> what takes its place


def watched(scheduler: Any, output: Change | None = None, state: Change | None = None) -> Any:
    """The copy, for one run.

    Args:
        scheduler: of any class with diffusers' `step(model_output, timestep, sample, ...)`.
        output: of the guided model output that the scheduler is handed.
        state: of the next state that it returns.
    """
    made = copy.deepcopy(scheduler)
    inner, count = made.step, -1

    @functools.wraps(inner)
    def step(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        done = inner(model_output if output is None else output(count, model_output), *args, **kwargs)
        if state is None:
            return done
        if isinstance(done, tuple):
            return (state(count, done[0]), *done[1:])
        done.prev_sample = state(count, done.prev_sample)
        return done

    made.step = step
    return made
