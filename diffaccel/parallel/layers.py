"""The layers that see more than their own rows or tokens, each of them made to ask the other ranks.

A layer publishes its own part for this call and receives: this call's parts (synchronous), or those of the call before
(displaced, DistriFusion arXiv:2402.19481). Who is sent what is all that tells DistriFusion from PCPP (arXiv:2412.02962)
and both from plain synchronous patches.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks import ModelHook
from torch.overrides import TorchFunctionMode

from ..errors import OptionError
from .mail import About, Mail, Shape
from .plan import Bands, Group, Ranges, halo, part
from .protocol import World, WorldError

Parts = list[torch.Tensor | None]


# ---------------------------------------------------------------------- what one rank keeps from call to call
@dataclass
class Post:
    """Messages of one rank in one branch of guidance: what is under way, and what was received last.

    Args:
        world: carries them.
        group: this rank and the others that share its image.
        remembers: how many receipts of attention are kept (2 where they are extrapolated).
    """

    world: World
    group: Group
    remembers: int = 1
    pending: dict[tuple[str, str], Mail] = field(default_factory=dict)
    received: dict[tuple[str, str], list[Parts]] = field(default_factory=dict)  # newest last
    own: dict[str, torch.Tensor] = field(default_factory=dict)  # statistics of this rank in the last call
    done: Counter[str] = field(default_factory=Counter)  # exchanges of each layer in this call

    def swap(
        self, about: About, parts: Parts, shapes: list[Shape | None], like: torch.Tensor, *, late: bool, keep: bool
    ) -> Parts:
        """Send `parts` to the ranks of the group, receive from them: this call's parts, or if `late` the last call's.

        Args:
            late: receive what was sent in the call before.
            keep: a later call may be late, so what is received now is needed then.
        """
        key = (about.kind, about.where)
        self.done[about.where] += 1
        mail = self.world.send(about, self._spread(parts), self._spread(shapes), like)
        before, history = self.pending.pop(key, None), self.received.setdefault(key, [])
        if before is not None:
            history.append(before.wait())
        if late:
            self.pending[key] = mail
        else:
            history.append(mail.wait())
        got = history[-1]
        del history[: -self.remembers if keep and (self.remembers > 1 or not late) else len(history)]
        return [got[r] for r in self.group.ranks()]

    def older(self, about: About) -> Parts | None:
        """What was received one call before the last receipt, and forget it; None if that is not known."""
        history = self.received[about.kind, about.where]
        older = history.pop(-2) if len(history) > 1 else None
        return None if older is None else [older[r] for r in self.group.ranks()]

    def drain(self) -> None:
        """Receive what is still under way, so that nothing of this run is met by the next one."""
        for mail in self.pending.values():
            mail.wait()
        self.pending.clear()

    def _spread(self, values: list[Any]) -> list[Any]:
        found: list[Any] = [None] * self.group.world
        for rank, value in zip(self.group.ranks(), values):
            found[rank] = value
        return found


@dataclass
class Seat:
    """What the layers of one rank see in one call.

    Attributes:
        post: of this rank and branch.
        split: who has which rows or tokens.
        call: number of the call in its branch.
        late: kinds of messages that are received one call late in this call.
        keeps: kinds that may be late in a later call.
        ratio: share of a patch that neighbours get in late calls (PCPP); None: everybody gets all.
        gn: "corrected" or "stale", for late statistics.
        step: ratio of the step to this call to the one before, by which late keys and values are extrapolated; or None.
        sample: the whole input of the first convolution.
        text_first: text tokens come before image tokens in joint attention.
        where: the layer that runs.
    """

    post: Post
    split: Bands | Ranges
    call: int
    late: frozenset[str]
    keeps: frozenset[str]
    ratio: float | None = None
    gn: str = "corrected"
    step: float | None = None
    sample: torch.Tensor | None = None
    text_first: bool = False
    where: str = ""

    @property
    def index(self) -> int:
        """Which patch this is."""
        return self.post.group.index

    @property
    def ranks(self) -> int:
        """How many patches there are."""
        return self.split.ranks

    def swap(self, kind: str, parts: Parts, shapes: list[Shape | None], like: torch.Tensor) -> Parts:
        """`Post.swap` with the lag of this call."""
        return self.post.swap(
            About(kind, self.where, self.call), parts, shapes, like, late=kind in self.late, keep=kind in self.keeps
        )

    def gather(self, x: torch.Tensor, dim: int, sizes: list[int]) -> torch.Tensor:
        """The whole of a tensor of which each rank has `sizes[rank]` along `dim`."""
        shapes: list[Shape | None] = [(*x.shape[:dim], n, *x.shape[dim + 1 :]) for n in sizes]
        parts: Parts = [x.contiguous()] * self.ranks
        shapes[self.index] = parts[self.index] = None
        found = self.swap("out", parts, shapes, x)
        return torch.cat([x if y is None else y for y in found], dim)


class Seats(threading.local):
    """The seat of the calling thread; None outside of a call that is shared."""

    seat: Seat | None = None


class LayerHook(ModelHook):
    """Base: does nothing where the call is not shared among ranks.

    Args:
        seats: of the model that the layer is in.
        name: of the layer.
    """

    def __init__(self, seats: Seats, name: str) -> None:
        super().__init__()
        self.seats, self.name = seats, name

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        seat = self.seats.seat
        if seat is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        seat.where = self.name
        return self.shared(seat, module, *args, **kwargs)

    def shared(self, seat: Seat, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer, on this rank's part of the image."""
        raise NotImplementedError


