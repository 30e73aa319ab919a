"""Schedulers that measure DPM-Solver-v3's statistics while a pipeline runs by its own call.

What a pipeline does to the model's output (guidance, ControlNet, packed latents) is in what is measured, and the
denoiser is not touched. Derivatives of the output by the state are taken along random signs v, from a second visit of
the node at `x + delta v`, or by forward-mode differentiation: the state is then handed over as a dual number (no_grad
does not stop those), and the output comes back with its derivative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.node import Node
from ..core.path import Nodes, Path
from ..core.prediction import pair
from ..errors import OptionError, RunError
from ..schedulers.from_config import output_of
from ..schedulers.guards import output_for
from ..schedulers.table_scheduler import TableSchedulerOutput
from .ems_stats import Tensors, moments_of, stacked
from .engine import Captured

METHODS = ("jvp", "difference")
DELTA = {torch.float64: 1e-4, torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.1}
DLAM = 0.02  # how far a point is moved along the ODE for the derivative by lam, with independent points


def stat_nodes(path: Path, lams: np.ndarray) -> tuple[Nodes, int]:
    """Nodes of a run through the statistics' nodes, and how many come before those.

    A run begins where the pipeline's noise belongs: at the path's first node; from there it goes down in steps of the
    statistics' size, and ends at sigma = 0.
    """
    inner = [path.at_lam(float(v)) for v in lams]
    first = path.first
    if first.alpha == 0:
        head = [first]
    elif abs(first.lam - lams[0]) < 1e-9:
        inner[0], head = first, []
    else:
        count = max(1, round((lams[0] - first.lam) / (lams[1] - lams[0])))
        head = [first, *(path.at_lam(float(v)) for v in np.linspace(first.lam, lams[0], count + 1)[1:-1])]
    if abs(path.last.lam - lams[-1]) < 1e-9:
        inner[-1] = path.last
    return Nodes([*head, *inner, path.end], path), len(head)


@contextmanager
def duals(model: torch.nn.Module) -> Iterator[None]:
    """Forward-mode differentiation of a model: plain attention kernels, contiguous inputs of group norms."""

    def contiguous(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.contiguous() if isinstance(a, torch.Tensor) else a for a in args)

    norms = [m for m in model.modules() if isinstance(m, torch.nn.GroupNorm)]
    handles = [m.register_forward_pre_hook(contiguous) for m in norms]
    try:
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            yield
    finally:
        for handle in handles:
            handle.remove()


class Signs:
    """Independent random signs for each image: the same for its seed, whatever else is in the batch."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(0x5EED + seed) for seed in seeds]

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ...) of -1 and 1 in the dtype and place of x."""
        drawn = [torch.randint(0, 2, x.shape[1:], generator=g) for g in self._generators]
        return (torch.stack(drawn) * 2 - 1).to(x)


class Probe(Captured):
    """What both schedulers share: conversions at a node, derivatives, the moments found so far."""

    _method: str
    _delta: float | None
    _reduce: str
    _signs: Signs
    _stats: list[Tensors]

    @classmethod
    def probing(
        cls,
        config: Mapping[str, Any],
        nodes: Nodes,
        seeds: Sequence[int],
        *,
        method: str,
        reduce: str,
        delta: float | None = None,
        own_noise: bool = True,
    ) -> Any:
        """A scheduler for one run.

        Args:
            config: of the pipeline's scheduler.
            nodes: as `stat_nodes` gives them.
            seeds: of the batch's images, for the signs.
            method: "jvp" (inside `duals`) or "difference".
            reduce: see `ems_stats.moments_of`.
            delta: size of the difference, in units of the state's; None: by dtype.
            own_noise: see `Captured`.
        """
        made = cls.of(config, "dpmpp", {"order": 3, "form": "exact"}, nodes=nodes, own_noise=own_noise)
        made._method, made._delta, made._reduce, made._signs, made._stats = method, delta, reduce, Signs(seeds), []
        return made

    @property
    def moments(self) -> Tensors:
        """Of all nodes, once the run is over."""
        return stacked(self._stats)

    def _moved(self, node: Node, x: torch.Tensor) -> torch.Tensor:
        """The state `x + delta v` of the second visit, in x's precision."""
        self._v = self._signs.like(x)
        delta = self._delta or DELTA.get(x.dtype, 0.01)
        self._step = delta * math.hypot(node.alpha, node.sigma)
        return x + self._step * self._v

    def _dual(self, x: torch.Tensor) -> torch.Tensor:
        self._v = self._signs.like(x)
        return forward_ad.make_dual(x.contiguous(), self._v)

    def _eps(self, node: Node, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        u, w = pair(output_of(self.config), "eps", node)
        return x.double() * float(u) + output_for(output, x).double() * float(w)

    def _l_by_jvp(self, node: Node, x: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, `sigma v (J v)`)."""
        plain, tangent = forward_ad.unpack_dual(output)
        if tangent is None:
            raise RunError("the model's output carries no derivative by its input: use method='difference'")
        v = self._v.double()
        slope = self._eps(node, v, output_for(tangent, x))  # conversions are linear
        return plain, node.sigma * v * slope

    def _l_by_difference(
        self, node: Node, x: torch.Tensor, eps: torch.Tensor, moved: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """`sigma v (eps(x + delta v) - eps(x))/delta`, with the move that was left after rounding."""
        step = moved.double() - x.double()
        return node.sigma * step * (self._eps(node, moved, output) - eps) / self._step**2

    def _wrapped(self, state: torch.Tensor, kwargs: Mapping[str, Any]) -> Any:
        if kwargs.get("return_dict", True):
            return TableSchedulerOutput(prev_sample=state, pred_original_sample=state)
        return (state, state)


class TrajectoryProbe(Probe):
    """Statistics at the points of the model's own trajectories; the derivative by lam is that of neighbours on them.

    Two calls a node by differences, one (and one more at the start) by forward-mode differentiation.
    """

    _skip = 0  # nodes before the statistics' own
    _visit = 0  # of the current node

    def begin(self, skip: int, lams: np.ndarray) -> TrajectoryProbe:
        """Say which nodes are the statistics' own."""
        self._skip, self._lams = skip, lams
        self._window: list[tuple[torch.Tensor, ...]] = []  # (l, y, eps) of up to three neighbours
        return self

    def _visits(self, i: int) -> int:
        """Calls at node i of the run."""
        if not self._skip <= i < self._skip + len(self._lams):
            return 1
        return 2 if self._method == "difference" or i == 0 else 1  # the pipeline's own start noise is no dual

    @property
    def timesteps(self) -> torch.Tensor:
        """What the model is fed: a node as often as it is visited."""
        run = self._runs.get()
        if run is None:
            return super().timesteps
        counts = torch.tensor([self._visits(i) for i in range(len(run))], device=run.timesteps.device)
        return torch.repeat_interleave(run.timesteps, counts)

    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        """A visit of a node: measure, and send the pipeline to its second visit or to the next node."""
        run = self._runs.need()
        i = run.counter or 0
        node = run.nodes[i]
        if self._visit == 0 and self._visits(i) == 2:
            self._visit = 1
            sample = forward_ad.unpack_dual(sample).primal if self._method == "jvp" else sample
            self._kept = (model_output, sample)
            return self._wrapped(self._dual(sample) if self._method == "jvp" else self._moved(node, sample), kwargs)
        self._visit = 0
        if self._skip <= i < self._skip + len(self._lams):
            model_output, sample = self._measure(i - self._skip, node, model_output, sample)
        done = super().step(model_output, timestep, sample, *args, **kwargs)
        following = i + 1
        if self._method == "jvp" and self._skip <= following < self._skip + len(self._lams):
            state = done[0] if isinstance(done, tuple) else done.prev_sample
            return self._wrapped(self._dual(state), kwargs)
        return done

    def _measure(self, k: int, node: Node, output: Any, sample: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in node k; returns the plain output and state that the run goes on from."""
        if self._method == "jvp":
            x = forward_ad.unpack_dual(sample).primal
            plain, l = self._l_by_jvp(node, x, output)
            eps = self._eps(node, x, plain)
        else:
            plain, x = self._kept
            eps = self._eps(node, x, plain)
            l = self._l_by_difference(node, x, eps, sample, output)
        self._window.append((l, x.double() / node.alpha, eps))
        last = len(self._lams) - 1
        if k == 1 and last == 1:
            self._emit(0, 0)
            self._emit(1, 1)
        elif k == 2:
            self._emit(0, 0)
        if k >= 2:
            self._emit(k - 1, 1)
            if k == last:
                self._emit(k, 2)
            self._window.pop(0)
        return plain, x

    def _emit(self, k: int, place: int) -> None:
        """The moments of node k, which is at `place` in the window; differences of second order in lam."""
        h, eps = float(self._lams[1] - self._lams[0]), [entry[2] for entry in self._window]
        if len(eps) == 2:
            slope = (eps[1] - eps[0]) / h
        else:
            p, q, r = ((-1.5, 2.0, -0.5), (-0.5, 0.0, 0.5), (0.5, -2.0, 1.5))[place]
            slope = (p * eps[0] + q * eps[1] + r * eps[2]) / h
        l, y, e = self._window[place]
        level = math.exp(-float(self._lams[k]))
        self._stats.append(moments_of(l, (y, level * e, level * slope), self._reduce))


class ForwardProbe(Probe):
    """Statistics at independent points `alpha x0 + sigma e` of given images x0 (the paper's q_lambda).

    Three calls a node by differences, two by forward-mode differentiation: the point, the point moved by v, and the
    point moved along the ODE.
    """

    _node: Node
    _x: torch.Tensor
    _eps_here: torch.Tensor
    _l: torch.Tensor

    def begin(self, clean: torch.Tensor, seeds: Sequence[int], lams: np.ndarray) -> ForwardProbe:
        """Say which images the points are made from, (B, ...)."""
        self._clean, self._lams = clean, lams
        self._noises = [torch.Generator().manual_seed(0xF0D + seed) for seed in seeds]
        path = self.given.path  # type: ignore[union-attr]
        body = [path.at_lam(float(v)) for v in lams]
        self._plan: list[tuple[Node, int, str]] = []
        for k, node in enumerate(body):
            sign = 1 if 2 * k < len(body) else -1
            self._plan += [(node, k, "point")] + [(node, k, "moved")] * (self._method == "difference")
            self._plan += [(path.at_lam(float(lams[k]) + sign * DLAM), k, "later")]
        if self._method == "jvp":
            self._plan.insert(0, (body[0], 0, "start"))  # what the pipeline begins with is no dual
        self._at = 0
        return self

    def first(self) -> torch.Tensor:
        """The state that the pipeline is handed."""
        return self._point(self._plan[0][0])

    def _point(self, node: Node) -> torch.Tensor:
        drawn = [torch.randn(self._clean.shape[1:], generator=g) for g in self._noises]
        return node.alpha * self._clean + node.sigma * torch.stack(drawn).to(self._clean)

    @property
    def timesteps(self) -> torch.Tensor:
        """What the model is fed."""
        run = self._runs.get()
        if run is None:
            return super().timesteps
        return torch.tensor([node.t for node, _, _ in self._plan], dtype=torch.float32, device=run.timesteps.device)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """See `TableScheduler`; at the level of this visit."""
        if self.config.path != "edm":
            return sample
        return sample * output_of(self.config).input_scale(self._plan[self._at][0].sigma)

    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        """A visit: measure, and choose the state of the next one."""
        node, k, what = self._plan[self._at]
        x = forward_ad.unpack_dual(sample).primal
        if what == "start":
            state = self._dual(x)
        elif what == "point":
            self._take(node, x, model_output)
            state = self._moved(node, x) if self._method == "difference" else self._along()
        elif what == "moved":
            self._l = self._l_by_difference(node, self._x, self._eps_here, x, model_output)
            state = self._along()
        else:
            eps = self._eps(node, x, forward_ad.unpack_dual(model_output).primal)
            slope = (eps - self._eps_here) / (node.lam - float(self._lams[k]))
            level = math.exp(-float(self._lams[k]))
            points = (self._x.double() / self._node.alpha, level * self._eps_here, level * slope)
            self._stats.append(moments_of(self._l, points, self._reduce))
            more = self._at + 1 < len(self._plan)
            state = self._point(self._plan[self._at + 1][0]) if more else x
            state = self._dual(state.to(x)) if more and self._method == "jvp" else state.to(x)
        self._at += 1
        return self._wrapped(state, kwargs)

    def _take(self, node: Node, x: torch.Tensor, output: Any) -> None:
        plain = output
        if self._method == "jvp":
            plain, self._l = self._l_by_jvp(node, x, output)
        self._node, self._x, self._eps_here = node, x, self._eps(node, x, plain)

    def _along(self) -> torch.Tensor:
        """The point a little further on the ODE: the first-order step in noise space."""
        s, t = self._node, next(n for n, _, what in self._plan[self._at + 1 :] if what == "later")
        scale = t.alpha / s.alpha
        return (scale * self._x.double() + (t.sigma - s.sigma * scale) * self._eps_here).to(self._x)


def choose_method(asked: str, attempt: Any) -> tuple[str, str]:
    """(method, why): "auto" takes forward-mode differentiation where `attempt("jvp")` goes through.

    Raises:
        OptionError: if "jvp" was asked for and does not work.
    """
    if asked == "difference":
        return asked, "asked for"
    try:
        attempt("jvp")
    except (RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        if asked == "jvp":
            raise OptionError(
                f"method='jvp': this model cannot be differentiated forward ({reason}); use method='difference'"
            ) from error
        return "difference", f"forward-mode differentiation failed: {reason}"
    return "jvp", "asked for" if asked == "jvp" else "forward-mode differentiation works"
