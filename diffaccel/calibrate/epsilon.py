"""The constant of epsilon scaling, fitted on a checkpoint by two estimators, and whether it helps."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..artifact import Artifact, path_identity
from ..core.node import Node
from ..core.path import Path
from ..core.prediction import Output, pair
from ..errors import OptionError
from ..identity import model_identity
from ..samplers.epsilon_scale import epsilon_scale
from ..schedulers import TableScheduler
from ..schedulers.from_config import output_of
from .engine import Batch, Captured, Engine
from .gauss import one_budget
from .validate import ends, errors, verdict

TEACHER: tuple[str, dict[str, Any]] = ("dpmpp", {"order": 2})
RANGE = (0.95, 1.05)  # of lambda
STEP = 0.002  # from 1 to the second evaluation
EVALUATIONS = 6
LATE = 3  # the norm ratio is averaged over the calls after the first 1/LATE of them
FEWEST = 8


def epsilon(
    pipe: Any,
    prompts: Sequence[str],
    *,
    calls: int | Sequence[int] = 10,
    sampler: str = "ddim",
    options: Mapping[str, Any] | None = None,
    below: float | None = None,
    images: int = 32,
    held_out: int = 32,
    teacher_calls: int = 60,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    batch: int = 8,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Artifact:
    """Fit lambda of `diffaccel.epsilon_scale` for one sampler at one number of calls; it serves no other.

    Two estimators, by the secant method: "moment", with which the samples have the variance of a many-step teacher's,
    and "norm", with which the model's noise prediction is as large on the sampler's trajectory as on noised samples
    (mean of the log ratio over the last two thirds of the calls; arXiv:2308.15321). Each is then compared with
    lambda = 1 on other images: the paired change of the distance to the teacher, with its interval. The better one is
    kept, and the receipt says "no benefit found" where the interval holds 0.

    Args:
        pipe: text-to-image or class-conditional; left as it was.
        prompts: used in turn.
        calls, sampler, options: of the sampler, which must be deterministic.
        below: scale only the calls at levels (sigma/alpha) up to this.
        images, held_out: images to fit on, and to judge on.
        teacher_calls: of the teacher.
        guidance, call, batch, seed, out, progress: as for every calibration.

    Returns:
        kind "epsilon": `lambda` (1,); `options` are those of `epsilon_scale` (`at_end` is 1 if nothing helped).
    """
    if images < FEWEST or held_out < FEWEST:
        raise OptionError(f"calibrate epsilon needs {FEWEST} images and held-out ones or more")
    calls = one_budget("epsilon", calls)
    settings = {"kind": "epsilon", "calls": calls, "sampler": sampler, "images": images, "below": below}
    engine = Engine(pipe, prompts, guidance=guidance, call=call, batch=batch, seed=seed, out=out, settings=settings,
                    progress=progress)  # fmt: skip
    config = pipe.scheduler.config
    fit_on, judge_on = engine.batches(0, images), engine.batches(images, held_out)
    total = (images + held_out) * teacher_calls + (2 * EVALUATIONS + 1) * images * calls + 3 * held_out * calls
    with engine.working(total, "epsilon"):
        clean = ends(engine, "teacher", fit_on, lambda: Captured.of(config, *TEACHER), teacher_calls)
        target = ends(engine, "judge", judge_on, lambda: Captured.of(config, *TEACHER), teacher_calls)
        work = _Work(engine, config, sampler, dict(options or {}), calls, below, fit_on, clean)
        if work.make(1.0).stochastic_at(calls):
            raise OptionError(f"calibrate epsilon: sampler {sampler!r} draws noise, so it has no distance to a teacher")
        found = {"moment": secant(work.moment), "norm": secant(work.norm)}

        def judged(name: str, value: float) -> np.ndarray:
            return errors(ends(engine, f"judged {name}", judge_on, lambda: work.make(value), calls), target)

        plain = judged("plain", 1.0)
        verdicts = {name: verdict(plain, judged(name, value)) for name, value in found.items()}
    best = min(verdicts, key=lambda name: (not verdicts[name].helps, verdicts[name].difference))
    helps = verdicts[best].helps
    chosen = found[best] if helps else 1.0
    receipt = {
        "chosen": f"{best}: lambda = {chosen:.5f}" if helps else "no benefit found: lambda = 1",
        **{name: {"lambda": found[name], **v.to_json()} for name, v in verdicts.items()},
    }
    path = Path.from_config(config)
    made = Artifact(
        "epsilon",
        {"lambda": np.array([chosen])},
        {
            "path": path_identity(path, str(work.make(1.0).config.prediction_type)),
            "model": model_identity(pipe),
            "guidance": engine.guidance,
            "calls": calls,
            "options": {"at_end": chosen, **({} if below is None else {"below": below})},
            "sampler": {"name": sampler, "options": dict(options or {})},
            "seeds": [seed, seed + images + held_out],
            "cost": engine.cost,
            "receipt": receipt,
        },
    )
    return engine.finish(made)


def secant(f: Callable[[float], float]) -> float:
    """The root of f near 1, within `RANGE`, by at most `EVALUATIONS` evaluations; the best point if there is none."""
    a, b = 1.0, 1.0 + STEP
    fa, fb = f(a), f(b)
    best = min(((abs(fa), a), (abs(fb), b)))
    for _ in range(EVALUATIONS - 2):
        if fb == fa or best[0] < 1e-4:
            break
        c = min(max(b - fb * (b - a) / (fb - fa), RANGE[0]), RANGE[1])
        if abs(c - b) < 1e-6:
            break
        a, fa, b = b, fb, c
        fb = f(b)
        best = min(best, (abs(fb), b))
    return best[1]


class _Scaled(Captured):
    """For one lambda."""

    def stochastic_at(self, calls: int) -> bool:
        """Whether a run of that many calls draws noise."""
        twin = TableScheduler.from_config(self.config)
        twin.set_timesteps(calls, mu=1.0)
        return twin.table.stochastic


@dataclass
class _Work:
    """Runs of the sampler with a lambda on the fitting images."""

    engine: Engine
    config: Mapping[str, Any]
    sampler: str
    options: dict[str, Any]
    calls: int
    below: float | None
    batches: Sequence[Batch]
    clean: np.ndarray
    noised: list[np.ndarray] | None = None

    def make(self, value: float, see: Any = None) -> _Scaled:
        more = {} if self.below is None else {"below": self.below}
        made = _Scaled.of(self.config, self.sampler, self.options, see=see, rewrite=[epsilon_scale(value, **more)])
        assert isinstance(made, _Scaled)
        return made

    def moment(self, value: float) -> float:
        """Log of the ratio of the samples' variance to the teacher's."""
        states = [self.engine.run(b, self.make(value), self.calls).double().cpu().numpy() for b in self.batches]
        return float(np.log(np.var(np.concatenate(states)) / np.var(self.clean)))

    def norm(self, value: float) -> float:
        """Mean log ratio of the noise prediction's size on the trajectory to that on noised samples."""
        logs: list[float] = []
        kept: list[list[np.ndarray]] = []
        nodes: list[Node] = []
        for batch in self.batches:
            calls: list[tuple[torch.Tensor, torch.Tensor]] = []

            def see(i: int, x: torch.Tensor, raw: torch.Tensor, state: torch.Tensor, to: Any = calls) -> None:
                to.append((x.detach().clone(), raw.detach().clone()))

            scheduler = self.make(value, see)
            self.engine.run(batch, scheduler, self.calls)
            nodes = scheduler.table.nodes[:-1]
            kept.append([_size(scheduler, node, *call) for node, call in zip(nodes, calls, strict=True)])
        if self.noised is None:
            self.noised = self._on_noised(nodes)
        for i in range(len(nodes) // LATE, len(nodes)):
            mean = np.mean(np.concatenate([outputs[i] for outputs in kept]))
            logs.append(math.log(mean / np.mean(self.noised[i])))
        return float(np.mean(logs))

    def _on_noised(self, nodes: Sequence[Node]) -> list[np.ndarray]:
        found = []
        for i, node in enumerate(nodes):
            sizes, first = [], 0
            for k, batch in enumerate(self.batches):
                x0 = torch.from_numpy(self.clean[first : first + len(batch)])
                first += len(batch)
                z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(7919 * i + k), dtype=x0.dtype)
                if i < len(nodes) // LATE:
                    continue  # not used
                x, raw = self.engine.output(batch, node, (node.alpha * x0 + node.sigma * z).float(), self.config)
                sizes.append(_size(self.make(1.0), node, x, raw))
            found.append(np.concatenate(sizes) if sizes else np.zeros(0))
        return found


def _size(scheduler: TableScheduler, node: Node, x: torch.Tensor, raw: torch.Tensor) -> np.ndarray:
    """(B,) RMS of the noise prediction."""
    output: Output = output_of(scheduler.config)
    u, w = pair(output, "eps", node)
    e: torch.Tensor = float(u) * x.double() + float(w) * raw.double()
    out: np.ndarray = e.flatten(1).square().mean(dim=1).sqrt().cpu().numpy()
    return out
