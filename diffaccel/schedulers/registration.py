"""How diffusers finds our classes again when it loads a saved pipeline."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T", bound=type)
METHODS = ["save_pretrained", "from_pretrained"]


def public(cls: T) -> T:
    """Give a class the module name "diffaccel", under which it is saved, loaded and pickled.

    Files may then move without breaking saved pipelines. `diffaccel.__getattr__` serves the name.
    """
    cls.__module__ = "diffaccel"
    return cls


def register_library() -> None:
    """Tell diffusers that "diffaccel" is a library with schedulers; hub ids need it, local folders do not.

    The table is semi-private to diffusers: where it is gone, saved local folders still load.
    """
    try:
        from diffusers.pipelines import pipeline_loading_utils as loading

        loading.LOADABLE_CLASSES.setdefault("diffaccel", {"SchedulerMixin": METHODS, "DiffusionPipeline": METHODS})
        loading.ALL_IMPORTABLE_CLASSES.setdefault("SchedulerMixin", METHODS)
    except (ImportError, AttributeError):
        return
