"""The register of samplers, and how one is run or traced."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from ..core.path import Nodes
from ..core.prediction import Space, convert
from ..core.table import Table
from ..core.trace import Loop, run_loop, trace_loop
from ..errors import OptionError, no_leftover, one_of

ENTRY_POINTS = "diffaccel.samplers"
Options = Mapping[str, Any]


class Calibrated(NamedTuple):
    """How a sampler takes data that was calibrated on a checkpoint.

    A scheduler with `artifact=FILE` loads the file, checks that kind and path fit, and passes `read(artifact)` to the
    loop as the keyword `option`. A scheduler that has neither the artifact nor that option is an error that shows
    `command`. The value may be any object that is not changed; its `str` stands for it in tables and `explain()`.

    Args:
        kind: of the artifact, or several kinds.
        option: the loop's keyword. Its default (no calibration) is what the loop does when it is run by itself.
        read: `read(artifact)` gives the option's value; `artifact` has `.tensors`, `.meta`, `.file`.
        command: the command line that makes an artifact.
        without: how to say that none is wanted, for the error's last line.
        tensor: a tensor of the artifact of shape (n, *shape), `shape` being that of one sample or broadcastable to it;
            a run on samples of another shape is an error. "" if there is none.
        nodes: whether the artifact decides the nodes: a grid, sigmas or timesteps of the user's own are an error.
        resample: `resample(value, shape)`: the option's value for samples of another shape, where the loop's option
            `resample` asks for it. None if there is no such option.
    """

    kind: str | tuple[str, ...]
    option: str
    read: Callable[[Any], Any]
    command: str
    without: str
    tensor: str = ""
    nodes: bool = False
    resample: Callable[[Any, tuple[int, ...]], Any] | None = None


@dataclass(frozen=True)
class Sampler:
    """A registered loop and what is known about it.

    Args:
        name: as users type it.
        loop: `loop(x, nodes, predict, noise, **options)`; its keyword-only arguments are the options.
        order: convergence order, a number or a function of the options.
        space: what `predict` returns by default; where the loop has an option `space`, that option decides.
        paper: where the method is published.
        intervals: `intervals(calls, **options)`: how many intervals of a grid `calls` model calls can take. A loop
            that spends more than one call on some intervals has a keyword `calls`, the total that it may make
            (None: as many as it likes).
        stochastic: whether it draws noise with its default options.
        variants: the options that the checks run it with, beside the defaults.
        smooth: the grid on which `order` is measured: "lam" (uniform in lam) or "level" (uniform in sigma/alpha).
        edits: `edit(table, nodes) -> table`, applied to the finished table (see `samplers.rewrite`).
        begin: `begin(table, nodes, k, options) -> table`: the rows, before `edits`, of a run that begins at row k of
            `table`, for samplers that a grid without its first nodes does not describe (see `samplers.begin`).
        start: what the noise that a run begins with is multiplied by.
        rewrites: names of the rewriters in it.
        calibrated: how it takes calibrated data, if it does.
        place: `place(nodes, options)` moves nodes before a run (returns them unchanged where they are right already).
    """

    name: str
    loop: Loop
    order: float | Callable[..., float]
    space: Space = "x0"
    paper: str = ""
    intervals: Callable[..., int] | None = None
    stochastic: bool = False
    variants: tuple[Options, ...] = ()
    smooth: str = "lam"
    edits: tuple[Callable[[Table, Nodes], Table], ...] = ()
    begin: Callable[[Table, Nodes, int, dict[str, Any]], Table] | None = None
    start: float = 1.0
    rewrites: tuple[str, ...] = ()
    place: Callable[[Nodes, Options], Nodes] | None = None
    calibrated: Calibrated | None = None
    defaults: dict[str, Any] = field(init=False)
    counts_calls: bool = field(init=False)

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.loop).parameters
        keyword = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
        if any(v is inspect.Parameter.empty for v in keyword.values()):
            raise OptionError(f"sampler {self.name!r}: each option of the loop needs a default")
        if self.calibrated is not None and self.calibrated.option not in keyword:
            raise OptionError(f"sampler {self.name!r}: its loop has no keyword {self.calibrated.option!r}")
        object.__setattr__(self, "counts_calls", "calls" in keyword)
        object.__setattr__(self, "defaults", {k: v for k, v in keyword.items() if k != "calls"})

    # ------------------------------------------------------------------ options
    @property
    def settings(self) -> tuple[Options, ...]:
        """The options that the checks run it with: none (the defaults), then each of `variants`."""
        return ({}, *self.variants)

    def options(self, given: Options) -> dict[str, Any]:
        """All options, with `given` in place of defaults.

        Raises:
            OptionError: if one is unknown, or a text where the default is a number or a switch.
        """
        no_leftover(f"sampler {self.name!r}", given, self.defaults)
        for key, value in given.items():
            wanted = _instead_of_text(self.defaults[key], value) if isinstance(value, str) else None
            if wanted:
                raise OptionError(f"sampler {self.name!r}: {key} must be {wanted}, got {value!r}")
        return self.defaults | dict(given)

    def order_of(self, **given: Any) -> float:
        """The declared order with these options."""
        options = self.options(given)
        return self.order(**options) if callable(self.order) else self.order

    def space_of(self, options: Options) -> Space:
        """The space of `predict` with these (complete) options."""
        return options.get("space", self.space)

    def intervals_of(self, calls: int, **given: Any) -> int:
        """How many intervals of a grid `calls` model calls can take.

        Raises:
            OptionError: if the calls do not suffice for one.
        """
        n = calls if self.intervals is None else self.intervals(calls, **self.options(given))
        if n < 1:
            raise OptionError(f"sampler {self.name!r} cannot do a run of {calls} model call(s)")
        return n

    # ------------------------------------------------------------------ use
    def placed(self, nodes: Nodes, options: Options) -> Nodes:
        """The nodes that a run with these (complete) options is made on."""
        return nodes if self.place is None else self.place(nodes, options)

    def trace(self, nodes: Nodes, calls: int | None = None, **given: Any) -> Table:
        """The table on these nodes; `calls` limits the model calls of samplers that vary them."""
        nodes = self.placed(nodes, self.options(given))
        table = self.edited(self.unedited(nodes, calls, **given), nodes)
        if calls is not None and len(table) != calls:
            raise OptionError(f"sampler {self.name!r} makes {len(table)} calls on {len(nodes)} nodes, not {calls}")
        return table

    def unedited(self, nodes: Nodes, calls: int | None = None, **given: Any) -> Table:
        """The table before `edits`."""
        options = self.options(given)
        extra = {"calls": calls} if self.counts_calls else {}
        return trace_loop(self.loop, nodes, space=self.space_of(options), name=self.name, options={**options, **extra})

    def edited(self, table: Table, nodes: Nodes) -> Table:
        """The table after `edits`."""
        for edit in self.edits:
            table = edit(table, nodes)
        return table

    def run(self, x: Any, nodes: Nodes, predict: Any, noise: Any = None, calls: int | None = None, **given: Any) -> Any:
        """The state at the last node, for arrays or tensors; see `core.trace.run_loop`.

        With `edits` the table is run: they are defined on rows.
        """
        x = x if self.start == 1 else x * self.start
        if self.edits:
            table = self.trace(nodes, calls, **given)
            return table.apply(x, lambda state, node, space: convert(predict(state, node), space, state, node), noise)
        options = self.options(given)
        extra = {"calls": calls} if self.counts_calls else {}
        space, nodes = self.space_of(options), self.placed(nodes, options)
        return run_loop(self.loop, x, nodes, predict, noise, space=space, options={**options, **extra})


REGISTRY: dict[str, Sampler] = {}
_FAILED: set[Any] = set()  # entry points that could not be loaded; each is reported once


def sampler(
    name: str,
    *,
    order: float | Callable[..., float],
    space: Space = "x0",
    paper: str = "",
    intervals: Callable[..., int] | None = None,
    stochastic: bool = False,
    variants: tuple[Options, ...] = (),
    smooth: str = "lam",
    place: Callable[[Nodes, Options], Nodes] | None = None,
    calibrated: Calibrated | None = None,
) -> Callable[[Loop], Loop]:
    """Register a loop as a sampler; see `Sampler` for the arguments.

    Raises:
        OptionError: if the name is taken by another loop.
    """

    def register(loop: Loop) -> Loop:
        add(
            Sampler(
                name,
                loop,
                order,
                space,
                paper,
                intervals,
                stochastic,
                variants,
                smooth,
                place=place,
                calibrated=calibrated,
            )
        )
        return loop

    return register


def _instead_of_text(default: Any, text: str) -> str | None:
    """What belongs in the place of a text, if that is certain; a switch may have other settings than on and off."""
    if isinstance(default, bool):
        return "true or false" if text.lower() in ("yes", "no", "on", "off", "true", "false") else None
    return "a number" if isinstance(default, (int, float)) else None


def same_loop(a: Sampler, b: Sampler) -> bool:
    """Whether both come from one definition: the same code, perhaps read again, as a cell of a notebook is."""
    return (a.loop.__module__, a.loop.__qualname__) == (b.loop.__module__, b.loop.__qualname__)


def same_definition(a: Sampler, b: Sampler) -> bool:
    """`same_loop`, and nothing else that was stated differs."""
    stated = ("order", "space", "paper", "stochastic", "variants", "smooth", "start", "rewrites", "edits", "place")
    return same_loop(a, b) and all(_told(getattr(a, k)) == _told(getattr(b, k)) for k in stated)


def _told(value: Any) -> Any:
    return getattr(value, "__qualname__", value)


def add(made: Sampler) -> Sampler:
    """Register a sampler object, such as `from_k_diffusion` makes.

    Raises:
        OptionError: if the name is taken by another loop.
    """
    old = REGISTRY.get(made.name)
    if old is not None and not same_loop(old, made):
        raise OptionError(f"a sampler named {made.name!r} is registered already, by {old.loop.__module__}")
    REGISTRY[made.name] = made
    return made


def get(name: str | Sampler) -> Sampler:
    """A registered sampler by name (or the sampler itself); plug-ins are found by their entry points.

    Raises:
        OptionError: if there is none, with the nearest names.
    """
    if isinstance(name, Sampler):
        return name
    importlib.import_module("diffaccel.samplers")
    if name not in REGISTRY:
        load_plugins()
    return REGISTRY[one_of("sampler", name, REGISTRY)]


def samplers() -> dict[str, Sampler]:
    """All registered samplers by name, plug-ins included."""
    importlib.import_module("diffaccel.samplers")
    load_plugins()
    return dict(sorted(REGISTRY.items()))


def load_plugins() -> None:
    """Import what installed packages name under the entry point `diffaccel.samplers`.

    That is a module or a loop, which registers itself with `@sampler` when it is imported, or a `Sampler`. A plug-in
    that fails is skipped with a warning, so that it takes nothing but itself away.
    """
    for point in entry_points(group=ENTRY_POINTS):
        if point in _FAILED:
            continue
        try:
            found = point.load()
            if isinstance(found, Sampler):
                add(found)
        except Exception as error:
            _FAILED.add(point)
            warnings.warn(
                f"the sampler plug-in {point.name!r} ({point.value}) was skipped, because loading it failed: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
