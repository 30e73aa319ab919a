"""The cached quantity from outside: what calibration measures with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Probe(Protocol):
    """One call of a denoiser under a cache, in place of which a driver answers (`attach_cache(..., drive=...)`).

    Attributes:
        step: first..steps - 1.
        first: of the run, above 0 where it begins later (image to image).
        steps: of the run.
        branch: of the call, as in `contract.Call`.
        opens: whether it is the first call of its step.
        sample: what the model is fed, (rows, ...).
    """

    step: int
    first: int
    steps: int
    branch: str
    opens: bool
    sample: torch.Tensor

    def full(self) -> tuple[Any, list[torch.Tensor]]:
        """The model in full: its output, in the form in which it came, and the cached quantity.

        The quantity is a list of tensors (rows, ...): residuals of the block stack (hidden, then encoder stream), the
        output of the deep part of a UNet, or the outputs of all sublayers in the order of the model's modules.
        """
        ...

    def forced(self, values: list[torch.Tensor]) -> Any:
        """The model's output with these values in place of the cached quantity; the rest of the model runs.

        It needs a `full` call of this branch earlier in the run (for the shapes of what is left out).
        """
        ...


Driver = Callable[[Probe], Any]  # returns what the pipeline shall see as the model's output
