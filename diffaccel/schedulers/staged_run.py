"""One run that changes its resolution: its levels, the rows of each stage, and what happens between two stages."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..core.grid import checked, native
from ..core.node import Node
from ..core.path import Nodes, Path
from ..core.stage_plan import Leg
from ..core.stages import Size, Spectrum, level, missing, ratio
from ..core.table import Table
from .from_config import output_of
from .policy import policy_of
from .resize import Memory, dct, drawer, idct, resized, transition
from .run import Run, compiled
from .table_scheduler import TableScheduler

AHEAD = 3  # nodes beyond a stage's end, so that no sampler takes it for the end of the run


@dataclass(frozen=True)
class Switch:
    """What one change of size did.

    Args:
        kind: "aligned" or "renoise".
        fill: of the new band; None where there is none, or the state was clean.
        r: `sqrt(H'W'/(HW))`; rho, rho_after: noise levels sigma/alpha before and after.
        missing: fraction of the new band's power that is lost, and w2: squared Wasserstein distance for each element,
            both for a Gaussian field with the known spectrum and an exact solver; None where no spectrum is known.
        drew: whether noise was drawn.
        seconds: that it took.
    """

    kind: str
    fill: str | None
    r: float
    rho: float
    rho_after: float
    missing: float | None
    w2: float | None
    drew: bool
    seconds: float


@dataclass
class StagedRun:
    """One run of one thread.

    Args:
        path: of the model.
        grid: flow times of the base scheduler's own run; ends: its first and last node.
        timesteps, sigmas: of all calls, as diffusers knows them.
    """

    path: Path
    grid: list[float]
    ends: tuple[Node, Node]
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    legs: list[Leg] = field(default_factory=list)
    counter: int = 0
    stage: int = 0
    run: Run | None = None  # of the present stage
    history: list[torch.Tensor] | None = None  # predictions of the stage before, newest first, if they may be carried
    full: Size | None = None  # requested size of the latents
    laid: bool = False  # whether the legs are those of the real size
    seeds: list[int] = field(default_factory=list)
    memory: Memory | None = None
    stored: int = 0  # most bytes that the memory took
    switches: list[Switch] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each finished stage
    clock: float = 0.0

    @property
    def size(self) -> Size:
        """Of the latents of the present stage."""
        return self.legs[min(self.stage, len(self.legs) - 1)].size

    @property
    def first(self) -> int:
        """Number of the first call of the present stage."""
        return sum(leg.stage.steps for leg in self.legs[: self.stage])

    @property
    def time(self) -> float:
        """Flow time of the next call's state."""
        return float(self.legs[self.stage].times[self.counter - self.first])

    def nodes(self, k: int) -> list[Node]:
        """The nodes of stage k, its end included."""
        return [self._node(float(tau)) for tau in self.legs[k].times]

    def _node(self, tau: float) -> Node:
        for node, at in zip(self.ends, (self.grid[0], self.grid[-1]), strict=True):
            if tau == at:
                return Node(*node.key)
        return self.path.at_level(level(tau))

    def lay(self, device: Any = None) -> None:
        """Timesteps and sigmas from the legs. Without a device in place: pipelines iterate over views."""
        nodes = [node for k in range(len(self.legs)) for node in self.nodes(k)[:-1]]
        levels = [native(node, self.path) for node in (*nodes, self.nodes(len(self.legs) - 1)[-1])]
        t, sigmas = torch.tensor([node.t for node in nodes], dtype=torch.float32), torch.tensor(levels)
        if device is None and self.timesteps.dtype == t.dtype:
            self.timesteps.copy_(t)
            self.sigmas.copy_(sigmas)
        else:
            self.timesteps, self.sigmas = t.to(device or self.timesteps.device), sigmas


