"""The state of one run, and the arithmetic of one row on tensors."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..core.linear import Coef, is_zero
from ..core.node import Node
from ..core.path import Nodes
from ..core.prediction import Affine, Output, pair
from ..core.table import Mix, Row, Table
from ..errors import RunError
from ..samplers.begin import begin_at
from ..samplers.registry import Sampler
from .policy import Policy


@dataclass(slots=True)
class Compiled:
    """A row of the table with the model's output type worked in."""

    row: Row
    to_p: tuple[Coef, Coef]  # P = u * state + w * output
    to_x0: tuple[Coef, Coef]
    x0_to_p: tuple[Coef, Coef] | None  # P from an x0 that a policy changed; None where no policy is on
    # Coefficients of the state and of the model's output (or of the changed x0), this call's P worked in. In float32,
    # making P first loses digits at low alpha, where eps and x0 differ by a factor of 1/alpha. None where a row has
    # more than scalar coefficients of predictions.
    direct: tuple[float, float] | None


def compiled(row: Row, output: Output, policy: Policy | None) -> Compiled:
    """Work the model's output type into a row.

    Raises:
        PathError: if the output lacks what the row needs (an eps output at alpha = 0).
    """
    space, node = row.space, row.node
    to_p, to_x0 = pair(output, space, node), pair(output, "x0", node)
    again = pair(Output("x0"), space, node) if policy else None
    if isinstance(space, Affine) and space.scale != 1:  # epsilon scaling: x0 comes from the scaled noise prediction
        to_x0 = pair(output, Affine(1 / node.alpha, -node.sigma / (node.alpha * space.scale)), node)
        again = pair(Output("x0"), Affine(space.x, space.eps * space.scale), node) if policy else None
    mix = row.out
    u, w = again or to_p
    direct = None
    if mix.scalar and not (mix.m or mix.z or row.registers or row.draws) and is_zero(mix.one):
        b = mix.p[0] if mix.p else 0.0
        if isinstance(u, float) and isinstance(w, float):
            direct = (float(mix.x + b * u), float(b * w))
    return Compiled(row, to_p, to_x0, again, direct)


@dataclass
class Run:
    """What belongs to one run of one thread: nodes, rows, counter, history.

    Args:
        table: of a run from the first node.
        nodes: N + 1 levels; `nodes[i]` is the level of the state that row i sees.
        grid: the nodes that the sampler was traced on (fewer, where it spends several calls on an interval).
        timesteps: (N,) on the user's device.
        sigmas: (N + 1,) float32 on the CPU.
    """

    table: Table
    nodes: list[Node]
    grid: Nodes
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    cpu_timesteps: torch.Tensor
    rows: list[Compiled] = field(default_factory=list)
    begin: int | None = None  # where the pipeline said that the run begins
    start: int = 0  # where it begins: row `start` is `rows[0]`
    counter: int | None = None
    depth: int = 1
    noise_depth: int = 0
    history: list[torch.Tensor] = field(default_factory=list)  # newest first
    registers: list[Any] = field(default_factory=list)
    draws: list[torch.Tensor] = field(default_factory=list)  # newest first
    notes: list[str] = field(default_factory=list)
    checked: torch.Tensor | None = None  # copy of `sigmas`, to notice edits from outside
    policy: Policy | None = None
    watch: str = ""  # where to look for NaN: "" nowhere, "cpu", "always"

    def __len__(self) -> int:
        return len(self.table)

    def open_at(self, k: int, sampler: Sampler, options: dict[str, Any], output: Output, policy: Policy | None) -> None:
        """Compile the rows of a run that begins at row k, with empty history."""
        table = self.table if k == 0 else begin_at(self.table, self.grid, k, sampler, options)
        self.rows = [compiled(row, output, policy) for row in table.rows]
        self.policy = policy
        self.start, self.depth, self.noise_depth = k, table.depth, table.noise_depth
        self.history, self.draws, self.registers = [], [], [None] * table.slots

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        twin = copy.copy(self)
        for name in ("history", "registers", "draws", "notes", "rows"):
            setattr(twin, name, list(getattr(self, name)))
        twin.timesteps, twin.sigmas = self.timesteps.clone(), self.sigmas.clone()
        return twin


