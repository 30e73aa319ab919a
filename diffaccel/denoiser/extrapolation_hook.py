"""The hook that answers in place of a denoiser: decisions, predictions, checks (spec: FSampler, per image)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.extrapolation import gate_error
from ..core.extrapolation_policy import Count, Memory, with_gradient
from ..core.pattern import LEAST, Explicit, Regular
from .clock import Clock, Run
from .contract import Call, DenoiserHook, form_of, unpacked
from .extrapolation_frame import Frame, matching
from .extrapolation_report import Report, Timer
from .extrapolation_settings import Settings
from .rows import images_of, on_rows, sliceable

SMALLEST, SMALLEST_RATIO = 1e-8, 1e-6


@dataclass
class Branch:
    """What is kept of one guidance branch.

    Attributes:
        shape, dtype: of the model's output.
        form: puts a tensor into the form in which the model returned the last one.
        memories: real answers of each group of rows, in the extrapolated quantity.
        slopes: of the last real answer of each group, for gradient estimation.
    """

    shape: torch.Size
    dtype: torch.dtype
    form: Callable[[torch.Tensor], Any]
    memories: list[Memory]
    slopes: list[Any]


@dataclass
class Decision:
    """One step: which groups are skipped, and what each branch is answered there."""

    skip: list[bool]
    answers: dict[str, list[torch.Tensor | None]] = field(default_factory=dict)

    @property
    def any(self) -> bool:
        """Whether any group is skipped."""
        return any(self.skip)


@dataclass
class State:
    """One run of one denoiser.

    Attributes:
        groups: rows that are decided together; None: all rows of the batch are one group.
        planned: steps, counted from where the run begins, that a pattern skips.
    """

    report: Report
    frame: Frame
    planned: frozenset[int]
    groups: list[list[int]] | None = None
    counts: list[Count] = field(default_factory=lambda: [Count()])
    branches: dict[str, Branch] = field(default_factory=dict)
    decision: Decision = field(default_factory=lambda: Decision([False]))
    scale: Any = None


class ExtrapolationHook(DenoiserHook):
    """Answers some calls by a polynomial through earlier answers.

    Args:
        clock: of the pipeline.
        pipe: for guidance settings.
        settings: what to skip, and how.
        report_of: gives the report of a run; the denoisers of a pipeline share it.
    """

    def __init__(self, clock: Clock, pipe: Any, settings: Settings, report_of: Callable[[Run], Report]) -> None:
        super().__init__(clock)
        self.pipe, self.settings, self.report_of = pipe, settings, report_of

    # ------------------------------------------------------------------ a call
    def answer(self, call: Call) -> Any:
        state: State = call.run.store.get("extrapolation") or self._begin(call)
        timer = state.report.timer = state.report.timer or Timer(call.sample.device)
        timer.call()
        if call.opens:
            self._open(call, state)
        branch, answers = state.branches.get(call.branch), state.decision.answers.get(call.branch)
        if branch is None or answers is None:
            if state.decision.any:
                state.report.refusals["late branch"] += 1
            output = self._call(call, state, timer, range(len(state.counts)))
        elif all(state.decision.skip):
            output = branch.form(self._joined(state, branch, answers))
        else:
            output = self._partial(call, state, timer, branch, answers)
        timer.last = timer.now()
        if call.step == call.run.steps - 1 and set(call.run.branches) >= set(call.run.previous):
            state.branches.clear()  # nothing is predicted any more
        return output

    def _begin(self, call: Call) -> State:
        run, report = call.run, self.report_of(call.run)
        pattern = self.settings.pattern
        planned: list[int] = []
        if isinstance(pattern, Regular):
            planned = [run.first + i for i in pattern.skipped(run.steps - run.first)]
        elif isinstance(pattern, Explicit):
            planned = [report.first + i for i in pattern.skipped(run.steps - report.first)]
            for i in pattern.dropped(run.steps - report.first):
                report.note(f"node {i} is listed, but FSampler's streak rule calls it")
        frame = Frame.of(run, self.settings, report)
        state = run.store["extrapolation"] = State(report, frame, frozenset(planned))
        return state

    def _call(self, call: Call, state: State, timer: Timer, groups: Any, rows: list[int] | None = None) -> Any:
        """The model on all rows (or some); its answers are kept."""
        start = timer.now()
        output = call.forward() if rows is None else on_rows(call, rows)
        timer.spans.append((start, timer.now()))
        state.report.forwards += 1
        self._learn(call, state, output, list(groups), rows)
        return output

    def _partial(
        self, call: Call, state: State, timer: Timer, branch: Branch, answers: list[torch.Tensor | None]
    ) -> Any:
        assert state.groups is not None
        called = [g for g, skip in enumerate(state.decision.skip) if not skip]
        rows = sorted(r for g in called for r in state.groups[g])
        given = unpacked(self._call(call, state, timer, called, rows))
        full = given.new_empty((len(call.sample), *given.shape[1:]))
        full[rows] = given
        for group, answer in zip(state.groups, answers, strict=True):
            if answer is not None:
                full[group] = answer
        return branch.form(full)

    @staticmethod
    def _joined(state: State, branch: Branch, answers: list[torch.Tensor | None]) -> torch.Tensor:
        if state.groups is None:
            assert answers[0] is not None
            return answers[0]
        full = torch.empty(branch.shape, dtype=branch.dtype, device=answers[0].device)  # type: ignore[union-attr]
        for group, answer in zip(state.groups, answers, strict=True):
            assert answer is not None
            full[group] = answer
        return full

    # ------------------------------------------------------------------ what is kept
    def _learn(self, call: Call, state: State, output: Any, groups: list[int], rows: list[int] | None) -> None:
        value = unpacked(output).detach()
        branch = state.branches.get(call.branch)
        shape = torch.Size((len(call.sample), *value.shape[1:]))
        if branch is None or branch.shape != shape:
            if branch is not None:
                state.report.note(
                    f"step {call.step}: the model's output became {tuple(shape)}; its history was dropped"
                )
            branch = state.branches[call.branch] = self._branch(state, shape, value, output)
        branch.form, branch.dtype = form_of(output), value.dtype
        if not state.frame.usable(call.step):
            return
        wide = value.to(torch.float64 if value.dtype is torch.float64 else torch.float32, copy=True)
        position = state.frame.position(call.step)
        for g in groups:
            own, x = wide, call.sample
            if state.groups is not None:
                chosen = state.groups[g]
                own = wide[chosen if rows is None else [rows.index(r) for r in chosen]]
                x = x[chosen]
            branch.memories[g].add(position, state.frame.quantity(own, x, call.step))
            if self.settings.gradient:
                branch.slopes[g] = state.frame.slope(own, x, call.step)

    def _branch(self, state: State, shape: torch.Size, value: torch.Tensor, output: Any) -> Branch:
        if self.settings.history == 4 and value.dtype in (torch.float16, torch.bfloat16):
            text = f"h4 multiplies rounding errors by up to 15, and this model answers in {value.dtype}; prefer h2"
            warnings.warn(text, stacklevel=2)
            state.report.note(text)
        order = 2 if self.settings.gate else self.settings.history
        count = len(state.counts)
        memories = [Memory(state.frame.coordinate == "index", self.settings.beta, order) for _ in range(count)]
        return Branch(shape, value.dtype, form_of(output), memories, [None] * count)

    # ------------------------------------------------------------------ decisions
    def _open(self, call: Call, state: State) -> None:
        """The first call of a step: decide for all branches, from all their histories."""
        self._group(call, state)
        self._watch_guidance(state)
        decision = self._decided(call, state)
        if decision.any:
            self._predict(call, state, decision)
        state.decision = decision
        state.report.nodes += 1
        state.report.sized(len(state.counts))
        for g, skip in enumerate(decision.skip):
            state.counts[g].note(skip)
            if skip:
                state.report.skipped[g].append(call.step)

    def _group(self, call: Call, state: State) -> None:
        if self.settings.gate is None or not self.settings.per_image:
            return
        found, reason = images_of(self.pipe, call), sliceable(call)
        if found is not None and reason:
            found = None
        if found is None:
            state.report.note(
                "a step is skipped only if every image of the batch allows it, so results depend on batch mates: "
                + (reason or "the pipeline does not tell which rows of the batch belong to one image")
            )
            found = [[r] for r in range(len(call.sample))]
            state.report.together = True
        if found == state.groups:
            return
        if state.groups is not None:
            state.report.note(f"step {call.step}: the rows of the batch changed; the history was dropped")
        state.groups, state.counts = found, [Count() for _ in found]
        state.branches.clear()

    def _watch_guidance(self, state: State) -> None:
        scale = getattr(self.pipe, "guidance_scale", None)
        if state.scale is not None and scale != state.scale:
            state.report.note(
                "the guidance scale changed during the run: extrapolating each branch is then not the same as "
                "extrapolating the guided answer"
            )
        state.scale = scale
        if getattr(self.pipe, "guidance_rescale", 0.0):
            state.report.note(
                "guidance_rescale is on: extrapolating each branch is not the same as extrapolating the guided answer"
            )

    def _decided(self, call: Call, state: State) -> Decision:
        known = [state.branches[b] for b in call.run.previous if b in state.branches]
        if not known:
            return self._refused(state, "protected" if self.settings.gate else "")
        if self.settings.gate is not None:
            return self._gated(call, state, known)
        if self.settings.rule is not None:
            due = bool(self.settings.rule(call.step, call.run.steps))
        else:
            due = call.step in state.planned
        need = self.settings.history if isinstance(self.settings.pattern, Regular) else LEAST
        enough = all(len(m.past) >= need for b in known for m in b.memories) and state.frame.usable(call.step)
        return Decision([True]) if due and enough else self._refused(state, "history" if due else "")

    def _gated(self, call: Call, state: State, known: list[Branch]) -> Decision:
        gate, run = self.settings.gate, call.run
        assert gate is not None
        i, n = call.step - run.first, run.steps - run.first
        reasons = [gate.refusal(i, n, count) for count in state.counts]
        if not state.frame.usable(call.step) or any(len(m.past) < 3 for b in known for m in b.memories):
            reasons = [r or "history" for r in reasons]
        asked = [g for g, reason in enumerate(reasons) if not reason]
        if asked:
            errors = torch.stack([self._error(call, state, known, g) for g in asked]).tolist()  # the one read-back
            for g, error in zip(asked, errors, strict=True):
                reasons[g] = "" if error <= gate.tol else "tolerance"
        if state.report.together and any(reasons):
            reasons = [reason or "batch mate" for reason in reasons]
        for reason in reasons:
            if reason:
                state.report.refusals[reason] += 1
        return Decision([not reason for reason in reasons])

    def _error(self, call: Call, state: State, known: list[Branch], g: int) -> torch.Tensor:
        """The largest gate error of all branches."""
        position = state.frame.position(call.step)
        rows = slice(None) if state.groups is None else state.groups[g]
        found = []
        for branch in known:
            high, low = (branch.memories[g].raw(order, position) for order in (3, 2))
            step = state.frame.first_order(call.step)
            x = matching(call.sample[rows], high)
            step = None if x is None else step
            x = None if step is None or x is None else x.to(high.dtype) * state.frame.unscale(call.step)
            found.append(gate_error(high, low, x, step))
        return torch.stack(found).amax()

    def _refused(self, state: State, reason: str) -> Decision:
        if reason:
            state.report.refusals[reason] += len(state.counts)
        return Decision([False] * len(state.counts))

    # ------------------------------------------------------------------ predictions
    def _predict(self, call: Call, state: State, decision: Decision) -> None:
        """Fill in the answers of skipped groups; what fails its checks becomes a real call."""
        position, frame = state.frame.position(call.step), state.frame
        groups = [g for g, skip in enumerate(decision.skip) if skip]
        names = [b for b in call.run.previous if b in state.branches]
        sizes: list[torch.Tensor] = []
        for name in names:
            branch = state.branches[name]
            answers: list[torch.Tensor | None] = [None] * len(decision.skip)
            for g in groups:
                memory = branch.memories[g]
                quantity = memory.predicted(self.settings.history, position)
                x = call.sample if state.groups is None else call.sample[state.groups[g]]
                value = frame.output(quantity, x, call.step)
                if self.settings.gradient and branch.slopes[g] is not None:
                    slope = with_gradient(frame.slope(value, x, call.step), branch.slopes[g])
                    value = frame.from_slope(slope, x, call.step)
                if self._looks(call):
                    sizes += [torch.linalg.vector_norm(quantity), torch.linalg.vector_norm(memory.past[0][1])]
                answers[g] = value.to(branch.dtype)
            decision.answers[name] = answers
        if sizes:
            on_cpu = call.sample.device.type == "cpu"
            read = [float(size) for size in sizes] if on_cpu else torch.stack(sizes).tolist()  # one read-back
            self._reject(state, decision, groups, read)

    def _looks(self, call: Call) -> bool:
        if self.settings.validate is not None:
            return self.settings.validate
        return call.sample.device.type == "cpu" or self.settings.gate is not None

    def _reject(self, state: State, decision: Decision, groups: list[int], sizes: list[float]) -> None:
        pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
        for k, g in enumerate(groups):
            reasons = [self._fault(*pairs[j]) for j in range(k, len(pairs), len(groups))]
            reason = next((r for r in reasons if r), "")
            if reason:
                state.report.refusals[reason] += 1
                decision.skip[g] = False
                for answers in decision.answers.values():
                    answers[g] = None
        if not decision.any:
            decision.answers.clear()
        elif state.report.together and not all(decision.skip):
            decision.skip = [False] * len(decision.skip)
            decision.answers.clear()

    def _fault(self, size: float, last: float) -> str:
        """Why a prediction of this norm is not used, given that of the last real answer."""
        if not math.isfinite(size):
            return "not finite"
        if size < SMALLEST or size < SMALLEST_RATIO * last:
            return "vanishing"
        return "too large" if size > self.settings.max_ratio * last else ""
