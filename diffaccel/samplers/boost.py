"""Boost-and-Skip: begin with stronger noise at a later node; for rare samples, not for speed."""

from __future__ import annotations

from typing import Any

from ..core.path import Nodes
from ..core.table import Table
from ..errors import OptionError
from .registry import Sampler
from .rewrite import rewriter, with_edit, with_loop

NAME = "boost_and_skip"


@rewriter(NAME, stage="start")
def boost_and_skip(sampler: Sampler, gamma: float, *, drop: int) -> Sampler:
    """The run's noise is multiplied by gamma, and it begins `drop` nodes later (arXiv:2502.06516).

    It pushes samples into the tails of what the model knows: a way to rare images, no acceleration. The sampler must
    draw noise, which forgets the boost. Published: gamma = 4, drop = 3 of 250 nodes (CelebA 64) and 2.5, 3
    (ImageNet 64). The boost is in `init_noise_sigma`, by which pipelines multiply their noise (flow pipelines do not);
    `diffaccel.sample` multiplies the state that it is given.

    Args:
        gamma: more than 0.
        drop: nodes, 0 or more; N model calls are made on a grid of N + drop.
    """
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 < gamma < float("inf"):
        raise OptionError(f"rewriter {NAME!r} needs gamma > 0, got {gamma!r}")
    if isinstance(drop, bool) or not isinstance(drop, int) or drop < 0:
        raise OptionError(f"rewriter {NAME!r}: drop must be an integer of 0 or more, got {drop!r}")

    def loop(x: Any, nodes: Nodes, predict: Any, noise: Any, **options: Any) -> Any:
        if nodes.path.family != "vp":
            raise OptionError(f"rewriter {NAME!r} is for VP paths, this one is {nodes.path.family!r}")
        if len(nodes) - drop < 2:
            raise OptionError(f"rewriter {NAME!r}: {drop} of {len(nodes) - 1} intervals dropped leaves no run")
        return sampler.loop(x, nodes[drop:], predict, noise, **options)

    def begin(table: Table, nodes: Nodes, k: int, options: dict[str, Any]) -> Table:
        raise OptionError(
            f"rewriter {NAME!r} acts on the noise that a run begins with, so a run cannot begin at call {k}"
        )

    def check(table: Table, nodes: Nodes) -> Table:
        if not table.stochastic:
            raise OptionError(
                f"rewriter {NAME!r} cannot be combined with sampler {sampler.name!r}: it draws no noise, so the boost "
                "would stay in the image; use ddpm, ddim with eta, or an SDE sampler"
            )
        return table

    made = with_loop(
        sampler,
        loop,
        calls=sampler.counts_calls,
        intervals=lambda calls, **options: sampler.intervals_of(calls, **options) + drop,
        begin=begin,
        start=float(gamma),
    )
    return with_edit(made, check)
