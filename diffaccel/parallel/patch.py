"""One image on several ranks: each call of the denoiser is shared, patch by patch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import StateManager

from ..errors import OptionError
from .layers import Post, Seat, Seats
from .layers_found import family_of, layers_of
from .patch_call import each, halved, joined, number, register, shapes_of, step_ratio, unregister
from .patch_settings import LATE, Settings
from .patch_watch import Watch
from .plan import Bands, Group, Ranges
from .protocol import World, WorldError, line

NAME = "diffaccel.patch_parallel"


@dataclass
class Branch:
    """One of the calls of a step: guidance may need two."""

    signature: tuple[Any, ...] = ()
    posts: dict[int, Post] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)  # of the calls since the last reset

    def drain(self) -> None:
        """Nothing of these calls may be met by later ones."""
        for post in self.posts.values():
            post.drain()


@dataclass
class Tally:
    """What was counted in a run.

    Attributes:
        calls: of the denoiser.
        late: those that used what other ranks had sent in the call before.
    """

    calls: int = 0
    late: int = 0


class _Context(StateManager):
    """The name that a pipeline gives to a branch (`with transformer.cache_context("cond")`)."""

    def __init__(self) -> None:
        self.name: str | None = None

    def set_context(self, context: Any) -> None:
        self.name = getattr(context, "name", context)  # before diffusers 0.41 a context is its name

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self.name = None


class PatchHook(ModelHook):
    """Shares every call of a denoiser among the ranks of a world.

    Args:
        world: of 2 or more ranks.
        settings: how.
        run: gives an object that is another one in another run (the scheduler's timesteps).
        facts: what all ranks must agree on before a run, as plain JSON.
    """

    _is_stateful = True

    def __init__(
        self,
        world: World,
        settings: Settings,
        run: Callable[[], Any] = lambda: None,
        facts: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        super().__init__()
        self.world, self.settings, self.run, self.watch = world, settings, run, Watch(world, settings, facts)
        self.seats, self.context, self.tally = Seats(), _Context(), Tally()
        self._branches: dict[str, Branch] = {}
        self._run: Any = None
        self._time, self._ordinal = -float("inf"), 0

    # ------------------------------------------------------------------ on and off
    def attach(self, model: torch.nn.Module) -> None:
        """Put all hooks on a denoiser.

        Raises:
            OptionError: if it is no known model, or has a layer that is not known.
        """
        self.config: Any = model.config
        self.family, self.layers = family_of(model), layers_of(model, self.seats)
        self.names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._modules = sum(1 for _ in model.modules())
        for name, hook in self.layers.hooks:
            register(model.get_submodule(name), hook, f"{NAME}.{type(hook).__name__}")
        register(model, self, NAME)

    def detach(self, model: torch.nn.Module) -> None:
        """Take them all off; the model is then what it was."""
        for branch in self._branches.values():
            branch.drain()
        unregister(model, NAME)
        for name, hook in reversed(self.layers.hooks):
            unregister(model.get_submodule(name), f"{NAME}.{type(hook).__name__}")

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self._reset()
        return module

    # ------------------------------------------------------------------ one call
    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self.names, args)), **kwargs}
        self.watch.settle()
        branch, halves, late, step = self._begin(module, arguments)
        outputs = self.world.run(
            lambda rank: self._part(Group(rank, self.world.size, halves), arguments, branch, late, step)
        )
        self.tally.calls += 1
        self.tally.late += late and self.world.size > halves
        self.watch.mark()
        return outputs[0]

    def _begin(self, module: torch.nn.Module, arguments: dict[str, Any]) -> tuple[Branch, int, bool, float | None]:
        """The branch that this call belongs to, the halves of its batch, whether it is late, and the step to it."""
        sample, now = arguments[self.family.sample], number(arguments["timestep"])
        run = self.run()
        if run is not self._run or now > self._time:
            self._reset()
            self.watch.new_run()
            self.tally, self._run = Tally(), run
            if sum(1 for _ in module.modules()) != self._modules:
                raise OptionError(
                    "modules of the denoiser changed since it was wrapped (a LoRA?): remove() and wrap again"
                )
        self.watch.agree(arguments, self.family.sample)
        self._ordinal = self._ordinal + 1 if now == self._time else 0
        self._time = now
        branch = self._branches.setdefault(self.context.name or str(self._ordinal), Branch())
        halves = self._halves(len(sample))
        self._split(sample, self.world.size // halves)  # may raise, before anything is sent
        signature = (halves, sample.shape, sample.dtype, *(shapes_of(arguments)))
        if signature != branch.signature or (branch.times and now >= branch.times[-1]):
            branch.drain()
            branch.signature, branch.times, branch.posts = signature, [], {}
        late = self.settings.mode != "sync" and len(branch.times) >= (self.settings.warmup or 0)
        branch.times.append(now)
        return branch, halves, late, step_ratio(branch.times) if self.settings.extrapolate else None

    def _halves(self, batch: int) -> int:
        even = batch % 2 == 0 and self.world.size % 2 == 0
        if self.settings.guidance == "split" and not even:
            raise OptionError(
                "guidance='split' gives each half of a batch to one half of the ranks, but there are "
                f"{self.world.size} ranks and a batch of {batch}; use guidance='patches' or 'auto' (is there no "
                "guidance, or each side of it in a call of its own?)"
            )
        return 2 if even and self.settings.guidance != "patches" else 1

    def _part(self, group: Group, arguments: dict[str, Any], branch: Branch, late: bool, step: float | None) -> Any:
        """One rank's share of a call; returns what the model returns, for the whole batch and image."""
        post = branch.posts.get(group.rank)
        if post is None:
            post = branch.posts[group.rank] = Post(self.world, group, 2 if self.settings.extrapolate else 1)
        post.done.clear()
        if self.tally.calls == 0:
            self.world.traffic.clear()
        call, mode = len(branch.times) - 1, self.settings.mode
        seat = None
        try:
            mine = halved(arguments, arguments[self.family.sample], group) if group.halves > 1 else arguments
            if group.patches > 1:
                split = self._split(mine[self.family.sample], group.patches)
                kinds = LATE[mode] if late else frozenset[str]()
                seat = Seat(post, split, call, kinds, LATE[mode], self.settings.ratio, self.settings.gn or "", step)
                seat.text_first = self.family.text_first
                mine = self._cut(mine, seat)
            self.seats.seat = seat
            output = self.fn_ref.original_forward(**mine)
            self.seats.seat = None
            if seat is not None and arguments.get("skip_layers") is None:
                self._engaged(post)
            return output if group.halves == 1 else joined(output, group, post, call)
        except BaseException as error:
            where = f"at or after {seat.where or 'the begin'}" if seat else "one patch a rank"
            self.world.abort(f"{line(error)} ({where}, call {call})")
            raise
        finally:
            self.seats.seat = None

    # ------------------------------------------------------------------ who computes what
    def _split(self, sample: torch.Tensor, ranks: int) -> Bands | Ranges:
        if self.family.rows:
            return Bands(sample.shape[-2], sample.shape[-1], self.layers.levels, ranks)
        if sample.ndim == 3:
            return Ranges(sample.shape[1], ranks)
        side = self.config.patch_size
        return Ranges((sample.shape[-2] // side) * (sample.shape[-1] // side), ranks)

    def _cut(self, arguments: dict[str, Any], seat: Seat) -> dict[str, Any]:
        if isinstance(seat.split, Ranges):
            begin, end = seat.split.range(seat.index)
            changes = {k: each(arguments.get(k), lambda x: x[..., begin:end, :]) for k in self.family.cut}
            return {k: changes.get(k, v) for k, v in arguments.items()}
        bands = seat.split
        seat.sample = arguments[self.family.sample]
        if self.config.get("center_input_sample"):
            seat.sample = 2 * seat.sample - 1.0

        def rows(x: torch.Tensor) -> torch.Tensor:
            level = bands.level_of(*x.shape[2:]) if x.ndim == 4 else None
            return x if level is None else x[:, :, slice(*bands.rows(seat.index, level))]

        return {k: each(v, rows) for k, v in arguments.items()}

    # ------------------------------------------------------------------ checks
    def _engaged(self, post: Post) -> None:
        """Every planned layer exchanged exactly once (the last one also its output)."""
        expected: dict[str, int] = {}
        for name in self.layers.asking():
            expected[name] = expected.get(name, 0) + 1
        wrong = [n for n, times in expected.items() if post.done[n] != times]
        if wrong:
            raise WorldError(
                f"{len(wrong)} of {len(expected)} layers did not exchange with other ranks as planned: "
                f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}. Their attention does not pass through "
                "torch's scaled_dot_product_attention exactly once: set the 'native' attention backend and the default "
                "attention processors, and take image prompts off"
            )

    def _reset(self) -> None:
        for branch in self._branches.values():
            branch.drain()
        self._branches = {}
        self._time, self._ordinal = -float("inf"), 0
