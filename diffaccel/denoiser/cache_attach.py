"""A cache on the denoisers of a pipeline: hooks on, hooks off."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import OptionError, RunError
from .cache import Cache
from .cache_forecast import expected_bytes
from .cache_frame import Current
from .cache_hook import CacheHook
from .cache_layout import Layout, layout_of, refuse_compiled
from .cache_parts import Block, Head, Member, Part
from .cache_probe import Driver, Probe
from .cache_report import CacheReport
from .clock import Clock, Run
from .contract import PREFIX, attach, denoisers, detach, hooks_of, refuse_wrapped

NAME = PREFIX + "quant_cache"


class _Seen(Exception):
    """The first step of a run was seen, and the rest of it is not needed."""


class Attached:
    """Hooks on all denoisers of a pipeline, and what they measured; see `attach_cache`."""

    def __init__(self, pipe: Any, settings: Cache, drive: Driver | None) -> None:
        self.settings = settings
        self._local = threading.local()
        self._latest: CacheReport | None = None
        self._hooked: list[tuple[torch.nn.Module, str]] = []  # in the order of attachment
        self._parts: list[Part] = []
        self._models: list[Any] = []
        models = denoisers(pipe)
        for name, model in models.items():
            _refuse(name, model)
        dynamic = not settings.static and drive is None
        self._layouts = {name: layout_of(model, settings.level, dynamic) for name, model in models.items()}
        for name, model in models.items():
            refuse_compiled(model, self._layouts[name])
        try:
            for name, model in models.items():
                label = f"{name} " if len(models) > 1 else ""
                self._attach(pipe, model, label, self._layouts[name], drive)
        except BaseException:
            self.remove()
            raise

    @property
    def level(self) -> str:
        """What is kept."""
        return next(iter(self._layouts.values())).level

    def _attach(self, pipe: Any, model: torch.nn.Module, label: str, layout: Layout, drive: Driver | None) -> None:
        current, unet = Current(), hasattr(model, "down_blocks")
        for number, section in enumerate(layout.sections):
            for name, module in section:
                last = module is section[-1][1]
                kind: Member = (
                    Block(current, name, number, last, module)
                    if layout.level == "stack"
                    else Member(current, name, number, last)
                )
                self._put(module, kind)
        if layout.level == "stack" or (not self.settings.static and drive is None):
            self._put(layout.head[1], Head(current, layout.head[0], layout.head[1], unet))
        hook = CacheHook(
            Clock(lambda: pipe.scheduler), pipe, label, self.settings, layout, current, self._report_of, drive
        )
        attach(model, hook, NAME)
        self._hooked.append((model, NAME))
        self._models.append(model)
        _renew(model)

    def _put(self, module: torch.nn.Module, part: Part) -> None:
        attach(module, part, NAME)
        self._hooked.append((module, NAME))
        self._parts.append(part)

    # ------------------------------------------------------------------ for handles
    def compile(self, **options: Any) -> None:
        """Compile what the hooks call, each part by itself; decisions stay outside.

        Args:
            options: of `torch.compile`.
        """
        for part in self._parts:
            part.body = torch.compile(part.fn_ref.original_forward, **options)

    def memory(self, run: Callable[[], Any]) -> int:
        """Bytes that a run of the pipeline would keep at most, from its first step; the rest of it is not made.

        Args:
            run: begins the run.

        Raises:
            RunError: if the pipeline is driven by calibration, or never called its denoiser.
        """
        hooks: list[CacheHook] = [model._diffusers_hook.get_hook(NAME) for model in self._models]
        if any(hook.drive is not None for hook in hooks):
            raise RunError("the cache is driven by a calibration, which keeps nothing in it")
        counted: dict[str, int] = {}

        def drive(probe: Probe) -> Any:
            if probe.step > probe.first:
                raise _Seen
            output, values = probe.full()
            counted[probe.branch] = expected_bytes(values, self.settings.forecast)
            return output

        before = dict(vars(self._local)), self._latest
        try:
            for hook in hooks:
                hook.drive = drive
            run()
        except _Seen:
            pass
        finally:
            for hook in hooks:
                hook.drive = None
            vars(self._local).clear()  # no run was made that a report could tell of
            vars(self._local).update(before[0])
            self._latest = before[1]
        if not counted:
            raise RunError("the pipeline never called its denoiser, so nothing can be said about a cache on it")
        return sum(counted.values())

    def report(self) -> CacheReport:
        """What was measured in this thread's last run (else in the last run of any thread).

        Raises:
            RunError: if there was none.
        """
        found = getattr(self._local, "report", None) or self._latest
        if found is None:
            raise RunError("no run was made yet: call the pipeline first")
        return found

    def check_removable(self) -> None:
        """Raise if another hook was put above one of ours: removing ours would then take that one's place.

        Raises:
            RunError: naming the module and the hook.
        """
        for module, name in self._hooked:
            registry: Any = getattr(module, "_diffusers_hook", None)
            order = registry._hook_order if registry is not None else []
            if name in order and order[-1] != name:
                raise RunError(
                    f"the hook {order[-1]!r} was put on {type(module).__name__} after the cache; remove that one first"
                )

    def remove(self) -> None:
        """Take the hooks off, the last one first; twice is fine.

        Raises:
            RunError: as `check_removable`; nothing is removed then.
        """
        self.check_removable()
        models = [module for module, _ in self._hooked]
        while self._hooked:
            detach(*self._hooked.pop())
        for module in models:
            if hasattr(module, "_diffusers_hook"):
                _renew(module)
        self._parts.clear()
        self._models.clear()

    def _report_of(self, run: Run) -> CacheReport:
        """The report of a run, which all denoisers of the pipeline share."""
        if getattr(self._local, "timesteps", None) is not run.timesteps or run.step < self._latest_step():
            self._local.timesteps = run.timesteps
            self._local.report = CacheReport(self.settings.name, self.level, self.settings.forecast, first=run.step)
            self._latest = self._local.report
        report: CacheReport = self._local.report
        return report

    def _latest_step(self) -> int:
        return int(self._local.report.first + self._local.report.steps - 1)


def attach_cache(pipe: Any, settings: Cache, drive: Driver | None = None) -> Attached:
    """Put a cache on all denoisers of a pipeline.

    Args:
        pipe: a pipeline of diffusers.
        settings: of the cache.
        drive: calibration: answers every call of the model itself, by means of `cache_probe.Probe`; `settings` then
            only says what is cached (its `level`), not when.

    Raises:
        OptionError: a denoiser without the parts that the level needs, one that has a cache or another wrapper of
            ours, one that is compiled, offloaded in groups, or without weights.
    """
    return Attached(pipe, settings, drive)


@contextlib.contextmanager
def cached(pipe: Any, settings: Cache, drive: Driver | None = None) -> Iterator[Attached]:
    """`attach_cache` for the length of a `with` block."""
    made = attach_cache(pipe, settings, drive)
    try:
        yield made
    finally:
        made.remove()


# ---------------------------------------------------------------------- refusals
def _refuse(name: str, model: torch.nn.Module) -> None:
    """Models on which a cache would do nothing, or something else than it says."""
    if hasattr(model, "_orig_mod"):
        raise OptionError(
            f"pipe.{name} is compiled as a whole, and a cache leaves parts of it out; put the cache on the uncompiled "
            "model and call the handle's compile()"
        )
    if any(p.is_meta for p in model.parameters()) and not hasattr(model, "_hf_hook"):
        raise OptionError(f"pipe.{name} has no weights yet (meta device); load them first")
    if getattr(model, "_is_cached", False):
        raise OptionError(f"pipe.{name} has a cache of cache-dit; take it off first (cache_dit.disable_cache(pipe))")
    refuse_wrapped(model)
    for hook_name, hook in hooks_of(model):
        _refuse_hook(name, hook_name, hook)


def _refuse_hook(name: str, hook_name: str, hook: Any) -> None:
    if "offload" in hook_name:
        raise OptionError(
            f"pipe.{name} is offloaded in groups ({hook_name!r}), which fetches weights of layers that a cache leaves "
            "out; use pipe.enable_model_cpu_offload()"
        )
    if hook._is_stateful:
        raise OptionError(
            f"pipe.{name} has the hook {hook_name!r}, which remembers earlier calls (a cache of diffusers?); take it "
            f"off first (pipe.{name}.disable_cache())"
        )


def _renew(model: Any) -> None:
    """Make diffusers look for the hooks of a model's parts again (since 0.41 it remembers them)."""
    renew = getattr(model._diffusers_hook, "invalidate_child_registries_cache", None)
    if renew is not None:
        renew()
