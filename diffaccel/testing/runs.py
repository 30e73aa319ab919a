"""The runs that checks are made on, and a table seen as a linear map."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.families import betas
from ..core.grid import GRIDS
from ..core.grid import nodes as grid_nodes
from ..core.node import Node
from ..core.path import Nodes, Path
from ..core.prediction import Prediction, Space, convert
from ..core.table import Table
from ..errors import OptionError
from ..samplers.registry import Sampler

Options = Mapping[str, Any]

SD_BETAS = tuple(betas("scaled_linear", 0.00085, 0.012, 1000))
PATHS: dict[str, Path] = {
    "vp": Path.vp(SD_BETAS),
    "vp_zero_snr": Path.vp(SD_BETAS, zero_snr=True),
    "vp_cosine": Path.vp(betas("squaredcos_cap_v2", 0.0, 0.0, 1000)),
    "vp_sigma": Path.vp(SD_BETAS, interpolation="sigma"),
    "vp_continuous": Path.vp_linear(),
    "edm": Path.edm(),
    "flow": Path.flow(),
    "flow_shift3": Path.flow(3.0),
    "flow_mu": Path.flow(mu=1.15),
    "flow_terminal": Path.flow(mu=0.9, terminal=0.02),
}


# ---------------------------------------------------------------------- the table as a linear map
def unroll(table: Table) -> np.ndarray:
    """Every state as a combination of the start, the x0-predictions and the draws: (N + 1, 1 + N + Z) float64.

    Two samplers are the same method exactly if this is equal, whatever space their rows are written in.
    """
    count = len(table)
    basis = np.eye(1 + count + sum(row.draws for row in table.rows))
    given, fresh = iter(basis[1 : 1 + count]), iter(basis[1 + count :])

    def predict(x: np.ndarray, node: Node, space: Space) -> np.ndarray:
        out: np.ndarray = convert(Prediction(next(given)), space, x, node)
        return out

    return np.array(table.apply(basis[0], predict, lambda _: next(fresh), trajectory=True))


def scales(table: Table) -> np.ndarray:
    """`hypot(alpha, sigma)` of the table's N + 1 states."""
    return np.array([math.hypot(n.alpha, n.sigma) for n in table.nodes])


def invariant(table: Table) -> np.ndarray:
    """`unroll` for states divided by `hypot(alpha, sigma)`: it depends on the signal-to-noise ratios alone."""
    size = scales(table)
    out = unroll(table) / size[:, None]
    out[:, 0] *= size[0]
    return out


def point_mass_error(table: Table) -> float:
    """Largest error, over all rows, of mean and standard deviation for data that is one point.

    A state of level n must be `alpha_n c + sigma_n eps`: with `eps` of the start if nothing is drawn, and of unit
    variance if something is. Relative to the state's size.
    """
    states, first = unroll(table), table.nodes[0]
    kept, clean, drawn = np.split(states, [1, 1 + len(table)], axis=1)
    spread = np.hypot(kept[:, 0] * first.sigma, np.sqrt((drawn**2).sum(1)))
    spread = spread if np.any(drawn) else kept[:, 0] * first.sigma
    alpha, sigma = np.array([(n.alpha, n.sigma) for n in table.nodes]).T
    off = np.maximum(np.abs(kept[:, 0] * first.alpha + clean.sum(1) - alpha), np.abs(spread - sigma))
    return float(np.max(off / scales(table)))


# ---------------------------------------------------------------------- runs to look at
def traced(sampler: Sampler, options: Options, path: Path, calls: int, grid: str, final: str = "zero") -> Table:
    """The table of exactly `calls` model calls on a grid, as a scheduler makes it."""
    return sampler.trace(run_nodes(sampler, options, path, calls, grid, final), calls, **options)


def run_nodes(sampler: Sampler, options: Options, path: Path, calls: int, grid: str, final: str = "zero") -> Nodes:
    """The nodes of a run of `calls` model calls."""
    return _nodes(path, sampler.intervals_of(calls, **options), grid, final)


@functools.lru_cache(maxsize=4096)
def _nodes(path: Path, n: int, grid: str, final: str) -> Nodes:
    return grid_nodes(path, n, grid, final=final)


@functools.cache
def accepts(path: Path, grid: str) -> bool:
    """Whether a grid can be laid on a path at all (published schedules and `flow_stock` are for some paths only)."""
    try:
        grid_nodes(path, 2, grid)
    except OptionError:
        return False
    return True


def laid() -> list[tuple[str, str]]:
    """Every path with every grid that it accepts, by name."""
    return [(name, grid) for name, path in PATHS.items() for grid in GRIDS if accepts(path, grid)]


def run_cases(runs: Sequence[tuple[int, str]]) -> Iterator[tuple[str, Path, int, str, str]]:
    """(label, path, calls, grid, final) over all paths and the grids that they accept, for `runs` of (calls, final)."""
    for name, grid in laid():
        for calls, final in runs:
            yield f"{name}, {grid}, {calls} calls, final {final}", PATHS[name], calls, grid, final
