"""The functional interface: samplers without diffusers objects (notebooks, tests, other front ends)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .core.grid import nodes as _nodes
from .core.node import Node
from .core.path import Nodes, Path
from .core.prediction import Prediction
from .core.table import Table
from .errors import RunError
from .samplers.registry import Sampler
from .samplers.rewrite import rewritten


def nodes(path: Path, calls: int, grid: str = "linspace_open", *, final: str = "zero", **options: Any) -> Nodes:
    """The nodes of a run of `calls` one-call intervals; see `diffaccel.core.grid.nodes`."""
    return _nodes(path, calls, grid, final=final, **options)


def sample(
    predict: Callable[[Any, Node], Any],
    x: Any,
    sampler: str | Sampler = "dpmpp",
    *,
    nodes: Nodes,
    noise: Callable[[Any], Any] | None = None,
    calls: int | None = None,
    rewrite: Any = None,
    **options: Any,
) -> Any:
    """Run a sampler on arrays or tensors.

    Args:
        predict: `predict(x, node)` gives a `Prediction`, or the x0-prediction itself, of the shape of x.
        x: the state at `nodes[0]` (`alpha * x0 + sigma * eps`), any shape.
        sampler: a registered name.
        nodes: from `diffaccel.nodes`.
        noise: `noise(x)` gives a standard normal draw of the shape of x; needed by stochastic samplers.
        calls: total model calls, for samplers that can spend several on an interval.
        rewrite: rewriters (`da.restart(...)`, ...), one or a list.
        options: of the sampler.

    Returns:
        The state at `nodes[-1]`.

    Raises:
        OptionError: an option that the sampler does not take.
        RunError: a prediction of another shape than x, or with NaN or infinity.
    """
    return rewritten(sampler, rewrite).run(x, nodes, _checked(predict), noise, calls, **options)


def _checked(predict: Callable[[Any, Node], Any]) -> Callable[[Any, Node], Any]:
    """`predict`, after a look at what it gives."""

    def called(x: Any, node: Node) -> Any:
        made = predict(x, node)
        value = made.value if isinstance(made, Prediction) else made
        if getattr(value, "shape", None) != x.shape:
            shape = getattr(value, "shape", type(value).__name__)
            raise RunError(f"predict at t = {node.t:g}: expected the shape {tuple(x.shape)} of the state, got {shape}")
        if not math.isfinite(value.sum()) and not bool((abs(value) < math.inf).all()):
            raise RunError(f"predict at t = {node.t:g}: the prediction holds NaN or infinity")
        return made

    return called


def trace(
    sampler: str | Sampler, nodes: Nodes, *, calls: int | None = None, rewrite: Any = None, **options: Any
) -> Table:
    """The table of a sampler on these nodes: `t.describe()`, `t.to_json()`, `t.apply(...)`, `t == other`.

    With rewriters the nodes are those of the main loop; `rewritten(sampler, rewrite).intervals_of(calls)` tells how
    many intervals `calls` model calls can take.
    """
    return rewritten(sampler, rewrite).trace(nodes, calls, **options)
