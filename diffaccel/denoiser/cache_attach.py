"""A cache on the denoisers of a pipeline: hooks on, hooks off."""

from __future__ import annotations

from typing import Any

from .cache import Cache
from .cache_probe import Driver


class Attached:
    """What `attach_cache` put on a pipeline."""

    def report(self) -> Any:
        """What was measured in this thread's last run."""
        raise NotImplementedError

    def remove(self) -> None:
        """Take the hooks off; twice is fine."""
        raise NotImplementedError


def attach_cache(pipe: Any, settings: Cache, drive: Driver | None = None) -> Attached:
    """Put a cache on all denoisers of a pipeline.

    Args:
        pipe: a pipeline of diffusers.
        settings: of the cache.
        drive: calibration: answers every call of the model itself, by means of `cache_probe.Probe`; `settings` then
            only says what is cached (its `level`), not when.
    """
    raise NotImplementedError