# ---------------------------------------------------------------------- rows of a stage
def open_stage(run: StagedRun, base: TableScheduler, carry: bool, device: torch.device) -> Run:
    """The rows of the present stage; with `carry`, those of a run that came here from the stages before."""
    k = run.stage
    own = run.nodes(k)
    past = _past(run, k) if carry else []
    beyond = [] if k + 1 == len(run.legs) else _beyond(run.path, own)
    sampler, options = base._sampler()[0], base._runs.need().options
    table = sampler.trace(checked([*past, *own, *beyond], run.path, f"stage {k}"), **options)
    rows = table.rows[len(past) : len(past) + len(own) - 1]
    part = Table(rows, table.sampler, table.options)
    output, policy = output_of(base.config), policy_of(base.config)
    made = Run(part, own, Nodes(own, run.path), run.timesteps, run.sigmas, run.timesteps)
    made.rows = compiled(rows, output, policy, device)
    made.policy, made.depth, made.noise_depth = policy, part.depth, part.noise_depth
    made.registers = [None] * part.slots
    made.history = [resized(p, run.size) for p in run.history or []] if carry else []
    return made


def _past(run: StagedRun, k: int) -> list[Node]:
    """Nodes of the predictions that are carried into stage k, seen from its size: lam moved by -ln r."""
    found: list[Node] = []
    for j in range(k):
        r = ratio(run.legs[j].size, run.legs[k].size)
        found += [_raised(run.path, node, r) for node in run.nodes(j)[:-1]]
    return found[-len(run.history or [0]) :]


def _raised(path: Path, node: Node, r: float) -> Node:
    """A node whose noise level is r times as high; pure noise stays pure noise."""
    return Node(*node.key) if node.alpha == 0 else path.at_lam(node.lam - math.log(r))


def _beyond(path: Path, nodes: list[Node]) -> list[Node]:
    """Nodes after the end of a stage, at the pace of its last step."""
    a, b = nodes[-2], nodes[-1]
    if b.sigma == 0:
        return []
    h = b.lam - a.lam if a.alpha > 0 else 1.0
    return [path.at_lam(b.lam + h * (i + 1)) for i in range(AHEAD)]


# ---------------------------------------------------------------------- between stages
def switched(
    run: StagedRun, settings: Any, spectrum: Spectrum | None, x: torch.Tensor, generator: Any
) -> tuple[torch.Tensor, Switch]:
    """The state (..., H, W) at the end of the present stage as the next stage's, and what was done.

    Args:
        settings: `transition`, `fill` and `resize` of the scheduler's config.
        generator: makes the noise if there is one; else each image has its own, from its initial latent.
    """
    start, k = time.perf_counter(), run.stage
    before, after, size = run.nodes(k)[-1], run.nodes(k + 1)[0], run.legs[k + 1].size
    low = (x.shape[-2], x.shape[-1])
    grows, drew = size[0] > low[0] or size[1] > low[1], []
    seeded = drawer([seed + k + 1 for seed in run.seeds], x.device)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        drew.append(shape)
        if generator is None:
            return seeded(shape)
        made: torch.Tensor = randn_tensor(shape, generator=generator, device=x.device, dtype=torch.float64)
        return made

    lost: tuple[float | None, float | None] = (None, None)
    if size == low and settings.transition == "aligned" and not run.legs[k + 1].raised:
        out = x  # nothing changes; no transform, no rounding
    elif settings.transition == "renoise":
        clean = resized(x / before.alpha, size, settings.resize)
        out = after.alpha * clean + after.sigma * idct(draw(tuple(clean.shape))).to(x.dtype)
    else:
        power = None if spectrum is None else spectrum.power(size)
        if size[0] < low[0] or size[1] < low[1]:
            run.memory = Memory.of(dct(x) / before.alpha, before.level).over(run.memory)
            run.stored = max(run.stored, run.memory.bytes)
        if grows and power is not None:
            matched = settings.fill.endswith("matched")
            lost = (0.0, 0.0) if matched else missing(power, low, ratio(low, size) * before.level)
        out = transition(
            x, (before.alpha, before.sigma), (after.alpha, after.sigma), size, fill=settings.fill, memory=run.memory,
            power=None if power is None else torch.tensor(power, device=x.device), draw=draw,
        )  # fmt: skip
    fill = settings.fill if grows and settings.transition == "aligned" else None
    seconds = time.perf_counter() - start
    r = ratio(low, size)
    return out, Switch(settings.transition, fill, r, before.level, after.level, *lost, bool(drew), seconds)
