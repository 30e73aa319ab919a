"""Time-Shift: each image's step is aimed at the noise level that its variance asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..core.families import VP
from ..core.node import Node
from ..core.path import Path
from ..core.prediction import Output, pair
from ..core.table import Row, Table
from ..errors import OptionError, RunError, one_of
from ..samplers.ddim import ancestral
from .clocks import Levels, Steps
from .policy import policy

# Rows that carry a mean of noise predictions by a DDIM step, with weights that do not depend on where it ends.
TRANSFERS = ("ddim", "ddpm", "pndm", "ipndm", "ghvb")
MODES = ("level", "timestep")
CLOCKS = ("variance", "corrected")
CONSTANT = 0.9  # share of decisions at the window's edge above which the policy is called a constant


@dataclass(frozen=True)
class TimeShift:
    """What was asked for; see `time_shift`."""

    window: int | None
    cutoff: float | None
    window_lam: float | None
    cutoff_lam: float | None
    mode: str
    clock: str
    data_variance: float | None

    def begin(self, table: Table, path: Path, output: Output, fed: bool, device: torch.device) -> Shifts:
        """The state of a run on these rows.

        Raises:
            OptionError: for rows that cannot be aimed elsewhere, or a window in units that the path does not have.
            RunError: in mode "timestep" without the hook.
        """
        self._check(table, path, fed)
        clock = Steps(path) if self.window is not None and isinstance(path, VP) else Levels(path)
        made = Shifts(self, table.rows, clock, output)
        made.prepare(device)
        return made

    def _check(self, table: Table, path: Path, fed: bool) -> None:
        name = table.sampler.split(" + ")[0]
        if name not in TRANSFERS:
            raise OptionError(
                f"'time_shift' cannot be combined with sampler {name!r}: its weights depend on where a row ends, so a "
                f"row cannot be aimed elsewhere. It works with {', '.join(TRANSFERS)}"
            )
        discrete = isinstance(path, VP)
        if self.window is not None and not discrete:
            raise OptionError(
                f"'time_shift' with a window in training steps needs a VP path with training steps, this one is "
                f"{path.family!r}: give window_lam and cutoff_lam (in half log-SNR; no setting is published)"
            )
        if self.mode == "timestep":
            plain = name == "ddim" and not table.stochastic and all(isinstance(r.space, str) for r in table.rows)
            if not discrete or self.window is None or not plain:
                raise OptionError(
                    "'time_shift' in mode 'timestep' works with the deterministic sampler 'ddim', without changes of "
                    f"its predictions, on a VP path with training steps; not with {table.sampler!r} on {path.family!r}"
                )
            if not fed:
                raise RunError(
                    "'time_shift' in mode 'timestep' feeds the model a timestep of its own for each image, which only "
                    "a hook on the denoiser can do: run the pipeline inside `with diffaccel.feed_timesteps(pipe):`"
                )


@policy(
    "time_shift",
    stage="target",
    clashes={
        "restart": "its rows jump up in noise, where a shift of the target has no meaning",
        "skip": "a row that spans a skipped node has weights that depend on where it ends",
        "momentum": "the velocity would be made of steps that end elsewhere",
        "contrast": "the difference would be taken between predictions at levels that were shifted apart",
        "boost_and_skip": "the boosted noise would be read as another noise level",
    },
)
def time_shift(
    window: int | None = None,
    cutoff: float | None = None,
    *,
    mode: str = "level",
    clock: str = "variance",
    data_variance: float | None = None,
    window_lam: float | None = None,
    cutoff_lam: float | None = None,
) -> TimeShift:
    """Time-Shift (arXiv:2305.15583), for each image by itself.

    Mode "level", as in the authors' `pnm_solver.py`: a row whose target is the node t' is aimed at that tau in
    `[t' - window/2, t' + window/2]` whose noise variance `sigma_tau^2` is nearest to the variance of the image handed
    in; not at the first row of a run, and only while `t' > cutoff`. The model is fed the grid's timesteps. Mode
    "timestep", as in the paper: the state that a row arrives at is taken to be at the tau that its own variance asks
    for, and the model is fed that tau; this needs `feed_timesteps(pipe)`.

    With the official clock and few steps the answer is nearly always the window's edge, a constant; the report says
    so. A state's variance is `alpha^2 v0 + sigma^2`, never below `sigma^2`: the clock "corrected" subtracts that, and
    has no bias. Then a sample with too little variance keeps more noise.

    Args:
        window: width in training steps (VP), 0 or more.
        cutoff: in training steps.
        mode: "level" or "timestep".
        clock: "variance" or "corrected".
        data_variance: v0, the mean over clean samples of the variance over one sample's elements; for "corrected".
        window_lam, cutoff_lam: the same in half log-SNR, for EDM and flow paths: shifts are made at targets of less
            than `cutoff_lam`.
    """
    one_of("mode of 'time_shift'", mode, MODES)
    one_of("clock of 'time_shift'", clock, CLOCKS)
    steps, lams = (window, cutoff), (window_lam, cutoff_lam)
    if (None in steps) == (None in lams) or any(v is not None for v in (steps if None in steps else lams)):
        raise OptionError(
            "'time_shift' needs window and cutoff (training steps), or window_lam and cutoff_lam; got "
            f"window={window}, cutoff={cutoff}, window_lam={window_lam}, cutoff_lam={cutoff_lam}"
        )
    width = window if window is not None else window_lam
    if not isinstance(width, (int, float)) or isinstance(width, bool) or not 0 <= width < math.inf:
        raise OptionError(f"'time_shift' needs a window of 0 or more, got {width!r}")
    if window is not None and int(window) != window:
        raise OptionError(f"'time_shift': window is a whole number of training steps, got {window!r}")
    if (clock == "corrected") != (data_variance is not None) or (data_variance is not None and not data_variance > 0):
        raise OptionError(
            f"'time_shift': clock 'corrected' needs data_variance > 0, and only it takes it; got {data_variance!r}"
        )
    return TimeShift(window, cutoff, window_lam, cutoff_lam, mode, clock, data_variance)


# ---------------------------------------------------------------------- the run
@dataclass
class Aim:
    """What a row needs to choose: the candidates' boundaries in variance, and their coefficients.

    Args:
        bounds: (W - 1,) rising variances between neighbours, of the state or (clock "corrected") of shifts.
        mix: coefficients of x, of the row's own result (or of x0), and of the draw, each (W, 1, ...) as states are.
        center: index of the candidate that is the grid's own target.
    """

    bounds: torch.Tensor
    mix: tuple[torch.Tensor, ...]
    center: int
    positions: np.ndarray

    def fits(self, x: torch.Tensor) -> bool:
        """Whether it is of the dtype and device of a state; its shape follows without a copy."""
        if self.mix[0].ndim != x.ndim:
            self.mix = tuple(_as_images(column, x) for column in self.mix)
        return self.bounds.dtype is x.dtype and self.bounds.device == x.device


@dataclass
class Shifts:
    """The state of one run: what was chosen, row by row."""

    asked: TimeShift
    rows: Sequence[Row]
    clock: Steps | Levels
    output: Output
    chosen: list[tuple[int, torch.Tensor]] = field(default_factory=list)  # (row, index of the candidate, (B,))
    aims: dict[int, Aim | None] = field(default_factory=dict)
    fed: torch.Tensor | None = None  # (B,) training steps that the model is to be fed next, mode "timestep"
    starts: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def __call__(
        self, i: int, x: torch.Tensor, output: torch.Tensor, state: torch.Tensor, x0: torch.Tensor, draw: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(state, x0) after row i (counted from the run's first row), aimed anew.

        Args:
            x, output: what step was given.
            state, x0: what the row makes of it.
            draw: the row's noise, or None; all of the shape of x.
        """
        if self.asked.mode == "timestep":
            return self._timestep(i, x, output, state, x0)
        aim = self._aim(i, x)
        if aim is None:
            return state, x0
        k = torch.searchsorted(aim.bounds, _variance(x))
        self.chosen.append((i, k))
        a, b, c = aim.mix
        kept = x * a.index_select(0, k)
        if draw is None:
            return kept.addcmul_(state, b.index_select(0, k)), x0
        return kept.addcmul_(x0, b.index_select(0, k)).addcmul_(draw, c.index_select(0, k)), x0

    def prepare(self, device: torch.device) -> None:
        """Plan all rows before the first call, for states in float32."""
        like = torch.empty(0, device=device)
        for i in range(len(self.rows)):
            self._aim(i, like)

    def _aim(self, i: int, x: torch.Tensor) -> Aim | None:
        aim = self.aims.get(i)
        if i not in self.aims or (aim is not None and not aim.fits(x)):
            aim = self.aims[i] = self._arrival(i, x) if self.asked.mode == "timestep" else self._planned(i, x)
        return aim

    def _target(self, row: Row) -> tuple[np.ndarray, float] | None:
        """(candidates, the grid's own target) of a row, in the order of rising variance; None: nothing is shifted."""
        if row.next.sigma == 0 or row.next.alpha == 0 or row.next.level >= row.node.level * (1 - 1e-12):
            return None
        center = self.clock.position(row.next)
        half, cutoff = self._half()
        at = self.clock.window(center, half)
        return None if center <= cutoff or not len(at) else (at, center)

    # ------------------------------------------------------------------ mode "level"

    def _half(self) -> tuple[float, float]:
        asked = self.asked
        if isinstance(self.clock, Steps):
            return float(int(asked.window or 0) // 2), float(asked.cutoff or 0)
        return float(asked.window_lam or 0) / 2, -float(asked.cutoff_lam or 0)

    def _planned(self, i: int, x: torch.Tensor) -> Aim | None:
        row = self.rows[i]
        found = self._target(row) if i > 0 and row.node.alpha > 0 else None
        if found is None:
            return None
        at, center = found
        if self.asked.clock == "corrected":
            # tau = t' - (t^ - t): a larger variance means a later t^ and an earlier tau
            at = at[::-1].copy()
            here = self.clock.position(row.node)
            bounds = self._exact(here - (_edges(at) - center), row.node)
        else:
            bounds = _edges(self._noise(at, row.node))
        return _made(bounds, self._coefficients(row, *self.clock.levels(at)), at, center, x)

    def _noise(self, at: np.ndarray, node: Node) -> np.ndarray:
        """Share of the noise in the variance at positions, for states of the size of `node`'s."""
        alpha, sigma = self.clock.levels(at)
        out: np.ndarray = sigma**2 / (alpha**2 + sigma**2) * (node.alpha**2 + node.sigma**2)
        return out

    def _exact(self, at: np.ndarray, node: Node) -> np.ndarray:
        """Variance that exact samples have at (fractional) positions, for states of the size of `node`'s."""
        v0 = float(self.asked.data_variance or 0.0)
        if isinstance(self.clock, Steps):
            grid = np.arange(len(self.clock.alpha), dtype=float)
            return np.interp(at, grid, self.clock.alpha**2 * v0 + self.clock.sigma**2)
        alpha, sigma = self.clock.levels(at)
        out: np.ndarray = (alpha**2 * v0 + sigma**2) / (alpha**2 + sigma**2) * (node.alpha**2 + node.sigma**2)
        return out

    def _coefficients(self, row: Row, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        """(W, 3) coefficients of (x, row's result, 0), or of (x, x0, draw) for rows that draw, for these targets."""
        s, t = row.node, row.next
        if row.draws:
            left = np.maximum(0.0, 1 - (s.alpha * sigma / (s.sigma * alpha)) ** 2)
            fresh = self._eta(row) * sigma * np.sqrt(left)
            kept = np.sqrt(np.maximum(0.0, (sigma - fresh) * (sigma + fresh))) / s.sigma
            return np.stack([kept, alpha - s.alpha * kept, fresh], axis=1)
        own = t.sigma - s.sigma * t.alpha / s.alpha
        k = (sigma - s.sigma * alpha / s.alpha) / own
        return np.stack([(alpha - k * t.alpha) / s.alpha, k, np.zeros_like(k)], axis=1)

    def _eta(self, row: Row) -> float:
        """eta of a DDPM row: its noise over that of eta = 1."""
        full = ancestral(row.node, row.next, 1.0)[1]
        return float(row.out.z[0][1]) / full if full > 0 else 0.0

    # ------------------------------------------------------------------ mode "timestep"
    def _timestep(
        self, i: int, x: torch.Tensor, output: torch.Tensor, state: torch.Tensor, x0: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        row = self.rows[i]
        if self.fed is not None:
            before, k = self.chosen[-1]
            a, b, u, w = (column.index_select(0, k) for column in self._from(before, row, x))
            state, x0 = torch.addcmul(x * a, output, b), torch.addcmul(x * u, output, w)
        aim = self._aim(i, x)
        self.fed = None
        if aim is not None:
            k = torch.searchsorted(aim.bounds, _variance(state))
            self.chosen.append((i, k))
            self.fed = aim.mix[0].flatten()[k]
        return state, x0

    def _arrival(self, i: int, x: torch.Tensor) -> Aim | None:
        """The candidates for the level of the state that row i arrives at; their `mix` is the training step."""
        found = self._target(self.rows[i])
        if found is None:
            return None
        at, center = found
        exact, node = self.asked.clock == "corrected", self.rows[i].next
        bounds = self._exact(_edges(at), node) if exact else _edges(self._noise(at, node))
        return _made(bounds, at[:, None].astype(float), at, center, x)

    def _from(self, before: int, row: Row, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The DDIM step of `row` and its x0, from each candidate: coefficients of the state and the output."""
        if before not in self.starts:
            aim = self.aims[before]
            assert aim is not None
            values = []
            for alpha, sigma in zip(*self.clock.levels(aim.positions), strict=True):
                node, t = Node(0.0, float(alpha), float(sigma)), row.next
                (ue, we), (u0, w0) = pair(self.output, "eps", node), pair(self.output, "x0", node)
                values.append((t.alpha * u0 + t.sigma * ue, t.alpha * w0 + t.sigma * we, u0, w0))
            self.starts[before] = _columns(np.array(values), x)
        return self.starts[before]

    def copy(self) -> Shifts:
        """A run that goes on by itself."""
        return replace(self, chosen=list(self.chosen), aims=dict(self.aims), starts=dict(self.starts))

    # ------------------------------------------------------------------ what was done
    def report(self) -> dict[str, Any]:
        """Decisions, how many moved the target, how many lie at the window's edge, mean shift (reads the device)."""
        counts = {"decisions": 0, "shifted": 0, "at_edge": 0}
        total = 0.0
        for i, k in self.chosen:
            aim = self.aims[i]
            assert aim is not None
            index = k.cpu().numpy()
            last = len(aim.positions) - 1
            counts["decisions"] += len(index)
            counts["shifted"] += int(np.sum(index != aim.center))
            counts["at_edge"] += int(np.sum((index == 0) | (index == last))) if last else 0
            total += float(np.sum(aim.positions[index] - aim.positions[aim.center]))
        n = max(1, counts["decisions"])
        edge = counts["at_edge"] / n
        return {**counts, "edge_share": edge, "mean_shift": total / n, "constant": edge > CONSTANT}

    def describe(self) -> str:
        """The report as a line."""
        r = self.report()
        unit = "training steps" if isinstance(self.clock, Steps) else "half log-SNR"
        line = (
            f"time_shift: {r['shifted']} of {r['decisions']} targets shifted, by {r['mean_shift']:.3g} {unit} on "
            f"average; {100 * r['edge_share']:.0f} % at the window's edge"
        )
        return line + (": here this policy is a constant" if r["constant"] else "")


def _variance(x: torch.Tensor) -> torch.Tensor:
    """(B,) unbiased variance of each image; by two sums, which take half the time of `Tensor.var`."""
    flat = x.flatten(1)
    n, total = flat.shape[1], flat.sum(dim=1)
    squares = torch.linalg.vector_norm(flat, dim=1).square_()
    return squares.addcmul_(total, total, value=-1 / n).div_(n - 1)


def _edges(values: np.ndarray) -> np.ndarray:
    out: np.ndarray = (values[1:] + values[:-1]) / 2
    return out


def _made(bounds: np.ndarray, mix: np.ndarray, at: np.ndarray, center: float, x: torch.Tensor) -> Aim:
    middle = int(np.argmin(np.abs(at - center)))
    edges = torch.tensor(np.array(bounds), dtype=x.dtype, device=x.device)
    return Aim(edges, _columns(mix, x), middle, at)


def _columns(mix: np.ndarray, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Coefficients (W, columns) as tensors (W, 1, ...) for states like x."""
    return tuple(_as_images(column, x) for column in torch.tensor(mix.T, dtype=x.dtype, device=x.device))


def _as_images(column: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(W, 1, ...) with the number of dimensions of x."""
    return column.view(-1, *(1,) * (x.ndim - 1))
