"""ParaDiGMS on an unmodified pipeline: several steps of one image in one batch of the denoiser.

The pipeline's own loop runs. In each of its iterations the hook hands the denoiser the states of a whole window, with
the pipeline's own conditioning repeated and with each state's own timestep; the pipeline combines its guidance as
always, only on a longer batch; and the scheduler turns the answers into the next window. When all states are found the
iterations that are left call no model.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..core.prediction import Output, pair
from ..core.table import Table
from ..denoiser.contract import Uncopied
from ..errors import OptionError, RunError
from ..parallel.picard import Picard, Work, check_options
from ..schedulers.from_config import output_of
from ..schedulers.policy import policy_of
from ..schedulers.run import Run
from ..schedulers.table_scheduler import TableScheduler, TableSchedulerOutput
from .handle import Handle, denoisers, refuse_stateful, refuse_wrapped

PIPELINES = (
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline", "StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "FluxPipeline",
    "FluxImg2ImgPipeline", "QwenImagePipeline", "WanPipeline",
)  # fmt: skip
STATES = ("sample", "hidden_states")  # what denoisers call the state
UNBATCHED = ("img_ids", "txt_ids")  # positions: the first axis counts tokens
# How pipelines tell the denoiser the time, from an entry of `scheduler.timesteps` in the dtype of the argument.
CLOCKS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (lambda t: t, lambda t: t / 1000)
REFUSED = {
    "denoising_end": "it would end the run before its states are found",
    "denoising_start": "it would begin the run in the middle of its timesteps",
    "skip_guidance_layers": "its guidance depends on the number of the iteration, which is not the number of the row",
}


@dataclass(frozen=True)
class PicardReport:
    """What was measured in a run.

    Args:
        rows: model calls of the sequential run (those of a guidance pair count once, as everywhere).
        sweeps: batches of the denoiser: the latency, in batched calls.
        calls: model calls in these batches: the work.
        window: the most rows in a batch.
        complete: whether the run reached its end.
        seconds: in the denoiser, on this device, all sweeps.
        seconds_scan: in the arithmetic between the sweeps.
        work: every sweep.
    """

    rows: int
    sweeps: int
    calls: int
    window: int
    complete: bool
    seconds: float
    seconds_scan: float
    work: Work = field(repr=False)

    def predicted(self, devices: int) -> float:
        """PREDICTED, not measured: seconds in the denoiser if each batch were shared among `devices` like this one.

        It takes the time of a batch to be proportional to its rows (true of a device that one row keeps busy) and
        communication to be free.
        """
        return self.work.rounds(devices) * self.seconds / self.calls

    def __str__(self) -> str:
        end = "" if self.complete else "; INCOMPLETE: the run was cut short"
        lines = [
            f"paradigms: {self.rows} rows in {self.sweeps} sweeps of up to {self.window} rows; "
            f"{self.calls} model calls ({self.calls / self.rows:.2f} times the work){end}",
            f"measured on this device: {self.seconds:.3f} s in the denoiser, {self.seconds_scan:.3f} s between sweeps",
        ]
        lines += [f"predicted on {p} devices: {self.predicted(p):.3f} s" for p in (2, 4, 8) if p <= self.window]
        return "\n".join(lines)


@dataclass
class _Session:
    """One run of one thread."""

    run: Run  # of the user's scheduler, opened at its first row
    output: Output
    edm: bool
    clock: Callable[[torch.Tensor], torch.Tensor] | None = None
    shape: tuple[int, ...] = ()  # of one answer of the denoiser
    picard: Picard | None = None
    given: torch.Tensor | None = None  # what the pipeline was handed last
    opening: tuple[torch.Tensor, torch.Tensor] | None = None  # state and time as the denoiser was first given them
    seconds: float = 0.0
    seconds_scan: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether all states are found."""
        return self.picard is not None and self.picard.done

    def scale(self, row: int) -> float:
        """What the state of a row is multiplied with before the denoiser sees it (EDM)."""
        if not self.edm:
            return 1.0
        return self.output.input_scale(self.run.rows[row].row.node.sigma)

    def learn(self, sample: torch.Tensor, timestep: torch.Tensor) -> None:
        """From the first call: how the pipeline makes the denoiser's state and time from `sample` and `timestep`.

        Raises:
            RunError: if it does so in a way that we do not know.
        """
        if self.opening is None:
            raise RunError("paradigms: step was called before the denoiser")
        state, time = self.opening
        check_state(state, sample * self.scale(0))
        now = torch.as_tensor(timestep, device=time.device)
        same = (c for c in CLOCKS if time.ndim < 2 and torch.equal(c(now.to(time.dtype)), time.reshape(-1)[0]))
        self.clock = next(same, None)
        if self.clock is None:
            raise RunError(
                f"paradigms: the pipeline tells its denoiser the time {time.reshape(-1)[:3].tolist()} at timestep "
                f"{float(now)}; known are the timestep itself and a thousandth of it, one for each image"
            )

    def times(self, rows: range, like: torch.Tensor) -> torch.Tensor:
        """What the denoiser is told at these rows of the whole run."""
        assert self.clock is not None
        t = self.run.timesteps[rows.start : rows.stop]
        return self.clock(t.to(device=like.device, dtype=like.dtype))


