"""What ranks that share a model's calls look after: each other, and that they are about to make the same call."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch

from ..errors import OptionError
from .agree import differences
from .patch_call import digest
from .patch_settings import Settings
from .protocol import World, WorldError


class Watch:
    """The begin and the end of every shared call.

    Args:
        world: of the ranks.
        settings: how they work together.
        facts: what all of them must agree on before a run, as plain JSON.
    """

    def __init__(self, world: World, settings: Settings, facts: Callable[[], dict[str, Any]]) -> None:
        self.world, self.settings, self.facts = world, settings, facts
        self._agreed = 0  # calls of this run that were compared
        self._event: Any = None

    def new_run(self) -> None:
        """The next call is the first of a run."""
        self._agreed = 0

    def settle(self) -> None:
        """Where a device works by itself: wait for the end of the last call, with an eye on the other ranks."""
        self.world.check()
        start = time.monotonic()
        while self._event is not None and not self._event.query():
            self.world.check()
            if time.monotonic() - start > self.world.timeout:
                raise WorldError(
                    f"rank {self.world.rank} waited {self.world.timeout:.0f} s for the end of a model call"
                )
            time.sleep(0.0005)

    def mark(self) -> None:
        """The call is made, or on its way on the device."""
        if self.world.device.type not in ("cpu", "meta"):
            self._event = torch.Event(self.world.device.type)
            self._event.record()

    def agree(self, arguments: dict[str, Any], sample: str) -> None:
        """All ranks are about to make the same call. Looked at twice a run: the second call shows unequal noise.

        Args:
            arguments: of the denoiser, by name.
            sample: which of them is the state.
        """
        x = arguments[sample]
        self._same_device(x.device)
        if self._agreed > 1:
            return
        values: dict[str, Any] = {"latents": digest(x), "size": [*x.shape], "dtype": str(x.dtype)}
        if self._agreed == 0:
            given = {k: digest(v) for k, v in arguments.items() if k != sample}
            values |= {**self.facts(), "arguments": given}
            values["settings"] = {k: v for k, v in vars(self.settings).items() if v is not None}
        self._agreed += 1
        self._compare(values)

    def _compare(self, values: dict[str, Any]) -> None:
        what, wait = f"agreement before call {self._agreed - 1}", self.world.timeout
        found = [json.loads(v) for v in self.world.gather(what, json.dumps(values).encode(), timeout=wait)]
        for rank, theirs in enumerate(found):
            wrong = differences(found[0], theirs, "rank 0 has", f"rank {rank} has")
            if wrong:
                advice = (
                    "\nPass the same arguments on every rank, and generator=torch.Generator('cpu').manual_seed(seed)"
                    if any("latents" in w for w in wrong)
                    else ""
                )
                text = "the ranks are not about to make the same image:\n" + "\n".join(wrong) + advice
                raise WorldError(text, told=self.world.rank != 0)

    def _same_device(self, here: torch.device) -> None:
        wanted = self.world.device
        if here.type != wanted.type or (None not in (here.index, wanted.index) and here.index != wanted.index):
            raise OptionError(
                f"the denoiser is called on {here}, but rank {self.world.rank} has {wanted}: use pipe.to()"
            )
