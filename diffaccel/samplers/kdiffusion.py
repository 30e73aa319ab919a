"""Samplers from k-diffusion's `sample_*(model, x, sigmas, ...)` functions, taken as they are."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from ..core.linear import ONE, Linear
from ..core.node import Node
from ..core.path import Nodes, Path
from ..core.trace import Tracer, trace_loop
from ..errors import DiffaccelError, OptionError, TraceError, no_leftover
from .common import lead
from .registry import Sampler

OURS = ("model", "x", "sigmas", "extra_args", "callback", "disable", "noise_sampler")
SAME_LEVEL = 1e-6  # levels computed in float32 are this far from the float64 nodes that they mean


def from_k_diffusion(fn: Callable[..., Any], name: str | None = None, **fixed: Any) -> Sampler:
    """A `Sampler` from a k-diffusion `sample_*(model, x, sigmas, ...)` function; `registry.add` registers it.

    The function works on `x/alpha` with `sigmas = sigma/alpha`, so it serves every path. The step from a first node
    with alpha = 0 (infinite sigma) is a DDIM step made here; the function begins at the next node. Noise comes from
    the run: through `noise_sampler` if the function takes one, else in place of `torch.randn_like`; only draws that
    are used are made. Where whole intervals do not add up to the calls that a run asks for, the last intervals are
    DDIM steps.

    Args:
        fn: its parameters with defaults become options of the sampler.
        name: default: the function's name without "sample_".
        fixed: arguments for `fn` that are not to be options.

    Returns:
        A sampler with declared order 1, since a function does not say; set it by `dataclasses.replace(s, order=2)`.

    Raises:
        OptionError: if the function takes no `sigmas`, or lacks a value for a parameter.
        TraceError: with the reason, if it cannot be a table (it adapts to the state, or makes its own noise).
    """
    label = getattr(fn, "__name__", type(fn).__name__)
    parameters = inspect.signature(fn).parameters
    if list(parameters)[:3] != ["model", "x", "sigmas"]:
        raise OptionError(
            f"{label}({', '.join(parameters)}) does not begin with (model, x, sigmas). A function that chooses its "
            "own noise levels, as adaptive ones do, cannot run on the nodes of a grid."
        )
    given = {k: p for k, p in parameters.items() if k not in OURS and p.kind is not p.VAR_KEYWORD}
    no_leftover(label, fixed, given)
    options = {k: p for k, p in given.items() if k not in fixed}
    missing = [k for k, p in options.items() if p.default is p.empty]
    if missing:
        raise OptionError(f"{label} needs a value for {', '.join(missing)}: pass it to from_k_diffusion")
    loop = Loop(fn, label, fixed, options)
    probe = trace_loop(loop, _probe_nodes(3), name=label)
    varies = len(probe) != 3
    loop.declare(options, calls=varies)
    return Sampler(
        name or label.removeprefix("sample_"),
        loop,
        order=1,
        paper=f"k-diffusion, {label}",
        intervals=loop.intervals if varies else None,
        stochastic=probe.stochastic,
    )


def _probe_nodes(n: int, *, zero: bool = False) -> Nodes:
    path = Path.edm()
    found = [path.at_level(float(v)) for v in np.geomspace(8.0, 0.5, n + 1)]
    return Nodes([*found[:-1], path.end] if zero else found, path)


# ---------------------------------------------------------------------- the function as a loop
class Loop:
    """`loop(x, nodes, predict, noise, *, options..., calls=None)` around a k-diffusion function."""

    def __init__(
        self, fn: Callable[..., Any], label: str, fixed: Mapping[str, Any], options: Mapping[str, inspect.Parameter]
    ) -> None:
        self.fn, self.label, self.fixed = fn, label, dict(fixed)
        self.takes = set(inspect.signature(fn).parameters)
        self.costs: dict[str, tuple[int, int]] = {}
        self.__module__, self.__qualname__ = fn.__module__, f"from_k_diffusion({label})"
        self.declare(options, calls=True)

    def declare(self, options: Mapping[str, inspect.Parameter], *, calls: bool) -> None:
        """Set the signature in which `Sampler` reads the options."""
        keyword = inspect.Parameter.KEYWORD_ONLY
        found = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_ONLY) for n in ("x", "nodes", "predict", "noise")]
        found += [p.replace(kind=keyword, annotation=p.empty) for p in options.values()]
        found += [inspect.Parameter("calls", keyword, default=None)] if calls else []
        self.__signature__ = inspect.Signature(found)

    def __call__(
        self, x: Any, nodes: Nodes, predict: Any, noise: Any, *, calls: int | None = None, **options: Any
    ) -> Any:
        if nodes[0].alpha == 0:
            x = lead(x, predict(x, nodes[0]), nodes[0], nodes[1], "x0")
            nodes, calls = nodes[1:], None if calls is None else calls - 1
        whole, tail = self._split(nodes, calls, options)
        if len(whole) > 1:
            x = self._run(x, whole, predict, noise, options)
        for s, t in pairwise(tail):
            x = lead(x, predict(x, s), s, t, "x0")
        return x

    def _run(self, x: Any, nodes: Nodes, predict: Any, noise: Any, options: Mapping[str, Any]) -> Any:
        """The function itself on these nodes, traced or with tensors."""
        torch = _torch(self.label)
        if isinstance(x, Linear):
            return self._call(Symbolic(nodes, predict, noise, torch), x, nodes, options)
        return self._call(Functional(nodes, predict, noise, torch, self._used(nodes, options)), x, nodes, options)

    def _call(self, world: World, x: Any, nodes: Nodes, options: Mapping[str, Any]) -> Any:
        state = world.begin(x)
        sigmas = world.torch.tensor([n.level for n in nodes], dtype=world.torch.float64, device=state.device)
        extra = {k: v for k, v in {"disable": True, "noise_sampler": world.draw}.items() if k in self.takes}
        with world.intercept():
            result = self.fn(world, state, sigmas, **extra, **self.fixed, **options)
        return world.end(result)

    def _used(self, nodes: Nodes, options: Mapping[str, Any]) -> set[int] | None:
        """Which of the function's draws reach the state, known by tracing it; None (all) if it cannot be traced."""
        tracer = Tracer(nodes, "x0")
        world = Symbolic(nodes, tracer.predict, tracer.noise, _torch(self.label))
        try:
            self._call(world, tracer.start, nodes, options)
        except DiffaccelError:
            return None
        return set(world.drawn)

    # ------------------------------------------------------------------ calls
    def cost(self, options: Mapping[str, Any]) -> tuple[int, int]:
        """Model calls of an interval, and of the step to sigma = 0; measured by tracing."""
        key = repr(sorted(options.items()))
        if key not in self.costs:
            probes = _probe_nodes(3), _probe_nodes(3, zero=True)
            whole, ended = (len(trace_loop(self, n, options=dict(options))) for n in probes)
            self.costs[key] = max(1, whole // 3), ended - 2 * (whole // 3)
        return self.costs[key]

    def intervals(self, calls: int, **options: Any) -> int:
        """How many intervals of a grid `calls` model calls can take."""
        each, last = self.cost(options)
        return max(1, 1 - (last - calls) // each)

    def _split(self, nodes: Nodes, calls: int | None, options: Mapping[str, Any]) -> tuple[Nodes, Nodes]:
        """Nodes for the function, and the nodes from there on for DDIM steps, so that the calls add up.

        A single interval to sigma = 0 is a DDIM step too: every such function means that, but some fail there.
        """
        n = len(nodes) - 1
        if n == 1 and nodes[-1].sigma == 0 and calls in (None, 1):
            return nodes[:1], nodes
        if calls is None or n == calls == 0:
            return nodes, nodes[-1:]
        each, last = self.cost(options)
        if calls == (each * n if nodes[-1].sigma > 0 else each * (n - 1) + last):
            return nodes, nodes[-1:]
        k = min((calls - n) // max(1, each - 1), n - 1)
        extra = calls - each * k - (n - k)
        if k < 0 or not 0 <= extra < each:
            raise OptionError(
                f"{self.label} makes {each} model calls an interval; {calls} calls do not suit {n} intervals"
            )
        tail = list(nodes[k:])
        for _ in range(extra):
            inner = math.sqrt(tail[0].level * tail[1].level) if tail[1].sigma > 0 else tail[0].level / 2
            tail.insert(1, nodes.path.at_level(inner))
        return nodes[: k + 1], Nodes(tail, nodes.path)


def _torch(label: str) -> Any:
    """torch, which a k-diffusion function has imported; this package does not."""
    if "torch" not in sys.modules:
        raise OptionError(f"{label} runs on torch tensors, and torch has not been imported: `import torch` first")
    return sys.modules["torch"]


# ---------------------------------------------------------------------- what the function computes with
class NoAttribute(TraceError, AttributeError):
    """The function looks into the model, which only the front end that it was written for can answer."""


class World:
    """The model and the noise as a k-diffusion function sees them, in the scale x/alpha."""

    torch: Any

    def __init__(self, nodes: Nodes, predict: Any, noise: Any, torch: Any) -> None:
        self.nodes, self.predict, self.noise, self.torch = nodes, predict, noise, torch
        self.count = 0  # draws asked for

    def __getattr__(self, name: str) -> Any:
        raise NoAttribute(f"the function asks for model.{name}; of a k-diffusion model only model(x, sigma) is known")

    def node(self, sigma: Any) -> Node:
        """The node that a sigma means: one of the run's, or one between them."""
        values = np.unique(np.asarray(sigma.detach().cpu() if hasattr(sigma, "detach") else sigma, dtype=np.float64))
        if len(values) != 1 or not values[0] > 0:
            raise TraceError(f"the function calls the model at sigma = {values.tolist()}; it needs one positive number")
        level = float(values[0])
        near = min(self.nodes, key=lambda n: abs(n.level - level))
        return near if abs(near.level - level) <= SAME_LEVEL * level else self.nodes.path.at_level(level)

    # ------------------------------------------------------------------ defined by both kinds
    def begin(self, x: Any) -> Any:
        raise NotImplementedError

    def __call__(self, x: Any, sigma: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def draw(self, *_: Any) -> Any:
        raise NotImplementedError

    def end(self, x: Any) -> Any:
        raise NotImplementedError

    def intercept(self) -> Any:
        """A context in which torch.randn_like asks `draw`."""
        raise NotImplementedError


class State(Linear):
    """A traced value that answers what k-diffusion functions ask of a tensor."""

    __slots__ = ()
    ndim = 4

    @property
    def torch(self) -> Any:
        return self.owner.torch

    @property
    def shape(self) -> Any:
        return self.torch.Size([1] * self.ndim)

    @property
    def device(self) -> Any:
        return self.torch.device("cpu")

    @property
    def dtype(self) -> Any:
        return self.torch.float64

    def new_ones(self, *size: Any, **_: Any) -> Any:
        return self.torch.ones(*size, dtype=self.dtype)

    def new_zeros(self, *size: Any, **_: Any) -> Any:
        return self.torch.zeros(*size, dtype=self.dtype)

    def new_tensor(self, data: Any, **_: Any) -> Any:
        return self.torch.as_tensor(data, dtype=self.dtype)

    def clone(self, *_: Any, **__: Any) -> State:
        return State(self.terms, self.owner)

    detach = to = contiguous = float = double = cpu = clone

    # Linear's operations make plain Linears of what they compute.
    def __add__(self, other: Any) -> State:
        return State(super().__add__(other).terms, self.owner)

    def __mul__(self, factor: Any) -> State:
        return State(super().__mul__(factor).terms, self.owner)

    def __truediv__(self, factor: Any) -> State:
        return State(super().__truediv__(factor).terms, self.owner)

    def __sub__(self, other: Any) -> State:
        return State(super().__sub__(other).terms, self.owner)

    def __rsub__(self, other: Any) -> State:
        return State(super().__rsub__(other).terms, self.owner)

    __radd__, __rmul__ = __add__, __mul__

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "randn_like":
            return args[0].owner.draw()
        if name in ("zeros_like", "clone"):
            return args[0] * (0.0 if name == "zeros_like" else 1.0)
        return super().__torch_function__(func, types, args, kwargs)


class Symbolic(World):
    """Tracing. A draw is a symbol of its own until a state that contains it reaches the model."""

    def __init__(self, nodes: Nodes, predict: Any, noise: Any, torch: Any) -> None:
        super().__init__(nodes, predict, noise, torch)
        self.drawn: dict[int, Linear] = {}

    def begin(self, x: Linear) -> State:
        self.x = x
        state = State((x / self.nodes[0].alpha).terms, self)
        self.start = state.terms
        return state

    def __call__(self, x: Any, sigma: Any, **kwargs: Any) -> State:
        if not isinstance(x, State):
            raise TraceError(f"the function calls the model on a {type(x).__name__}, not on a traced state")
        node = self.node(sigma)
        full = self.x if x.terms == self.start else self._settled(x) * node.alpha
        clean = self.predict(full, node)
        x.terms = (full / node.alpha).terms  # the state handed in has become a symbol of its own
        return State(clean.terms, self)

    def draw(self, *_: Any) -> State:
        self.count += 1
        return State({("k", self.count - 1): 1.0}, self)

    def end(self, x: Any) -> Linear:
        if not isinstance(x, State):
            raise TraceError(f"the function returns a {type(x).__name__}, not the state at the last sigma")
        return self._settled(x) * self.nodes[-1].alpha

    def _settled(self, x: State) -> Linear:
        """The state as the tracer knows it: with its draws made."""
        if ONE in x.terms:
            raise TraceError(
                "the function adds to the state a tensor that comes neither from the state nor from the model. Noise "
                "must come from `noise_sampler` or torch.randn_like, or a table would repeat it at every run."
            )
        value = Linear(x.terms)
        for symbol in [s for s in x.terms if s[0] == "k"]:
            if symbol[1] not in self.drawn:
                self.drawn[symbol[1]] = self.noise()
            value = value.substitute(symbol, self.drawn[symbol[1]])
        return value

    def intercept(self) -> Any:
        return self.torch.no_grad()  # State.__torch_function__ sees randn_like


class Functional(World):
    """Running with tensors; numpy arrays are converted on the way in and out."""

    def __init__(self, nodes: Nodes, predict: Any, noise: Any, torch: Any, used: set[int] | None) -> None:
        super().__init__(nodes, predict, noise, torch)
        self.used, self.inside = used, False

    def begin(self, x: Any) -> Any:
        self.numpy = not hasattr(x, "detach")
        self.like = self._tensor(x) / self.nodes[0].alpha
        return self.like

    def _tensor(self, x: Any) -> Any:
        return self.torch.from_numpy(np.array(x)) if self.numpy else x

    def __call__(self, x: Any, sigma: Any, **kwargs: Any) -> Any:
        node = self.node(sigma)
        full = (x * node.alpha).to(self.like.dtype)  # float64 sigmas may have raised it
        self.inside = True
        try:
            return self._tensor(self.predict(full.numpy() if self.numpy else full, node))
        finally:
            self.inside = False

    def draw(self, *_: Any) -> Any:
        self.count += 1
        if self.used is not None and self.count - 1 not in self.used:
            return self.torch.zeros_like(self.like)
        return self._tensor(self.noise())

    def end(self, x: Any) -> Any:
        out = (x * self.nodes[-1].alpha).to(self.like.dtype)
        return out.numpy() if self.numpy else out

    def intercept(self) -> Any:
        world = self

        class Mode(self.torch.overrides.TorchFunctionMode):  # type: ignore[name-defined]
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is world.torch.randn_like and not world.inside:
                    return world.draw()
                return func(*args, **(kwargs or {}))

        return Mode()
