"""What ranks do together, and the world of one process, where nothing needs to be said.

`parallel/world.py` has the world of a launcher, `parallel/world_emulated.py` one of p ranks in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from ..errors import DiffaccelError
from .mail import About, Mail, Shape, Traffic

TIMEOUT = 60.0  # seconds without any sign of a rank
T = TypeVar("T")


class WorldError(DiffaccelError, RuntimeError):
    """A rank failed, vanished, or could not be reached.

    Args:
        message: names the rank and what it was needed for.
        told: whether another rank reports it, so that this one can end in silence.
    """

    def __init__(self, message: str, *, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


class World(Protocol):
    """The processes that work together. Every method may raise `WorldError`.

    As a context it is left at the end, and an error inside ends the work of all ranks: `with open_world() as world:`.
    """

    rank: int
    size: int
    device: torch.device
    timeout: float  # seconds for which a rank waits for another
    traffic: Traffic  # of this rank

    def run(self, job: Callable[[int], T]) -> list[T]:
        """`job(rank)` for each rank that lives in this process, at the same time; what they return, in order."""

    def send(
        self, about: About, parts: Sequence[torch.Tensor | None], shapes: Sequence[Shape | None], like: torch.Tensor
    ) -> Mail:
        """Begin to send `parts[r]` to each rank r and to receive a tensor of `shapes[r]` from it; None for nothing.

        Returns at once; `wait()` of the mail gives what came. All ranks send the same things in the same order. `parts`
        must not be changed until then.

        Args:
            about: for messages and counting.
            like: a tensor of the dtype and on the device of all parts.
        """

    def check(self) -> None:
        """Raise if another rank has failed. Costs nothing; call it often."""

    def add(self, name: str, amount: int) -> int:
        """Add to a counter that all ranks share; its new value."""

    def gather(
        self,
        name: str,
        payload: bytes,
        *,
        timeout: float | None = TIMEOUT,
        stall: float | None = None,
        tick: Callable[[], Any] | None = None,
    ) -> list[bytes]:
        """Every rank's payload, in rank order, on every rank.

        Args:
            name: for messages; all ranks make the same calls in the same order.
            payload: of this rank.
            timeout: seconds; None waits for as long as the others are alive.
            stall: seconds after which a rank that is alive but has not called `check` counts as stuck.
            tick: called now and then while waiting.
        """

    def broadcast(self, name: str, payload: bytes | None, *, timeout: float | None = TIMEOUT) -> bytes:
        """Rank 0's payload on every rank; the others pass None."""

    def barrier(self, name: str, *, timeout: float | None = TIMEOUT) -> None:
        """Return when every rank has come here."""

    def abort(self, reason: str) -> bool:
        """End the work of all ranks; True if this rank was the first, and so is the one that reports, at once: a
        launcher ends the others as soon as one process has left."""

    def close(self) -> None:
        """Leave. The last thing a rank does."""

    def __enter__(self) -> World: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None: ...


class Context:
    """`with world:` of a `World`."""

    def __enter__(self: Any) -> Any:
        return self

    def __exit__(self: Any, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.abort(line(error))
        self.close()


class OneProcess(Context):
    """A world in one process, in which what speaks outside of a run speaks for every rank."""

    size: int

    def gather(
        self,
        name: str,
        payload: bytes,
        *,
        timeout: float | None = TIMEOUT,
        stall: float | None = None,
        tick: Callable[[], Any] | None = None,
    ) -> list[bytes]:
        return [payload] * self.size

    def broadcast(self, name: str, payload: bytes | None, *, timeout: float | None = TIMEOUT) -> bytes:
        return payload or b""

    def barrier(self, name: str, *, timeout: float | None = TIMEOUT) -> None:
        return

    def close(self) -> None:
        return


class SoloWorld(OneProcess):
    """One process: every message is the identity."""

    rank = 0
    size = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.timeout, self.traffic = TIMEOUT, Traffic()
        self._counters: dict[str, int] = {}

    def run(self, job: Callable[[int], T]) -> list[T]:
        return [job(0)]

    def send(
        self, about: About, parts: Sequence[torch.Tensor | None], shapes: Sequence[Shape | None], like: torch.Tensor
    ) -> Mail:
        raise WorldError(f"there is no other rank to send to ({about})")

    def check(self) -> None:
        return

    def add(self, name: str, amount: int) -> int:
        self._counters[name] = self._counters.get(name, 0) + amount
        return self._counters[name]

    def abort(self, reason: str) -> bool:
        return True


def line(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
