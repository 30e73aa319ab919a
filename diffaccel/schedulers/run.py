"""The state of one run, and the arithmetic of one row on tensors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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
from .time_shift import Shifts


class Shaped:
    """A coefficient of one sample's shape: in float64, and as a tensor (1, ...) once it is placed."""

    __slots__ = ("tensor", "values")
    tensor: torch.Tensor

    def __init__(self, values: np.ndarray) -> None:
        self.values = values


def place(shaped: Sequence[Shaped], dtype: torch.dtype, device: torch.device) -> None:
    """Give coefficients their tensors, all in one piece of memory.

    Between two steps the model has pushed them out of every cache. One piece is one transfer to the device, and on a
    CPU it lies on few large pages, which halves what reading them costs beyond the arithmetic.
    """
    whole = np.empty(sum(c.values.size for c in shaped), np.float64 if dtype is torch.float64 else np.float32)
    ends = np.cumsum([c.values.size for c in shaped]).tolist()
    for c, end in zip(shaped, ends, strict=True):
        whole[end - c.values.size : end] = c.values.ravel()
    block = torch.from_numpy(whole).to(device, dtype)
    for c, end in zip(shaped, ends, strict=True):
        c.tensor = block[end - c.values.size : end].view(1, *c.values.shape)


Ready = float | Shaped


@dataclass(slots=True)
class Compiled:
    """A row of the table with the model's output type worked in."""

    row: Row
    to_p: tuple[Ready, Ready]  # P = u * state + w * output
    to_x0: tuple[Ready, Ready]
    # P from x0, where a policy changed that, or where one operation does it (spaces with tensors); else None
    x0_to_p: tuple[Ready, Ready] | None
    # Coefficients of the state and of the model's output (or of the changed x0), this call's P worked in. In float32,
    # making P first loses digits at low alpha, where eps and x0 differ by a factor of 1/alpha. None where a row has
    # noise or registers; then the row itself is evaluated.
    direct: tuple[Ready, Ready] | None
    older: tuple[Ready, ...] = ()  # of the predictions of earlier calls, beside `direct`
    one: Ready = 0.0
    # (register, register, weight of this call's P) of a row whose only update is a mean of the two, as a momentum is
    mean: tuple[int, int, float] | None = None
    shaped: tuple[Shaped, ...] = ()  # those that a step reads


def compiled(rows: Sequence[Row], output: Output, policy: Policy | None, device: torch.device) -> list[Compiled]:
    """Work the model's output type into rows.

    Raises:
        PathError: if the output lacks what a row needs (an eps output at alpha = 0).
    """
    made = [_compiled(row, output, policy) for row in rows]
    place([c for row in made for c in row.shaped], torch.float32, device)
    return made


def _compiled(row: Row, output: Output, policy: Policy | None) -> Compiled:
    """Without tensors.

    Raises:
        PathError: if the output lacks what the row needs (an eps output at alpha = 0).
    """
    space, node = row.space, row.node
    to_p, to_x0 = pair(output, space, node), pair(output, "x0", node)
    unscaled = space
    if isinstance(space, Affine) and space.scale != 1:  # epsilon scaling: x0 comes from the scaled noise prediction
        to_x0 = pair(output, Affine(1 / node.alpha, -node.sigma / (node.alpha * space.scale)), node)
        unscaled = Affine(space.x, space.eps * space.scale)
    shaped = any(isinstance(c, np.ndarray) for c in to_p)
    from_x0 = pair(Output("x0"), unscaled, node) if policy or shaped else None

    def ready(c: Coef) -> Ready:
        return Shaped(c) if isinstance(c, np.ndarray) else float(c)

    def both(c: tuple[Coef, Coef]) -> tuple[Ready, Ready]:
        return ready(c[0]), ready(c[1])

    made = Compiled(row, both(to_p), both(to_x0), None if from_x0 is None else both(from_x0), None)
    mix = row.out
    if not (mix.m or mix.z or row.registers or row.draws):
        u, w = from_x0 if policy and from_x0 else to_p
        b = mix.p[0] if mix.p else 0.0
        made.direct = both((mix.x + b * u, b * w))
        made.older, made.one = tuple(ready(c) for c in mix.p[1:]), ready(mix.one)
    made.mean = _mean(row)
    kept = made.to_p if from_x0 is None else made.x0_to_p or ()
    in_order = (*made.to_x0, *kept, made.one, *(made.direct or ()), *made.older)  # as a step reads them
    made.shaped = tuple(c for c in in_order if isinstance(c, Shaped))
    return made


def _mean(row: Row) -> tuple[int, int, float] | None:
    """`Compiled.mean`: one operation in place of two."""
    if len(row.registers) != 1:
        return None
    slot, mix = row.registers[0]
    if len(mix.p) != 1 or len(mix.m) != 1 or mix.z or not mix.scalar or mix.x != 0 or mix.one != 0:
        return None
    (before, a), b = mix.m[0], float(mix.p[0])
    return (slot, before, b) if abs(float(a) + b - 1) < 1e-15 else None


