"""Rank, device and messages: nothing outside this file and `mail.py` asks torch or accelerate for them.

Messages are small and travel through the key-value store that torch's launchers open anyway. Every wait is made of
short looks at the store, so that a rank that failed (it leaves a reason) or vanished (its heartbeat stops) ends all
ranks with an error that names it, never with a hang. Tensors travel in a process group of their own (`mail.py`).
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

import torch

from .launch import slurm_environment
from .mail import About, GroupMail, Mail, Shape, Traffic
from .protocol import TIMEOUT as TIMEOUT
from .protocol import Context, T, line
from .protocol import SoloWorld as SoloWorld
from .protocol import World as World
from .protocol import WorldError as WorldError

BEAT = 0.5  # seconds between heartbeats
LOOK = 0.02  # seconds between two looks at the store
TRIES = 3  # to connect to it
_worlds = count()  # worlds opened one after another in a process must not read each other's keys


class DistWorld(Context):
    """Processes started by torchrun, accelerate launch or srun; opened by `open_world`.

    Args:
        rank, size, device: of this process.
        connect: makes one connection to the store; the heartbeat has its own, because a connection serves one thread.
        timeout: seconds without a sign of a rank after which it counts as gone.
        leave: called when this rank is done.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        connect: Callable[[], Any],
        *,
        timeout: float = TIMEOUT,
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        self._leave = leave
        self.rank, self.size, self.device, self.timeout = rank, size, device, timeout
        self.traffic, self._group, self._sent, self._at = Traffic(), None, 0, ""
        self._store, self._pulse = connect(), connect()
        self._calls = count()
        self._seen: dict[int, dict[str, tuple[str, float]]] = {}
        self._work = 0
        self._failure: WorldError | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="diffaccel-heartbeat", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ the heartbeat's thread
    def _beat(self) -> None:
        for i in count():
            try:
                self._pulse.set(f"beat/{self.rank}", f"{i} {self._work} {self._sent} {self._at}")
                if self._failure is None and self._pulse.check(["abort"]):
                    self._failure = _told(self._pulse.get("abort"))
                    self._pulse.set(f"heard/{self.rank}", "")
                    return
            except Exception as error:  # whatever a closed connection looks like in this version of torch
                self._failure = self._failure or self._lost(error)
                return
            if self._over.wait(BEAT):
                return

    # ------------------------------------------------------------------ tensors
    def run(self, job: Callable[[int], T]) -> list[T]:
        return [job(self.rank)]

    def send(
        self, about: About, parts: Sequence[torch.Tensor | None], shapes: Sequence[Shape | None], like: torch.Tensor
    ) -> Mail:
        self.check()
        if self._group is None:  # its time-out is for those who would wait behind our back
            self._group = torch.distributed.new_group(timeout=timedelta(seconds=self.timeout + 10))
        self._sent, self._at = self._sent + 1, str(about)
        watch, lost = partial(self._watch, about), partial(self._disconnected, about)
        return GroupMail(self._group, parts, shapes, like, about, self.traffic, watch, lost)

    def _watch(self, about: About, waited: float) -> None:
        if self._failure is not None:
            raise self._failure
        if waited > self.timeout:
            raise WorldError(f"rank {self.rank} waited {waited:.0f} s for {self._behind()} ({about})")
        time.sleep(0.0 if waited < 0.001 else 0.0002)

    def _disconnected(self, about: About, error: Exception) -> WorldError:
        """Why torch could not send: the reason that a rank gave, or the rank that has no heartbeat any more."""
        beats = self._beats()
        self._until(lambda: self._failure is not None, 3 * BEAT)
        if self._failure is not None:
            return self._failure
        still = [r for r, beat in self._beats().items() if beat == beats.get(r)]
        return WorldError(f"rank {self.rank} lost the connection to {self._behind(still)} ({about}): {line(error)}")

    def _beats(self) -> dict[int, str]:
        def beat(rank: int) -> str:
            key = f"beat/{rank}"
            return str(self._try(lambda: self._store.get(key).decode() if self._store.check([key]) else "0 0 0 "))

        return {r: beat(r) for r in range(self.size) if r != self.rank}

    def _behind(self, among: Sequence[int] = ()) -> str:
        """The ranks that have sent least so far, and where they were last seen."""
        seen = {r: beat.split(" ", 3)[2:] for r, beat in self._beats().items() if not among or r in among}
        least = min((int(sent) for sent, _ in seen.values()), default=0)
        behind = [f"rank {r}, last seen at {at or 'its start'}" for r, (sent, at) in seen.items() if int(sent) == least]
        return "; ".join(behind) or "the other ranks"

    # ------------------------------------------------------------------ what ranks say to each other
    def check(self) -> None:
        self._work += 1
        if self._failure is not None:
            raise self._failure

    def add(self, name: str, amount: int) -> int:
        self.check()
        return int(self._try(lambda: self._store.add(f"count/{name}", amount)))

    def gather(
        self,
        name: str,
        payload: bytes,
        *,
        timeout: float | None = TIMEOUT,
        stall: float | None = None,
        tick: Callable[[], Any] | None = None,
    ) -> list[bytes]:
        key = f"{next(self._calls)}/{name}"
        self._try(lambda: self._store.set(f"{key}/{self.rank}", payload))
        return [self._receive(f"{key}/{r}", r, name, timeout, stall, tick) for r in range(self.size)]

    def broadcast(self, name: str, payload: bytes | None, *, timeout: float | None = TIMEOUT) -> bytes:
        key = f"{next(self._calls)}/{name}"
        if self.rank == 0:
            self._try(lambda: self._store.set(key, payload or b""))
            return payload or b""
        return self._receive(key, 0, name, timeout)

    def barrier(self, name: str, *, timeout: float | None = TIMEOUT) -> None:
        self.gather(name, b"", timeout=timeout)

    def abort(self, reason: str) -> bool:
        if self._failure is not None:  # another was first, and its store may be gone by now
            return not self._failure.told
        text = json.dumps({"rank": self.rank, "reason": reason})
        try:
            first = self._store.compare_set("abort", "", text).decode() == text
            self._store.set(f"heard/{self.rank}", "")
        except Exception:  # the store is gone: nobody can be told, so everybody reports
            return True
        self._failure = _told(text.encode())
        return first

    def close(self) -> None:
        # Without torchrun the store lives in rank 0's process, which therefore leaves last.
        if self.rank == 0:
            key, seconds = ("left", 10.0) if self._failure is None else ("heard", 3.0)
            self._until(lambda: all(self._store.check([f"{key}/{r}"]) for r in range(1, self.size)), seconds)
        elif self._failure is None:
            self._until(lambda: self._store.set(f"left/{self.rank}", "") is None, 0.0)
        self._over.set()
        self._thread.join()
        self._leave()

    # ------------------------------------------------------------------ waiting
    def _receive(
        self,
        key: str,
        source: int,
        what: str,
        timeout: float | None,
        stall: float | None = None,
        tick: Callable[[], Any] | None = None,
    ) -> bytes:
        start = time.monotonic()
        while not self._said(key):
            self.check()
            if self._said(f"left/{source}"):
                if self._said(key):  # its last word, between the two looks
                    break
                raise WorldError(f"rank {source} left before {what!r}, for which rank {self.rank} was waiting")
            waited, quiet, idle = time.monotonic() - start, *self._still(source, start)
            if quiet > self.timeout or waited > (timeout or math.inf):
                state = f"was last alive {quiet:.0f} s ago"
            elif idle - quiet > (stall or math.inf):  # it went on beating without working
                state = f"is alive but has done nothing for {idle:.0f} s"
            else:
                state = ""
            if state:
                message = f"rank {self.rank} waited {waited:.0f} s for rank {source} ({what}); rank {source} {state}"
                raise WorldError(message)
            if tick is not None:
                tick()
            time.sleep(LOOK)
        return bytes(self._try(lambda: self._store.get(key)))

    def _said(self, key: str) -> bool:
        return bool(self._try(lambda: self._store.check([key])))

    def _still(self, rank: int, start: float) -> tuple[float, float]:
        """Seconds since a rank's heartbeat and since its work last moved; since `start` if they never did."""
        key, now = f"beat/{rank}", time.monotonic()
        known = self._try(lambda: self._store.check([key]))
        beat, _, work = (self._try(lambda: self._store.get(key)).decode() if known else "").partition(" ")
        seen = self._seen.setdefault(rank, {"beat": ("", start), "work": ("", start)})
        for name, value in (("beat", beat), ("work", work)):
            if value != seen[name][0]:
                seen[name] = (value, now)
        return now - seen["beat"][1], now - seen["work"][1]

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            self.check()  # the reason of the rank that failed says more than the broken connection does
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> WorldError:
        text = f"rank {self.rank} lost the store of the launcher (or of rank 0): {line(error)}"
        return WorldError(text, told=self.rank != 1)  # everybody loses it at once; one report is enough

    @staticmethod
    def _until(true: Callable[[], bool], seconds: float) -> None:
        """Wait for something that may never come, on a store that may be gone."""
        end = time.monotonic() + seconds
        try:
            while not true() and time.monotonic() < end:
                time.sleep(LOOK)
        except Exception:
            return


