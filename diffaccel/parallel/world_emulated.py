"""p ranks in one process, as threads that share the weights: for tests, and to study quality without p devices.

It computes what p processes compute, bit for bit, but no faster than one: its seconds say nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import OptionError
from .mail import About, Mail, Shape, Traffic
from .protocol import TIMEOUT, OneProcess, T, WorldError, line


class EmulatedWorld(OneProcess):
    """`size` ranks, alive while `run` runs; outside of it, what calls is rank 0 and speaks for all.

    Args:
        size: number of ranks.
        device: that they share.
        timeout: seconds for which a rank waits for another.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu", *, timeout: float = TIMEOUT) -> None:
        if size < 1:
            raise OptionError(f"a world needs 1 rank or more, got {size}")
        self.size, self.device, self.timeout = size, torch.device(device), timeout
        self.traffics = [Traffic() for _ in range(size)]
        self._counters: dict[str, int] = {}
        self._local = threading.local()
        self._news = threading.Condition()
        self._box: dict[tuple[int, int, int], torch.Tensor] = {}  # (number, from, to)
        self._sent = [0] * size
        self._failure: WorldError | None = None

    @property
    def rank(self) -> int:
        return int(getattr(self._local, "rank", 0))

    @property
    def traffic(self) -> Traffic:
        return self.traffics[self.rank]

    # ------------------------------------------------------------------ tensors
    def run(self, job: Callable[[int], T]) -> list[T]:
        self.check()
        found: list[Any] = [None] * self.size
        errors: list[BaseException] = []
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

        def live(rank: int) -> None:
            self._local.rank = rank
            try:
                with torch.inference_mode(modes[1]), torch.set_grad_enabled(modes[0]):  # the first sets both
                    found[rank] = job(rank)
            except BaseException as error:
                errors.append(error)
                self.abort(line(error))

        threads = [threading.Thread(target=live, args=(r,), name=f"diffaccel-rank-{r}") for r in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]  # the first; the others are what it did to the other ranks
        return found

    def send(
        self, about: About, parts: Sequence[torch.Tensor | None], shapes: Sequence[Shape | None], like: torch.Tensor
    ) -> Mail:
        rank, number = self.rank, self._sent[self.rank]
        self._sent[rank] += 1
        self.traffics[rank].count(about, shapes, like)
        with self._news:
            for other, part in enumerate(parts):
                if part is not None:
                    self._box[number, rank, other] = part.clone()
            self._news.notify_all()
        return _Letters(self, rank, number, about, shapes)

    def take(self, number: int, source: int, rank: int, about: About) -> torch.Tensor:
        """What `source` sent to `rank` in its message `number`; waits for it."""
        key = (number, source, rank)
        with self._news:
            if not self._news.wait_for(lambda: key in self._box or self._failure is not None, self.timeout):
                raise WorldError(f"rank {rank} waited {self.timeout:.0f} s for rank {source} ({about})")
            if key not in self._box and self._failure is not None:
                raise self._failure
            return self._box.pop(key)

    # ------------------------------------------------------------------ what ranks say to each other
    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def add(self, name: str, amount: int) -> int:
        with self._news:
            self._counters[name] = self._counters.get(name, 0) + amount
            return self._counters[name]

    def abort(self, reason: str) -> bool:
        with self._news:
            first = self._failure is None
            if first:
                self._failure = WorldError(f"rank {self.rank} failed: {reason}", told=True)
            self._news.notify_all()
        return first


class _Letters:
    """What is to come from the other ranks in one message."""

    def __init__(
        self, world: EmulatedWorld, rank: int, number: int, about: About, shapes: Sequence[Shape | None]
    ) -> None:
        self._world, self._rank, self._number, self._about, self._shapes = world, rank, number, about, shapes

    def wait(self) -> list[torch.Tensor | None]:
        start, traffic = time.perf_counter(), self._world.traffics[self._rank]
        found = [
            None if shape is None else self._world.take(self._number, source, self._rank, self._about)
            for source, shape in enumerate(self._shapes)
        ]
        wrong = [r for r, (x, s) in enumerate(zip(found, self._shapes)) if x is not None and tuple(x.shape) != s]
        if wrong:
            raise WorldError(f"rank {self._rank} got another shape from ranks {wrong} than it expected ({self._about})")
        traffic.seconds[self._about.kind] += time.perf_counter() - start
        return found
