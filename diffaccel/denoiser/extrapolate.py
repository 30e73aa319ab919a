"""`diffaccel.extrapolate`: FSampler on any pipeline with any scheduler, decided during the run."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import RunError
from .clock import Clock, Run
from .contract import PREFIX, attach, denoisers, detach, outermost, refuse_wrapped
from .extrapolation_hook import ExtrapolationHook
from .extrapolation_report import Report
from .extrapolation_settings import Skip, settings

NAME = PREFIX + "extrapolate"


def extrapolate(
    pipe: Any,
    skip: Skip = "h2/s2",
    *,
    quantity: str = "output",
    coordinate: str | None = None,
    protect: Sequence[int] | None = None,
    tol: float | None = None,
    anchor: int | None = None,
    max_consecutive: int | None = None,
    gate: str | None = None,
    stabilizer: str | None = None,
    beta: float | None = None,
    gradient: bool = False,
    history: int | None = None,
    streak_rule: bool = False,
    validate: bool | None = None,
    max_ratio: float = 50.0,
) -> Extrapolation:
    """Predict the answers of some model calls from earlier ones (ComfyUI-FSampler, arXiv:2511.09180).

        with diffaccel.extrapolate(pipe, "h2/s3") as h:
            image = pipe(prompt, num_inference_steps=20).images[0]
        print(h.report())

    The number of steps is the pipeline's own; calls are saved from it. For patterns known before the run
    `FSamplerScheduler` does the same without a hook, and counts calls instead of steps.

    Args:
        pipe: a pipeline of diffusers; all its denoisers are hooked, each with a history of its own.
        skip: "h2/s3" (2 points, 3 calls between skips), explicit steps "h3, 5, 9" or [5, 9], "adaptive", a function
            `f(step, steps) -> bool`, or None (nothing is skipped, the run is only measured).
        quantity: what is extrapolated: "output" (the model's own), "x0", "eps", "flow", "residual".
        coordinate: of the polynomial: "sigma", "lam", "index"; None: "sigma" where the scheduler's config proves the
            noise levels, else "index".
        protect: steps at both ends of a run that patterns and the gate always call; (2, 2).
        tol, anchor, max_consecutive: of the adaptive gate (0.10, 4, 4); see `core.extrapolation_policy.Gate`.
        gate: "image" (default): each image of a batch is decided by itself and computed alone where others skip;
            "batch": one decision for all, as in FSampler.
        stabilizer: "ema" divides predictions by a running ratio of predicted to real size, decay `beta` (0.999).
        gradient: FSampler's gradient estimation.
        history: points of the predictor for lists and functions (2).
        streak_rule: FSampler's own rule for explicit lists, which drops some of them.
        validate: look at the norms of predictions before they are used; None: on the CPU and in adaptive runs, where
            no device has to be waited for.
        max_ratio: a prediction with more than this times the norm of the last real answer is not used.

    Returns:
        A handle: a context manager with `.remove()` and `.report()`.

    Raises:
        OptionError: an option that is unknown or without effect; a pipeline that is wrapped already, or has no
            denoiser that hooks understand.
    """
    chosen = settings(
        skip, quantity=quantity, coordinate=coordinate, protect=protect, tol=tol, anchor=anchor,
        max_consecutive=max_consecutive, gate=gate, stabilizer=stabilizer, beta=beta, gradient=gradient,
        history=history, streak_rule=streak_rule, validate=validate, max_ratio=max_ratio,
    )  # fmt: skip
    return Extrapolation(pipe, chosen)


class Extrapolation:
    """A pipeline whose denoisers are hooked; leave the `with` block or call `remove` to undo it."""

    def __init__(self, pipe: Any, chosen: Any) -> None:
        self._settings = chosen
        self._local = threading.local()
        self._latest: Report | None = None
        self._modules: list[torch.nn.Module] = []
        found = denoisers(pipe)
        for module in found.values():
            refuse_wrapped(module)
        try:
            for module in found.values():
                hook = ExtrapolationHook(Clock(lambda: pipe.scheduler), pipe, chosen, self._report_of)
                attach(module, hook, NAME)
                self._modules.append(module)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Undo: the pipeline is what it was. Doing it twice does nothing."""
        while self._modules:
            detach(self._modules.pop(), NAME)

    def report(self) -> Report:
        """What was measured in this thread's last run (else in the last run of any thread).

        Raises:
            RunError: if there was none.
        """
        found = getattr(self._local, "report", None) or self._latest
        if found is None:
            raise RunError(
                "no run was made yet: call the pipeline first (a model that was compiled in place, with "
                "module.compile(), after it was wrapped goes past hooks)"
            )
        return found

    def __enter__(self) -> Extrapolation:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def _report_of(self, run: Run) -> Report:
        """The report of a run, which all denoisers of the pipeline share."""
        if getattr(self._local, "timesteps", None) is not run.timesteps or run.step < self._local.report.latest:
            self._local.timesteps = run.timesteps
            self._local.report = Report(self._settings.name, first=run.step)
            self._latest = self._local.report
            if any(not outermost(module, NAME) for module in self._modules):
                self._local.report.note(
                    "something was put around the model after extrapolate (another hook, offloading): it works on "
                    "skipped steps, too; call extrapolate last"
                )
        report: Report = self._local.report
        return report