def open_world(*, cpu: bool = False, threads: int = 1, timeout: float = TIMEOUT) -> World:
    """The world that this process was launched into: torchrun, accelerate launch, srun, or plain python (alone).

    Open it once a process: a process group cannot be joined again.

    Args:
        cpu: stay on the CPU even where there is a GPU.
        threads: of torch in each process. Launchers set different numbers, and sums may round differently on them.
        timeout: seconds for the ranks to meet, and without a sign of life from one.

    Raises:
        WorldError: fewer GPUs than processes, or the ranks do not meet.
    """
    from accelerate import PartialState

    os.environ.update(slurm_environment(os.environ))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    cpu = cpu or not torch.accelerator.is_available()
    options: dict[str, Any] = {"cpu": cpu}
    if size > 1:
        _enough_devices(cpu)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # else accelerate chooses
        options |= {"timeout": timedelta(seconds=timeout), **({"backend": "gloo"} if cpu else {})}
    distributed: Any = torch.distributed
    mine = distributed.is_available() and not distributed.is_initialized()
    try:
        state = PartialState(**options)
    except (RuntimeError, ValueError) as error:  # torch's DistNetworkError and DistStoreError are RuntimeErrors
        raise _unmet(error) from error
    if state.num_processes != size:
        raise WorldError(
            f"{size} processes were launched but accelerate sees {state.num_processes} on device {state.device}; "
            "pass --cpu if this device cannot be shared"
        )
    torch.set_num_threads(threads)

    def leave() -> None:
        if mine and distributed.is_initialized():
            distributed.destroy_process_group()

    if size == 1:
        leave()  # torchrun with one process opens a group for it
        return SoloWorld(state.device)
    prefix = f"diffaccel/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_worlds)}"

    def connect() -> Any:
        return distributed.PrefixStore(prefix, _connected(timeout))

    return DistWorld(state.process_index, state.num_processes, state.device, connect, timeout=timeout, leave=leave)


def _connected(timeout: float) -> Any:
    """One more connection to the store of the launcher (or of rank 0).

    In several tries, because a connection that was lost on its way is not repeated by torch, which waits for an answer.

    Raises:
        WorldError: nobody answers.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    distributed: Any = torch.distributed
    for left in reversed(range(TRIES)):
        try:
            store = distributed.TCPStore(host, port, timeout=timedelta(seconds=timeout / TRIES))
        except RuntimeError as error:
            if not left:
                raise _unmet(error) from error
        else:
            store.set_timeout(timedelta(seconds=timeout))
            return store


def _unmet(error: Exception) -> WorldError:
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return WorldError(f"rank {rank} of {size} could not meet the others at {host}:{port}: {line(error)}")


def _told(text: bytes) -> WorldError:
    found = json.loads(text)
    return WorldError(f"rank {found['rank']} failed: {found['reason']}", told=True)


def _enough_devices(cpu: bool) -> None:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cpu and here > torch.accelerator.device_count():
        raise WorldError(
            f"{here} processes on this machine see {torch.accelerator.device_count()} GPU(s): start one process a GPU "
            "(check CUDA_VISIBLE_DEVICES), or pass --cpu",
            told=os.environ.get("LOCAL_RANK", "0") != "0",
        )
