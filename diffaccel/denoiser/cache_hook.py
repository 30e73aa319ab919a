"""The hook on a denoiser that decides, call by call, which rows its parts run (see `cache_parts`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import OptionError, RunError
from .cache import Cache
from .cache_forecast import History
from .cache_frame import Current, Frame, not_finite
from .cache_layout import Layout, refuse_compiled
from .cache_policy import Watch, decide
from .cache_probe import Driver
from .cache_report import CacheReport
from .clock import Clock, Run, levels_of
from .contract import Call, DenoiserHook
from .extrapolation_report import Timer
from .rows import images_of

FEW = 8  # steps; up to here, consecutive steps differ too much for a cache to gain
WIDEST = 2  # interval at so few steps


def refuse_wide(settings: Cache, steps: int) -> None:
    """Raise `OptionError` for an interval over 2 at 8 steps or fewer: what it reuses lies too far away."""
    if settings.kind == "every" and settings.interval > WIDEST and steps <= FEW:
        raise OptionError(
            f"{settings.name} at {steps} steps: up to {FEW} steps an interval of {WIDEST} is the largest, because full "
            "steps lie far apart already. Use Cache.every(2), fewer steps without a cache, or a mask that "
            "calibrate.cache learned"
        )


@dataclass
class Branch:
    """What is kept of one guidance branch at one latent size.

    Attributes:
        rows: of its calls.
        histories: full values, of each section.
        forms: see `Frame`.
        watch: of `first_block`.
        counts: tensors of each section.
    """

    rows: int
    histories: list[History]
    forms: dict[str, Any] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    counts: list[int] = field(default_factory=list)


@dataclass
class State:
    """One run of one denoiser.

    Attributes:
        plan: whether each step, counted from the run's first, is full; None where rows decide.
        nodes: where the steps lie in the variable of the forecast.
        jumps: steps that begin at more noise than the one before: nothing is carried over them.
        decision: of the step's first call, for `cfg="joint"`.
    """

    report: CacheReport
    plan: tuple[bool, ...] | None
    nodes: list[float]
    jumps: frozenset[int]
    branches: dict[tuple[str, torch.Size], Branch] = field(default_factory=dict)
    decision: list[bool] | None = None
    doubts: list[tuple[torch.Tensor, int, str]] = field(default_factory=list)


class CacheHook(DenoiserHook):
    """Runs a denoiser in full, in part, or on some rows of the batch.

    Args:
        clock: of the pipeline.
        pipe: for guidance settings.
        label: of the denoiser in reports; "" where there is one.
        settings: of the cache.
        layout: of the denoiser.
        current: shared with the hooks on its parts.
        report_of: gives the report of a run.
        drive: answers in its place (calibration).
    """

    def __init__(
        self,
        clock: Clock,
        pipe: Any,
        label: str,
        settings: Cache,
        layout: Layout,
        current: Current,
        report_of: Callable[[Run], CacheReport],
        drive: Driver | None,
    ) -> None:
        super().__init__(clock)
        self.pipe, self.label, self.settings, self.layout = pipe, label, settings, layout
        self.current, self.report_of, self.drive = current, report_of, drive
        self.names = {name for name, _ in layout.parts}

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self.model = module
        return super().initialize_hook(module)

    # ------------------------------------------------------------------ a call
    def answer(self, call: Call) -> Any:
        state: State = call.run.store.get("cache") or self._begin(call)
        if call.opens:
            state.decision = None
            if call.step - call.run.first in state.jumps:
                state.branches.clear()
        branch = self._branch(call, state)
        if self.drive is not None:
            return self.drive(DrivenCall(self, call, state, branch))
        frame = self._frame(call, state, branch)
        self._decide(call, state, branch, frame)
        output = self._timed(call, state, frame)
        self._close(call, state, frame)
        return output

    def through(self, call: Call, frame: Frame) -> Any:
        """The model, with its parts under the frame's decision.

        Raises:
            RunError: if a part was not called: the model does not use it, or something went past its hook.
        """
        self.current.frame = frame
        try:
            output = call.forward()
        finally:
            self.current.frame = None
        missing = sorted(self.names - frame.fired)
        if missing:
            raise RunError(
                f"step {call.step}: the cache's hooks on {', '.join(missing[:4])} were never called (layers that the "
                "pipeline leaves out, or something put in place of these modules); the cache cannot work here"
            )
        return output

    def _timed(self, call: Call, state: State, frame: Frame) -> Any:
        start = frame.watch.now()
        output = self.through(call, frame)
        kind = "full" if frame.full is None else "mixed" if frame.full else "reused"
        timer = state.report.timers.setdefault(kind, Timer(call.sample.device))
        timer.spans.append((start, frame.watch.now()))
        return output

    def _close(self, call: Call, state: State, frame: Frame) -> None:
        report = state.report
        report.steps = max(report.steps, call.step - report.first + 1)
        report.tell(f"{self.label}{call.branch}", frame.full, frame.rows)
        kept = sum(history.bytes for branch in state.branches.values() for history in branch.histories)
        report.bytes = max(report.bytes, kept)
        state.doubts += frame.doubts
        if call.step == call.run.steps - 1 and set(call.run.branches) >= set(call.run.previous):
            state.branches.clear()  # nothing is carried on any more
            for fine, step, where in state.doubts:
                if not bool(fine):
                    raise not_finite(step, where, "on the device")

    # ------------------------------------------------------------------ a run
    def _begin(self, call: Call) -> State:
        refuse_compiled(self.model, self.layout)
        run, settings, report = call.run, self.settings, self.report_of(call.run)
        report.parts += len(self.names)
        first = report.first if settings.kind in ("mask", "learned") else run.first
        steps = run.steps - first
        plan = settings.full_steps(steps)[run.first - first :] if settings.static and self.drive is None else None
        if self.drive is None:
            refuse_wide(settings, steps)
        if steps <= FEW and self.drive is None and plan is not None and not all(plan):
            text = f"{steps} steps: a cache gains little where steps are few and far apart; compare with fewer calls"
            report.note(text)
            warnings.warn(text, stacklevel=2)
        levels = levels_of(run.scheduler)
        if levels is None and settings.variable == "lam":
            raise OptionError(
                f"variable='lam' needs the noise levels of the run, which the config of {type(run.scheduler).__name__} "
                "does not prove; use variable='step'"
            )
        lams = [node.lam for node in levels.nodes[run.first : -1]] if levels is not None else []
        jumps = frozenset(i for i in range(1, len(lams)) if lams[i] < lams[i - 1])
        nodes = lams if settings.variable == "lam" else [float(i) for i in range(run.steps - run.first)]
        state = run.store["cache"] = State(report, plan, nodes, jumps)
        return state

    def _branch(self, call: Call, state: State) -> Branch:
        key, rows = (call.branch, call.sample.shape[1:]), len(call.sample)
        branch = state.branches.get(key)
        if branch is None:
            for old in [k for k in state.branches if k[0] == call.branch]:
                del state.branches[old]  # another latent size: nothing is carried over
            histories = [History(self.settings.forecast) for _ in self.layout.sections]
            branch = state.branches[key] = Branch(rows, histories)
        if branch.rows != rows:
            raise RunError(
                f"step {call.step}: the model is called with {rows} rows, before with {branch.rows}; a cache keeps "
                "values row by row, so the batch must not change within a run"
            )
        return branch

    def _frame(self, call: Call, state: State, branch: Branch) -> Frame:
        watch = state.report.timers.setdefault("cache", Timer(call.sample.device))
        step = call.step - call.run.first
        return Frame(call.step, len(call.sample), state.nodes[step], branch.histories, branch.forms, None, watch)

    # ------------------------------------------------------------------ decisions
    def _decide(self, call: Call, state: State, branch: Branch, frame: Frame) -> None:
        nodes = branch.histories[0].nodes
        ready = [bool(own) for own in nodes] if nodes else [False] * frame.rows
        if state.plan is not None:
            step = call.step - call.run.first
            if not state.plan[step] and not all(ready):
                state.report.note(f"step {call.step} is full, because there was nothing to reuse")
            frame.set_full([state.plan[step] or not there for there in ready])
            return
        joint = self.settings.cfg == "joint"
        if joint and not call.opens and state.decision is not None and len(state.decision) == frame.rows:
            frame.set_full([yes or not there for yes, there in zip(state.decision, ready, strict=True)])
            return
        groups = self._groups(call, state) if joint else []

        def by_change(value: torch.Tensor) -> list[bool]:
            before = len(branch.watch.seen)
            chosen = decide(branch.watch, value, self.settings, ready, groups, call.step)
            state.report.changes += branch.watch.seen[before:]
            state.decision = chosen if call.opens else state.decision
            return chosen

        frame.decide = by_change

    def _groups(self, call: Call, state: State) -> list[list[int]]:
        """Rows of the same image."""
        found = images_of(self.pipe, call)
        if found is not None:
            return found
        half, odd = divmod(len(call.sample), 2)
        if not odd and torch.equal(call.sample[:half], call.sample[half:]):
            return [[r, r + half] for r in range(half)]  # both guidance branches are fed the same state
        state.report.note("which rows belong to one image is not known, so each decided by itself")
        return []


class DrivenCall:
    """One call under calibration; see `cache_probe.Probe`."""

    def __init__(self, hook: CacheHook, call: Call, state: State, branch: Branch) -> None:
        self._hook, self._call, self._state, self._branch = hook, call, state, branch
        self.step, self.first, self.steps, self.branch = call.step, call.run.first, call.run.steps, call.branch
        self.opens, self.sample = call.opens, call.sample

    def full(self) -> tuple[Any, list[torch.Tensor]]:
        """The model in full: (output, cached quantity)."""
        frame = self._hook._frame(self._call, self._state, self._branch)
        frame.recorded = {}
        output = self._hook.through(self._call, frame)
        found = [frame.recorded[k] for k in range(len(self._hook.layout.sections))]
        self._branch.counts = [len(values) for values in found]
        return output, [value for values in found for value in values]

    def forced(self, values: list[torch.Tensor]) -> Any:
        """The model's output with these values in place of the cached quantity.

        Raises:
            RunError: before a full call of this branch, or with another number of values.
        """
        counts = self._branch.counts
        if not counts or sum(counts) != len(values):
            raise RunError(f"{len(values)} values are given, a full call of branch {self.branch!r} has {sum(counts)}")
        left = iter(values)
        frame = self._hook._frame(self._call, self._state, self._branch)
        frame.full, frame.forced = [], [[next(left) for _ in range(n)] for n in counts]
        return self._hook.through(self._call, frame)
