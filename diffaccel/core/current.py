"""Which scheduler runs in this thread.

A hook on a denoiser sees the model's arguments, not the pipeline that calls it. Where several pipelines share one
denoiser, each in its own thread, the scheduler that last began a run in the thread is the one whose step this is.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

_LOCAL = threading.local()


class Announcing:
    """A scheduler that says when it begins a run: call `announce` at the end of `set_timesteps`."""

    def announce(self) -> None:
        """From now on this is the scheduler of the calling thread."""
        _LOCAL.scheduler = weakref.ref(self)


def announced() -> Any | None:
    """The announcing scheduler that last began a run in this thread, if it still exists."""
    found = getattr(_LOCAL, "scheduler", None)
    return None if found is None else found()