def check_state(state: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise `RunError` unless the denoiser is given the scheduler's state, once or several times over, and no more."""
    batch, ok = len(expected), state.shape[1:] == expected.shape[1:] and len(state) % len(expected) == 0
    if not (ok and all(torch.equal(part, expected.to(state.dtype)) for part in state.split(batch))):
        raise RunError(
            f"paradigms: the denoiser is given a state {tuple(state.shape)} that is not the scheduler's state "
            f"{tuple(expected.shape)} repeated: the pipeline adds channels to it (inpainting), or a callback "
            "changed it. Such runs need each state before the next; run them without paradigms"
        )


class PicardScheduler(SchedulerMixin):
    """Stands in for a `TableScheduler` while `paradigms` is on; what it does not do itself, that one does."""

    def __init__(self, base: TableScheduler, options: dict[str, Any]) -> None:
        self.base, self.options = base, options
        self._local = threading.local()

    def __getattr__(self, name: str) -> Any:
        if name in ("base", "_local"):  # not there yet: being copied
            raise AttributeError(name)
        return getattr(self.base, name)

    @property
    def session(self) -> _Session:
        """This thread's run."""
        found: _Session | None = getattr(self._local, "session", None)
        if found is None:
            raise RunError("paradigms: no run was begun in this thread: the pipeline calls set_timesteps first")
        return found

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None,
                      timesteps: Any = None, mu: float | None = None) -> None:  # fmt: skip
        """As in `TableScheduler`."""
        self.base.set_timesteps(num_inference_steps, device, sigmas=sigmas, timesteps=timesteps, mu=mu)
        run = self.base._runs.need()
        self._local.session = _Session(run, output_of(self.base.config), self.base.config.path == "edm")

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """At the first call as always; later the sample, as the hook scales every state for its own level."""
        return self.base.scale_model_input(sample, timestep) if self.session.picard is None else sample

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, generator: Any = None,
             return_dict: bool = True, **kwargs: Any) -> Any:  # fmt: skip
        """Take the answers for a whole window; return the last state that is found, of the shape of `sample`."""
        session = self.session
        start = time.perf_counter()
        if session.picard is None:
            self._begin(session, timestep, sample, generator)
        picard = session.picard
        assert picard is not None
        if not picard.done:
            picard.sweep(self._answers(session, picard, model_output))
        session.given = picard.state.to(sample.dtype)
        session.seconds_scan += time.perf_counter() - start
        return TableSchedulerOutput(session.given, session.given) if return_dict else (session.given, session.given)

    def _begin(self, session: _Session, timestep: Any, sample: torch.Tensor, generator: Any) -> None:
        """The first step: only now is it known what one image's state is."""
        run = self.base._open(timestep, sample)
        session.run = run
        session.learn(sample, timestep)
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        table = Table(tuple(c.row for c in run.rows), run.table.sampler, run.table.options)

        def noise(x: torch.Tensor) -> torch.Tensor:
            return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)

        session.picard = Picard(table, sample.to(dtype), noise, opening=1, **self.options)

    def _answers(self, session: _Session, picard: Picard, output: torch.Tensor) -> list[torch.Tensor]:
        """What the model said of each state, in the space that is held fixed."""
        requests = picard.requests()
        batch = len(picard.start)
        if len(output) != batch * len(requests):
            raise RunError(
                f"paradigms: the pipeline answered with {len(output)} outputs for {len(requests)} rows of {batch} "
                "images: it does not treat a batch image by image"
            )
        answers = []
        for (state, node, space), out in zip(requests, output.to(picard.start.dtype).split(batch), strict=True):
            u, w = pair(session.output, space, node)
            answers.append(state * u + out * w)
        return answers


NONLINEAR = (
    "the scheduler changes each x0-prediction by its values (thresholding, clip_sample, a policy), which no linear "
    "solve can foresee; switch it off, or run without paradigms"
)