# ---------------------------------------------------------------------- convolution
class ConvHook(LayerHook):
    """A convolution over rows: asks the neighbours for the rows beyond the band's borders.

    Args:
        first: its input is the model's own, which every rank has whole.
        padded: its caller has added a row of zeros at the bottom (`Downsample2D` with padding 0).
    """

    def __init__(self, seats: Seats, name: str, *, first: bool = False, padded: bool = False) -> None:
        super().__init__(seats, name)
        self.first, self.padded = first, padded

    def shared(self, seat: Seat, module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        x: torch.Tensor = args[0]
        x = x[:, :, :-1] if self.padded else x
        padding = module.padding[0]
        top, bottom = halo(module.kernel_size[0], module.stride[0], padding, module.dilation[0])
        edges = self._cut(seat, top, bottom) if self.first else self._asked(seat, x, top, bottom)
        ends = padding, 1 if self.padded else padding  # rows of zeros at the image's own borders
        above, below = (_zeros(x, n) if e is None else e for e, n in zip(edges, ends))
        return F.conv2d(
            torch.cat((above, x, below), 2),
            module.weight,
            module.bias,
            module.stride,
            (0, module.padding[1]),
            module.dilation,
            module.groups,
        )

    @staticmethod
    def _asked(seat: Seat, x: torch.Tensor, top: int, bottom: int) -> Parts:
        parts: Parts = [None] * seat.ranks
        shapes: list[Shape | None] = [None] * seat.ranks
        up, down = seat.index - 1, seat.index + 1
        b, c, rows, w = x.shape
        if rows < max(top, bottom):
            raise OptionError(
                f"{seat.where} looks {max(top, bottom)} rows beyond a band that has {rows}; use fewer ranks"
            )
        if up >= 0:
            parts[up] = x[:, :, :bottom].contiguous() if bottom else None
            shapes[up] = (b, c, top, w) if top else None
        if down < seat.ranks:
            parts[down] = x[:, :, -top:].contiguous() if top else None
            shapes[down] = (b, c, bottom, w) if bottom else None
        got = seat.swap("conv", parts, shapes, x)
        # A border with a neighbour from which nothing is needed gets no row, not even zeros.
        above = None if up < 0 else got[up] if top else _zeros(x, 0)
        below = None if down == seat.ranks else got[down] if bottom else _zeros(x, 0)
        return [above, below]

    @staticmethod
    def _cut(seat: Seat, top: int, bottom: int) -> Parts:
        if seat.sample is None or not isinstance(seat.split, Bands):
            raise WorldError("the first convolution has no whole sample to cut from")  # a hook of ours is missing
        begin, end = seat.split.rows(seat.index)
        above = seat.sample[:, :, begin - top : begin] if seat.index > 0 else None
        below = seat.sample[:, :, end : end + bottom] if seat.index < seat.ranks - 1 else None
        return [above, below]


def _zeros(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x.new_zeros(x.shape[0], x.shape[1], rows, x.shape[3])


# ---------------------------------------------------------------------- group normalisation
class NormHook(LayerHook):
    """Group normalisation with the statistics of the whole image, (B, C, ...) of any rank 3 or more."""

    def shared(self, seat: Seat, module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        x: torch.Tensor = args[0]
        b, groups = x.shape[0], module.num_groups
        y = x.reshape(b, groups, -1).float()
        var, mean = torch.var_mean(y, 2, correction=0)
        mine = torch.stack((mean, var, torch.full_like(mean, y.shape[2])))  # (3, B, G)
        shape = tuple(mine.shape)
        parts: Parts = [None if r == seat.index else mine for r in range(seat.ranks)]
        shapes = [None if r == seat.index else shape for r in range(seat.ranks)]
        got = seat.swap("gn", parts, shapes, mine)
        others = [g for g in got if g is not None]
        if "gn" in seat.late and seat.gn == "corrected":
            mean, var = _corrected(mine, seat.post.own[self.name], others)
        else:
            mean, var = _merged([mine, *others])
        seat.post.own[self.name] = mine
        y = (y - mean[..., None]) * torch.rsqrt(var[..., None] + module.eps)
        y = y.reshape(x.shape)
        if module.weight is not None:
            ones = [1] * (x.ndim - 2)
            y = y * module.weight.view(1, -1, *ones) + module.bias.view(1, -1, *ones)
        return y.to(x.dtype)


def _merged(stats: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of the union of patches of given (mean, variance, count)."""
    mean, var, count = torch.stack(stats, 1)  # each (ranks, B, G)
    total = count.sum(0)
    m = (count * mean).sum(0) / total
    return m, (count * (var + (mean - m) ** 2)).sum(0) / total


def _corrected(mine: torch.Tensor, old: torch.Tensor, others: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """DistriFusion's: the whole image's old moments, moved as the own patch's moments have moved."""
    m_all, v_all = _merged([old, *others])
    m = m_all + (mine[0] - old[0])
    square = (v_all + m_all**2) + (mine[1] + mine[0] ** 2) - (old[1] + old[0] ** 2)
    v = square - m**2
    return m, torch.where(v < 0, mine[1], v)


# ---------------------------------------------------------------------- self-attention
class AttentionHook(LayerHook):
    """Self-attention (with text or without) whose keys and values are those of all ranks.

    They are taken where every processor ends: at `scaled_dot_product_attention`, normalised and rotated already.
    """

    def shared(self, seat: Seat, module: Any, *args: Any, **kwargs: Any) -> Any:
        with _Keys(seat, self.name):
            return self.fn_ref.original_forward(*args, **kwargs)


class _Keys(TorchFunctionMode):
    def __init__(self, seat: Seat, name: str) -> None:
        super().__init__()
        self.seat, self.name = seat, name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.seat.where = self.name  # a layer inside may have run since
        given = {**dict(zip(("query", "key", "value", "attn_mask"), args)), **kwargs}
        if given.get("attn_mask") is not None:
            raise OptionError(f"{self.seat.where}: attention masks cannot be shared among ranks yet")
        given["key"], given["value"] = everybodys(self.seat, given["key"], given["value"])
        return func(**given, **dict(zip(("dropout_p", "is_causal"), args[4:])))


def everybodys(seat: Seat, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Own keys and values (batch, heads, tokens, width), text included, and those that came from the other ranks."""
    counts = seat.split.tokens(seat.index, key.shape[2])
    n, length = counts[seat.index], key.shape[2]
    image = slice(length - n, length) if seat.text_first else slice(0, n)
    mine = torch.stack((key[:, :, image], value[:, :, image]))
    late = "attn" in seat.late
    theirs = [_sent(counts[q], q, seat.index, seat, late) for q in range(seat.ranks)]
    parts: Parts = [None] * seat.ranks
    shapes: list[Shape | None] = [None] * seat.ranks
    for q in range(seat.ranks):
        cut = _sent(n, seat.index, q, seat, late)
        if q != seat.index and cut is not None:
            parts[q] = mine[:, :, :, cut].contiguous()
        there = theirs[q]
        if q != seat.index and there is not None:
            shapes[q] = (*mine.shape[:3], len(range(counts[q])[there]), mine.shape[4])
    got = seat.swap("attn", parts, shapes, mine)
    if late and seat.step is not None:
        got = _extrapolated(seat, got)
    if late and seat.ratio is not None:  # after a synchronous call whole patches are there
        got = [_narrowed(x, counts[q], theirs[q]) for q, x in enumerate(got)]
    found = [x for x in got if x is not None]
    return torch.cat([key, *(x[0] for x in found)], 2), torch.cat([value, *(x[1] for x in found)], 2)


def _sent(tokens: int, source: int, to: int, seat: Seat, late: bool) -> slice | None:
    """Which of its tokens rank `source` sends to rank `to`: all, or (PCPP) those next to the common border."""
    if seat.ratio is None or not late:
        return slice(0, tokens)
    if abs(source - to) != 1:
        return None
    count = part(tokens, seat.ratio)
    return slice(tokens - count, tokens) if source < to else slice(0, count)


def _narrowed(x: torch.Tensor | None, tokens: int, wanted: slice | None) -> torch.Tensor | None:
    if x is None or wanted is None:
        return None
    return x[:, :, :, wanted] if x.shape[3] == tokens else x


def _extrapolated(seat: Seat, got: Parts) -> Parts:
    older = seat.post.older(About("attn", seat.where, seat.call))
    if older is None or seat.step is None:
        return got
    return [None if x is None or y is None else torch.lerp(y, x, 1 + seat.step) for x, y in zip(got, older)]


# ---------------------------------------------------------------------- where tokens are cut, and put together
class InletHook(LayerHook):
    """A module whose output is every token of the image: this rank goes on with its own."""

    def shared(self, seat: Seat, module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = self.fn_ref.original_forward(*args, **kwargs)
        if not isinstance(seat.split, Ranges) or x.shape[1] != seat.split.total:
            raise OptionError(f"{self.name} gives {x.shape[1]} tokens, which is not what the image was split by")
        begin, end = seat.split.range(seat.index)
        return x[:, begin:end]


class OutletHook(LayerHook):
    """The last module that works on a part: its output is gathered, rows (dim 2) or tokens (dim 1)."""

    def shared(self, seat: Seat, module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = self.fn_ref.original_forward(*args, **kwargs)
        seat.where = self.name
        split = seat.split
        if isinstance(split, Bands):
            return seat.gather(x, 2, [b - a for a, b in (split.rows(r) for r in range(split.ranks))])
        return seat.gather(x, 1, split.tokens(seat.index, x.shape[1]))