@dataclass
class Run:
    """What belongs to one run of one thread: nodes, rows, counter, history.

    Args:
        table: of a run from the first node.
        nodes: N + 1 levels; `nodes[i]` is the level of the state that row i sees.
        grid: the nodes that the sampler was traced on (fewer, where it spends several calls on an interval).
        timesteps: (N,) on the user's device.
        sigmas: (N + 1,) float32 on the CPU.
        options: complete options of the sampler, those that belong to the number of calls or the size included.
    """

    table: Table
    nodes: list[Node]
    grid: Nodes
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    cpu_timesteps: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)
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
    shifts: Shifts | None = None  # the policy that aims rows elsewhere
    prepared: bool = False  # the rows from the first one are compiled already, because they hold much (tensors)
    watch: str = ""  # where to look for NaN: "" nowhere, "cpu", "always"

    def __len__(self) -> int:
        return len(self.table)

    def open_at(self, k: int, sampler: Sampler, output: Output, policy: Policy | None) -> None:
        """Compile the rows of a run that begins at row k, with empty history."""
        table = self.table if k == 0 else begin_at(self.table, self.grid, k, sampler, self.options)
        self.rows = compiled(table.rows, output, policy, self.timesteps.device)
        self.policy = policy
        self.start, self.depth, self.noise_depth = k, table.depth, table.noise_depth
        self.history, self.draws, self.registers = [], [], [None] * table.slots

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        twin = copy.copy(self)
        for name in ("history", "registers", "draws", "notes", "rows"):
            setattr(twin, name, list(getattr(self, name)))
        twin.shifts = None if self.shifts is None else self.shifts.copy()
        twin.timesteps, twin.sigmas = self.timesteps.clone(), self.sigmas.clone()
        return twin


# ---------------------------------------------------------------------- arithmetic
def advance(
    run: Run, c: Compiled, x: torch.Tensor, output: torch.Tensor, generator: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row: (next state, x0-prediction), both in the dtype of x. No value is read from the device."""
    if c.shaped and (c.shaped[0].tensor.dtype is not x.dtype or c.shaped[0].tensor.device != x.device):
        place(c.shaped, x.dtype, x.device)
    if run.policy is None and c.x0_to_p is None:
        p = _affine(x, output, c.to_p)
        x0 = p if c.row.space == "x0" else _affine(x, output, c.to_x0)
    else:
        x0 = _affine(x, output, c.to_x0)
        x0 = x0 if run.policy is None else run.policy(x0)
        p = _affine(x, x0, c.x0_to_p)  # type: ignore[arg-type]
    history = run.history
    if run.depth > 1:
        history.insert(0, p.clone() if p is output else p)
        del history[run.depth :]
    else:
        history[:] = (p,)
    mix = c.row.out
    if c.direct is not None:
        y = _begun(x, output if run.policy is None else x0, c.direct, c.one)
        for past, b in zip(history[1:], c.older, strict=False):
            if b:
                _add(y, past, b)
        return y, x0
    for _ in range(c.row.draws):
        run.draws.insert(0, _drawn(x, generator))
    del run.draws[max(1, run.noise_depth) :]
    if c.mean is not None:
        slot, before, b = c.mean
        run.registers[slot] = torch.lerp(run.registers[before], p, b)
    else:
        new = {slot: _evaluate(run, m, x) for slot, m in c.row.registers}
        for slot, value in new.items():
            run.registers[slot] = value
    return _evaluate(run, mix, x), x0


def _drawn(x: torch.Tensor, generator: Any) -> torch.Tensor:
    if isinstance(generator, list) and 2 * len(generator) == len(x):
        # The pipeline of DiT hands over guidance's pair of each image and goes on with the first half: with the same
        # noise in both, an image is that of its generator, whatever else is in the batch.
        half = _drawn(x[: len(generator)], generator)
        return torch.cat([half, half])
    if isinstance(generator, list) and len(generator) not in (1, len(x)):
        raise RunError(f"step was given {len(generator)} generators for a batch of {len(x)}; pass one for each image")
    return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _affine(x: torch.Tensor, output: torch.Tensor, pair: tuple[Ready, Ready]) -> torch.Tensor:
    """`u x + w output`; the output itself where that is all."""
    u, w = pair
    if u == 0.0:
        return output if w == 1.0 else output * _placed(w)
    if w == 1.0 and isinstance(u, Shaped):
        return torch.addcmul(output, x, u.tensor)
    return _add(torch.mul(x, _placed(u)), output, w)


def _begun(x: torch.Tensor, output: torch.Tensor, pair: tuple[Ready, Ready], one: Ready) -> torch.Tensor:
    """`u x + w output + one`, always a tensor of its own."""
    u, w = pair
    if isinstance(u, Shaped) and isinstance(one, Shaped):
        return _add(torch.addcmul(one.tensor, x, u.tensor), output, w)
    y = _add(torch.mul(x, _placed(u)), output, w)
    return y if one == 0.0 else y.add_(_placed(one))


def _add(y: torch.Tensor, value: torch.Tensor, c: Ready) -> torch.Tensor:
    """`y += c * value`."""
    return y.add_(value, alpha=c) if isinstance(c, float) else y.addcmul_(value, c.tensor)


def _placed(c: Ready) -> Any:
    return c if isinstance(c, float) else c.tensor


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

    @property
    def generator(self) -> Any:
        """What this thread draws noise from where a step is given nothing."""
        return getattr(self._local, "generator", None)

    @generator.setter
    def generator(self, value: Any) -> None:
        self._local.generator = value

    def need(self) -> Run:
        """The run, or an error that says how to begin one."""
        run = self.get()
        if run is None:
            raise RunError("no run was begun: call set_timesteps before step")
        return run
