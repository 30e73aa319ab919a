"""Which run and which step a model call belongs to, read from the scheduler's public attributes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.current import Announcing, announced
from ..core.families import Flow
from ..core.node import Node
from ..core.path import Path
from ..core.prediction import Output
from ..errors import OptionError, PathError, RunError

MATCH = 1e-3  # relative; a fed time further than this from every timestep belongs to another scheduler
# What pipelines feed: the timestep t itself, t/T, or these reversed. T: training steps. The first that fits is meant:
# near the ends of a run a rounded time may fit in two.
FORMS: dict[str, Callable[[float, float], float]] = {
    "t": lambda t, T: t,
    "t/T": lambda t, T: t * T,
    "1 - t/T": lambda t, T: (1 - t) * T,
    "T - t": lambda t, T: T - t,
}


@dataclass
class Run:
    """One run of one denoiser in one thread.

    Attributes:
        scheduler: whose run it is.
        timesteps: the scheduler's tensor; another object means another run, so it is kept (an id could be reused).
        steps: N, model calls of the schedule.
        first: the step at which this denoiser was first called (later than 0 for img2img and for a second expert).
        step: the latest step.
        branches: the calls of this step so far, by name (see `contract.Call.branch`).
        previous: the branches of the step before.
        form: how the fed time is made from the timestep (a key of `FORMS`), None where it was not looked at.
        store: what a hook keeps; it goes with the run.
        notes: what a report must say.
    """

    scheduler: Any
    timesteps: torch.Tensor
    steps: int
    first: int
    step: int
    branches: list[str] = field(default_factory=list)
    previous: tuple[str, ...] = ()
    form: str | None = None
    store: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add to the notes, once."""
        if text not in self.notes:
            self.notes.append(text)


class Clock:
    """Reads the step of a call.

    Args:
        scheduler: gives the scheduler of the pipeline that was wrapped (it may be swapped between runs). Where that is
            one of this package, the one that last began a run in the calling thread takes its place, so that several
            pipelines can share a denoiser in several threads.
    """

    def __init__(self, scheduler: Callable[[], Any]) -> None:
        self._wrapped = scheduler
        self._owner: tuple[Any, int] | None = None  # timesteps of a foreign scheduler, and the thread that uses them

    def scheduler(self) -> Any:
        """The scheduler whose run this is."""
        own = self._wrapped()
        return (announced() or own) if isinstance(own, Announcing) else own

    def read(self, run: Run | None, timestep: Any, context_step: int | None, thread: int) -> Run:
        """The run of this call, a new one where the scheduler began one; its `step` is set.

        Args:
            run: the thread's latest run.
            timestep: what the model is fed.
            context_step: the step that the pipeline states with `cache_context`, if it does.
            thread: identity of the calling thread.

        Raises:
            RunError: if the scheduler has no run, has finished it, or belongs to another thread or pipeline.
            OptionError: if it makes several calls a step.
        """
        scheduler = self.scheduler()
        timesteps: Any = getattr(scheduler, "timesteps", None)
        same = run is not None and run.timesteps is timesteps
        if not same and not _has_run(scheduler, timesteps):
            raise RunError(
                f"the model is called, but {type(scheduler).__name__} has no run (set_timesteps was not called). Is "
                "another pipeline using this denoiser? That needs a scheduler of diffaccel in each of them."
            )
        step = self._step(scheduler, timesteps, run if same else None, timestep, context_step)
        if same and run is not None and step >= run.step:
            if step > run.step:
                run.previous, run.branches, run.step = tuple(run.branches), [], step
            return run
        self._claim(scheduler, timesteps, thread)
        return self._begin(scheduler, timesteps, timestep, step)

    def _step(
        self, scheduler: Any, timesteps: torch.Tensor, run: Run | None, timestep: Any, context_step: int | None
    ) -> int:
        step = context_step
        if step is None:
            step = getattr(scheduler, "step_index", None)
        if step is None:
            step = getattr(scheduler, "begin_index", None)
        if step is None:
            form = run.form if run is not None else None
            step = position(timesteps, timestep, _training_steps(scheduler), form)[0]
        if step >= len(timesteps):
            raise RunError(
                f"the model is called after the last of {len(timesteps)} steps of {type(scheduler).__name__}. Is "
                "another pipeline using this denoiser? That needs a scheduler of diffaccel in each of them."
            )
        return int(step)

    def _claim(self, scheduler: Any, timesteps: torch.Tensor, thread: int) -> None:
        if isinstance(scheduler, Announcing):
            return
        if self._owner is not None and self._owner[0] is timesteps and self._owner[1] != thread:
            raise RunError(
                f"two threads use this denoiser, but {type(scheduler).__name__} cannot tell whose step it is; give "
                "each pipeline a scheduler of diffaccel (TableScheduler.from_config)"
            )
        self._owner = (timesteps, thread)

    @staticmethod
    def _begin(scheduler: Any, timesteps: torch.Tensor, timestep: Any, step: int) -> Run:
        if getattr(scheduler, "order", 1) != 1:
            raise OptionError(
                f"{type(scheduler).__name__} makes {scheduler.order} model calls a step, which cannot be told from "
                "guidance branches; use a scheduler that makes one call a step"
            )
        if len(set(_levels(scheduler, timesteps))) < len(timesteps):
            raise OptionError(
                f"{type(scheduler).__name__} repeats timesteps ({len(timesteps)} of them for "
                f"{getattr(scheduler, 'num_inference_steps', '?')} steps), so that a call cannot be placed by its "
                "step; use a scheduler that makes one call at each timestep"
            )
        run = Run(scheduler, timesteps, len(timesteps), step, step)
        if _on_host(timestep):
            due, training = float(timesteps[step]), _training_steps(scheduler)
            run.form = form_of_time(timestep, due, training)
            if run.form is None:
                raise RunError(
                    f"the model is fed {_number(timestep):g}, but {type(scheduler).__name__} is at step {step}, where "
                    f"its timestep is {due:g}. Is another pipeline using this denoiser?"
                )
        return run