class _WindowHook(Uncopied):
    """Calls the denoiser on all states of the window at once."""

    def __init__(self, scheduler: PicardScheduler) -> None:
        super().__init__()
        self.scheduler = scheduler

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        session = self.scheduler.session
        bound = inspect.signature(forward).bind(*args, **kwargs)
        name = next(n for n in STATES if n in bound.arguments)
        state = bound.arguments[name]
        arguments = bound.arguments | bound.arguments.pop("kwargs", {})
        if session.idle:
            return (state.new_zeros((len(state), *session.shape)),)
        picard = session.picard
        if picard is None:  # the opening call, of one row, is the pipeline's own
            session.opening = (state, torch.as_tensor(arguments["timestep"]))
            out = self._timed(session, forward, arguments)
            session.shape = tuple(out[0].shape[1:])
            return out
        assert session.given is not None
        check_state(state, session.given)
        batch, requests = len(picard.start), picard.requests()
        wide = {
            key: value if key in UNBATCHED else widened(value, batch, len(state) // batch, len(requests))
            for key, value in arguments.items()
        }
        window = [x * session.scale(picard.first + i) for i, (x, _, _) in enumerate(requests)]
        copies = len(state) // batch
        wide[name] = torch.cat(window).to(state.dtype).repeat(copies, *[1] * (state.ndim - 1))
        rows = range(session.run.start + picard.first, session.run.start + picard.last)
        times = session.times(rows, torch.as_tensor(arguments["timestep"]))
        wide["timestep"] = times.repeat_interleave(batch).repeat(copies)
        return self._timed(session, forward, wide)

    @staticmethod
    def _timed(session: _Session, forward: Any, arguments: dict[str, Any]) -> Any:
        on_gpu = any(isinstance(v, torch.Tensor) and v.is_cuda for v in arguments.values())
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = forward(**arguments)
        if on_gpu:
            torch.cuda.synchronize()
        session.seconds += time.perf_counter() - start
        if not isinstance(out, tuple):
            raise RunError("paradigms: the pipeline calls its denoiser with return_dict=True, which is not supported")
        return out


def widened(value: Any, batch: int, copies: int, rows: int) -> Any:
    """An argument of the denoiser for more states: (copies * batch, ...) -> (copies * rows * batch, ...).

    A pipeline stacks `copies` of its batch (guidance) and takes them apart again with `chunk`, so the rows go between.
    """
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or len(value) != copies * batch:
            return value
        parts = value.reshape(copies, 1, batch, *value.shape[1:])
        return parts.expand(-1, rows, *parts.shape[2:]).reshape(-1, *value.shape[1:])
    if isinstance(value, dict):
        return {k: widened(v, batch, copies, rows) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        if any(isinstance(v, (torch.Tensor, dict)) for v in value):
            return type(value)(widened(v, batch, copies, rows) for v in value)
        if len(value) == copies * batch:
            return [v for c in range(copies) for _ in range(rows) for v in value[c * batch : (c + 1) * batch]]
    return value


class Paradigms(Handle):
    """Handle of `paradigms`."""

    def __init__(self, pipe: Any, scheduler: PicardScheduler) -> None:
        hooks: dict[torch.nn.Module, ModelHook] = {m: _WindowHook(scheduler) for m in denoisers(pipe).values()}
        super().__init__(pipe, "paradigms", scheduler, hooks)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`pipe(...)`; refuses arguments whose meaning depends on one call after the other."""
        for name, why in REFUSED.items():
            if kwargs.get(name) is not None:
                raise OptionError(f"paradigms: {name} is refused: {why}")
        return self.pipe(*args, **kwargs)

    def report(self) -> PicardReport:
        """Sweeps, calls and seconds of this thread's last run.

        Raises:
            RunError: before the first run.
        """
        session = self._scheduler.session
        if session.picard is None:
            raise RunError("paradigms: nothing to report: no run has made a step in this thread")
        work, window, done = session.picard.work, int(session.picard.window or 0), session.picard.done
        return PicardReport(
            work.rows, len(work.sweeps), work.calls, window, done, session.seconds, session.seconds_scan, work
        )


def paradigms(
    pipe: Any, *, window: int | None = None, tol: float = 0.1, space: str | None = None, rule: str = "scan"
) -> Paradigms:
    """Run a pipeline with several steps of each image in one batch (ParaDiGMS, arXiv:2305.16317).

    The result is that of the same scheduler one call after the other, to within `tol`. It takes fewer, larger batches
    and more model calls in all: it is faster only where a batch of several rows takes hardly longer than one.

        pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="ddim")
        with da.paradigms(pipe, window=16) as h:
            image = h(prompt, num_inference_steps=50).images[0]
        print(h.report())

    Args:
        pipe: a pipeline of `PIPELINES` whose scheduler is a `TableScheduler`.
        window, tol, space, rule: see `diffaccel.parallel.picard.Picard`; memory grows with `window`.

    Raises:
        OptionError: a pipeline, scheduler, option or hook that this cannot run with, and why.
    """
    refuse_wrapped(pipe)
    kind, scheduler = type(pipe).__name__, pipe.scheduler
    if kind not in PIPELINES:
        raise OptionError(f"paradigms: {kind} is not supported: its states are not all that its denoiser is given. "
                          f"Supported: {', '.join(PIPELINES)}")  # fmt: skip
    if not isinstance(scheduler, TableScheduler) or type(scheduler).step is not TableScheduler.step:
        raise OptionError(
            f"paradigms needs the rows of a table, and {type(scheduler).__name__} has none; set pipe.scheduler = "
            "TableScheduler.from_config(pipe.scheduler.config, sampler=...) first"
        )
    if policy_of(scheduler.config) is not None or scheduler.config.get("policy"):
        raise OptionError(f"paradigms: {NONLINEAR}")
    if getattr(pipe, "transformer_2", None) is not None:
        raise OptionError("paradigms: a pipeline with two transformers for two parts of a run is not supported")
    refuse_stateful(pipe, "paradigms", "rows of one batch are different steps of a run, which it would mix")
    options: dict[str, Any] = {"window": window, "tol": tol, "space": space, "rule": rule}
    check_options(**options)
    return Paradigms(pipe, PicardScheduler(scheduler, options))