# ---------------------------------------------------------------------- arithmetic
def advance(
    run: Run, c: Compiled, x: torch.Tensor, output: torch.Tensor, generator: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row: (next state, x0-prediction), both in the dtype of x. No value is read from the device."""
    if run.policy is None:
        p = _affine(x, output, c.to_p)
        x0 = p if c.row.space == "x0" else _affine(x, output, c.to_x0)
    else:
        x0 = run.policy(_affine(x, output, c.to_x0))
        p = _affine(x, x0, c.x0_to_p)  # type: ignore[arg-type]
    history = run.history
    if run.depth > 1:
        history.insert(0, p.clone() if p is output else p)
        del history[run.depth :]
    else:
        history[:] = (p,)
    mix = c.row.out
    if c.direct is not None:
        y = torch.mul(x, c.direct[0]).add_(output if run.policy is None else x0, alpha=c.direct[1])
        for past, b in zip(history[1:], mix.p[1:], strict=False):
            if b:
                y.add_(past, alpha=b)  # type: ignore[arg-type]  # a scalar: `direct` says so
        return y, x0
    for _ in range(c.row.draws):
        run.draws.insert(0, _drawn(x, generator))
    del run.draws[max(1, run.noise_depth) :]
    new = {slot: _evaluate(run, m, x) for slot, m in c.row.registers}
    for slot, value in new.items():
        run.registers[slot] = value
    return _evaluate(run, mix, x), x0


def _drawn(x: torch.Tensor, generator: Any) -> torch.Tensor:
    if isinstance(generator, list) and len(generator) not in (1, len(x)):
        raise RunError(f"step was given {len(generator)} generators for a batch of {len(x)}; pass one for each image")
    return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _affine(x: torch.Tensor, output: torch.Tensor, pair: tuple[Coef, Coef]) -> torch.Tensor:
    u, w = pair
    if isinstance(u, float) and isinstance(w, float):
        if u == 0.0:
            return output if w == 1.0 else output * w
        return torch.mul(x, u).add_(output, alpha=w)
    return x * _tensor(u, x) + output * _tensor(w, x)


def _evaluate(run: Run, mix: Mix, x: torch.Tensor) -> torch.Tensor:
    terms: list[tuple[torch.Tensor, Coef]] = [(x, mix.x), *zip(run.history, mix.p, strict=False)]
    terms += [(run.registers[slot], b) for slot, b in mix.m] + [(run.draws[age], b) for age, b in mix.z]
    y: torch.Tensor | None = None
    for value, b in terms:
        if is_zero(b):
            continue
        if y is None:
            y = value * _tensor(b, x)
        elif isinstance(b, float):
            y.add_(value, alpha=b)
        else:
            y.add_(value * _tensor(b, x))
    y = torch.zeros_like(x) if y is None else y
    return y if is_zero(mix.one) else y.add_(_tensor(mix.one, x))


def _tensor(c: Coef, like: torch.Tensor) -> Any:
    """A coefficient for use with `like`: numbers stay numbers."""
    return c if isinstance(c, float) else torch.as_tensor(c, dtype=like.dtype).to(like.device, non_blocking=True)


# ---------------------------------------------------------------------- threads
class PerThread:
    """One run a thread; a thread without one of its own sees the last one that any thread set."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._last: Run | None = None

    def get(self) -> Run | None:
        return getattr(self._local, "run", None) or self._last

    def set(self, run: Run | None) -> None:
        self._local.run = run
        self._last = run

    def need(self) -> Run:
        """The run, or an error that says how to begin one."""
        run = self.get()
        if run is None:
            raise RunError("no run was begun: call set_timesteps before step")
        return run


def sigma_of(node: Node, family: str) -> float:
    """What diffusers calls sigma: sigma on flow paths, sigma/alpha elsewhere."""
    return node.sigma if family == "flow" else node.level