def _has_run(scheduler: Any, timesteps: Any) -> bool:
    return isinstance(timesteps, torch.Tensor) and getattr(scheduler, "num_inference_steps", None) is not None


def form_of_time(timestep: Any, due: float, training: float) -> str | None:
    """The form in which `timestep` is the timestep `due`; None if it is in none."""
    value, most = _number(timestep), _tolerance(timestep) * max(1.0, abs(due))
    return next((name for name, form in FORMS.items() if abs(form(value, training) - due) <= most), None)


def _tolerance(timestep: Any) -> float:
    """Pipelines round what they feed to the dtype of the model."""
    rounded = isinstance(timestep, torch.Tensor) and timestep.is_floating_point()
    return max(MATCH, torch.finfo(timestep.dtype).eps) if rounded else MATCH


def position(timesteps: torch.Tensor, timestep: Any, training: float, form: str | None) -> tuple[int, str]:
    """Index in `timesteps` of what the model is fed, and the form in which it is fed.

    An element of `timesteps` (or a view of it) is recognised by where it lies in memory, without reading a value.

    Raises:
        RunError: if no form of it is among the timesteps.
    """
    if isinstance(timestep, torch.Tensor) and timestep.device.type != "meta" and timestep.dtype is timesteps.dtype:
        place = int(timestep.storage_offset()) - int(timesteps.storage_offset())
        shared = timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
        if shared and 0 <= place < len(timesteps):
            return place, "t"
    value, known = _number(timestep), timesteps.tolist()
    for name in FORMS if form is None else [form]:
        t = FORMS[name](value, training)
        gaps = [abs(t - k) / max(1.0, abs(k)) for k in known]
        if min(gaps) <= _tolerance(timestep):
            return gaps.index(min(gaps)), name
    raise RunError(
        f"the model is fed {value:g}, which is none of the scheduler's timesteps {known[:3]}... in any of the forms "
        f"{', '.join(FORMS)}; is another pipeline using this denoiser?"
    )


def _on_host(timestep: Any) -> bool:
    return not isinstance(timestep, torch.Tensor) or timestep.device.type == "cpu"


def _number(timestep: Any) -> float:
    # the last one: where tokens have times of their own, those of given frames come first and are 0
    return float(timestep.reshape(-1)[-1]) if isinstance(timestep, torch.Tensor) else float(timestep)


def _training_steps(scheduler: Any) -> float:
    return float(scheduler.config.get("num_train_timesteps", 1000))


def _levels(scheduler: Any, timesteps: torch.Tensor) -> list[float]:
    """What tells steps apart: the sigmas where they lie on the CPU, so that no device is waited for."""
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor) and sigmas.device.type == "cpu" and len(sigmas) == len(timesteps) + 1:
        return [float(s) for s in sigmas[:-1]]
    return [float(t) for t in timesteps.tolist()]


# ---------------------------------------------------------------------- noise levels
@dataclass(frozen=True)
class Levels:
    """The noise levels of a run and what the model predicts.

    Attributes:
        path: of the checkpoint.
        nodes: N + 1 levels; the last is where the run ends.
        output: what the model's raw output is.
    """

    path: Path
    nodes: tuple[Node, ...]
    output: Output

    def fed(self, step: int) -> float:
        """What the state is multiplied by before the model sees it."""
        if self.path.family != "edm":
            return 1.0
        return 1.0 / math.hypot(self.nodes[step].sigma, self.output.sigma_data)


def levels_of(scheduler: Any) -> Levels | None:
    """The noise levels of the scheduler's run, or None where its config or attributes do not prove them."""
    config = scheduler.config
    try:
        path = Path.from_config(config)
        timesteps, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
        if isinstance(sigmas, torch.Tensor) and len(sigmas) == len(timesteps) + 1:
            found = [_at(path, float(s)) for s in sigmas.tolist()]
        else:
            found = [*(path.at(float(t)) for t in timesteps.tolist()), path.end]
        return Levels(path, tuple(found), _output(path, config))
    except (PathError, OptionError):
        return None


def _at(path: Path, sigma: float) -> Node:
    if sigma == 0:
        return path.end
    return path.at(path.train_steps * sigma) if isinstance(path, Flow) else path.at_level(sigma)


def _output(path: Path, config: Any) -> Output:
    if path.family == "flow":
        return Output("flow")
    kind = config.get("prediction_type") or "epsilon"
    if path.family == "edm":
        data = float(config.get("sigma_data") or 1.0)
        return Output("edm_eps" if kind == "epsilon" else "edm_v", data)
    return Output.of(kind)
