"""Tensors between ranks: what a message is about, what is counted, and how it is waited for."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class About:
    """What a message is about.

    Attributes:
        kind: "attn" (keys and values), "conv" (rows), "gn" (statistics) or "out" (the denoiser's output).
        where: the module.
        call: number of the model call, from 0.
    """

    kind: str
    where: str
    call: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.where}, call {self.call}"


@dataclass
class Traffic:
    """What one rank received, by kind. Bytes are those of the tensors, without headers; they count when they are sent.

    Attributes:
        bytes, messages: received from other ranks.
        seconds: that the rank stood and waited. On a GPU the host does not wait, and this stays near 0.
    """

    bytes: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def count(self, about: About, shapes: Sequence[Shape | None], like: torch.Tensor) -> None:
        """Add what a call will receive."""
        for shape in shapes:
            if shape is not None:
                self.bytes[about.kind] += math.prod(shape) * like.element_size()
                self.messages[about.kind] += 1

    def clear(self) -> None:
        """Begin to count anew."""
        self.bytes.clear()
        self.messages.clear()
        self.seconds.clear()


class Mail(Protocol):
    """A message under way."""

    def wait(self) -> list[torch.Tensor | None]:
        """What each rank sent to this one; None where that is nothing. To be called once."""


class GroupMail:
    """One all-to-all of torch.distributed, sizes free: the messages of one layer from all to all.

    A collective, because its end can be looked for without waiting; that of a receive cannot (gloo), and a wait that
    nobody can end hangs when another rank has failed.

    Args:
        group: of all ranks, its backend fit for the device of `like`.
        parts: what goes to each rank; None for nothing.
        shapes: of what comes from each rank; None for nothing.
        like: gives dtype and device.
        about: for messages.
        traffic: counts.
        watch: called while waiting; raises to end it.
        lost: makes an error of one that torch raised.
    """

    def __init__(
        self,
        group: Any,
        parts: Sequence[torch.Tensor | None],
        shapes: Sequence[Shape | None],
        like: torch.Tensor,
        about: About,
        traffic: Traffic,
        watch: Callable[[float], None],
        lost: Callable[[Exception], Exception],
    ) -> None:
        self._shapes, self._about, self._traffic, self._watch, self._lost = shapes, about, traffic, watch, lost
        self._sizes = [0 if s is None else math.prod(s) for s in shapes]
        traffic.count(about, shapes, like)
        out = [0 if p is None else p.numel() for p in parts]
        flat = [p.reshape(-1) for p in parts if p is not None]
        self._out = torch.cat(flat) if flat else like.new_empty(0)
        self._in = like.new_empty(sum(self._sizes))
        try:
            self._work = torch.distributed.all_to_all_single(
                self._in, self._out, self._sizes, out, group=group, async_op=True
            )
        except RuntimeError as error:
            raise lost(error) from error

    def wait(self) -> list[torch.Tensor | None]:
        start = time.perf_counter()
        if self._in.device.type == "cpu":  # elsewhere the device waits, not the host
            while not self._work.is_completed():
                self._watch(time.perf_counter() - start)
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._lost(error) from error
        self._traffic.seconds[self._about.kind] += time.perf_counter() - start
        parts = self._in.split(self._sizes)
        return [None if s is None else x.view(s) for x, s in zip(parts, self._shapes)]
