"""The hooks on the parts of a denoiser: run, left out, or run on some rows of the batch.

A part is called with all rows and returns all rows, whatever it does: the model's code between parts never sees another
batch. The hooks stay outside of compiled code; `compile` compiles what they call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import ModelHook

from ..errors import OptionError, RunError
from .cache_frame import Current, Frame, tensors_in, with_tensors
from .cache_layout import Streams
from .contract import Arguments
from .rows import COMMON, taken


class Part(ModelHook):
    """Base: finds the frame of the call; without one the module is as it was.

    Args:
        current: gives the frame.
        name: of the module in the denoiser.
    """

    def __init__(self, current: Current, name: str) -> None:
        super().__init__()
        self.current, self.name = current, name
        self.body: Callable[..., Any] | None = None  # the module's own forward, compiled

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self.arguments = Arguments(module)
        return module

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        frame = self.current.frame
        if frame is None:
            return self.run(*args, **kwargs)
        frame.fired.add(self.name)
        return self.act(frame, args, kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module itself."""
        return (self.body or self.fn_ref.original_forward)(*args, **kwargs)

    def act(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is returned in place of the module's output."""
        raise NotImplementedError

    def __deepcopy__(self, memo: Any) -> Any:
        raise OptionError(
            "a denoiser with a cache was copied; the copy would run the weights of the original. Take the cache off "
            "first (remove()), copy, and put it on the copy"
        )


class Head(Part):
    """The part that always runs: shows where rows changed little (and where the stack begins)."""

    def __init__(self, current: Current, name: str, block: torch.nn.Module, unet: bool) -> None:
        super().__init__(current, name)
        self.streams = None if unet else Streams(block)

    def act(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = self.run(*args, **kwargs)
        if self.streams is None:
            value = tensors_in(output)[0].clone()  # it is kept, and models change tensors in place
        else:
            frame.head = self.streams.returned(output, self.name)
            first, hidden = self.streams.given(self.arguments.bind(args, kwargs))[0], frame.head[0]
            assert first is not None and hidden is not None
            frame.latest = value = hidden
            value = value - first if first.shape == value.shape else value
        if frame.decide is not None and frame.forced is None:
            start = frame.watch.now()
            frame.set_full(frame.decide(value.detach()))
            frame.watch.spans.append((start, frame.watch.now()))
        return output


class Member(Part):
    """A part that is left out where its rows are reused.

    Args:
        section: number of the section that it belongs to.
        last: whether it closes the section: what it returns is kept, and filled in where rows were left out.
    """

    def __init__(self, current: Current, name: str, section: int, last: bool) -> None:
        super().__init__(current, name)
        self.section, self.last = section, last

    def act(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if frame.full is None:
            output = self.run(*args, **kwargs)
            self.enter(frame, self.arguments.bind(args, kwargs))
            self.learn(frame, output)
        else:
            bound = self.arguments.bind(args, kwargs)
            self.enter(frame, bound)
            output = self.left_out(frame, bound)
            if frame.full:
                output = self.on_rows(frame, bound, output)
        if self.last:
            start = frame.watch.now()
            output = self.close(frame, output)
            frame.watch.spans.append((start, frame.watch.now()))
        return self.leave(frame, output)

    def on_rows(self, frame: Frame, bound: dict[str, Any], output: Any) -> Any:
        """The module on the full rows alone, put into `output`."""
        rows = frame.full
        assert rows is not None
        lead = tensors_in(list(bound.values()))[0]
        if len(lead) != frame.rows:
            raise RunError(f"{self.name} is called with {len(lead)} rows, the model with {frame.rows}")
        pick = torch.tensor(rows, device=lead.device)
        part = self.run(**{n: v if _common(n, v) else taken(v, pick, rows, frame.rows) for n, v in bound.items()})
        merged = [a.index_copy(0, pick, b) for a, b in zip(tensors_in(output), tensors_in(part), strict=True)]
        return with_tensors(output, merged)

    # ------------------------------------------------------------------ what levels differ in
    def enter(self, frame: Frame, bound: dict[str, Any]) -> None:
        """Look at the arguments."""

    def leave(self, frame: Frame, output: Any) -> Any:
        """Look at the output."""
        return output

    def learn(self, frame: Frame, output: Any) -> None:
        """Remember the form of a full output."""
        found = tensors_in(output)
        if len(found[0]) != frame.rows:
            raise RunError(f"{self.name} returns {len(found[0])} rows, the model was called with {frame.rows}")
        frame.forms[self.name] = with_tensors(output, [t.new_zeros(()).expand(1, *t.shape[1:]) for t in found])

    def left_out(self, frame: Frame, bound: dict[str, Any]) -> Any:
        """All rows of an output that nothing reads: zeros that take no memory."""
        form = frame.forms.get(self.name)
        if form is None:
            raise RunError(f"{self.name} was never run in full, so nothing can take its place")
        return with_tensors(form, [t.expand(frame.rows, *t.shape[1:]) for t in tensors_in(form)])

    def close(self, frame: Frame, output: Any) -> Any:
        """Keep what the full rows gave, and fill in the others."""
        tensors = tensors_in(output)
        if frame.full is None or frame.full:
            rows = [_rows(t, frame.full) for t in tensors]
            # a copy: models change tensors in place (FreeU)
            frame.keep(self.section, [t.clone() if frame.full is None else t for t in rows], self.name)
        if frame.full is None:
            return output
        return with_tensors(output, _filled(tensors, frame.carried(self.section), frame.reused))


class Block(Member):
    """A transformer block after the first: rows that are left out pass through; the residual of all is kept."""

    def __init__(self, current: Current, name: str, section: int, last: bool, block: torch.nn.Module) -> None:
        super().__init__(current, name, section, last)
        self.streams = Streams(block)
        self.as_tuple = False
        self.no_text = False  # the last block of some models returns None for the text

    def enter(self, frame: Frame, bound: dict[str, Any]) -> None:
        if self.streams.given(bound)[0] is not frame.latest:
            raise OptionError(
                f"the model changes its hidden states between {self.name} and the block before it (ControlNet, skip "
                "connections), which a residual of the whole stack does not see; use level='sublayer'"
            )

    def learn(self, frame: Frame, output: Any) -> None:
        self.as_tuple = isinstance(output, tuple)
        self.no_text = self.streams.text_at is not None and self.streams.returned(output, self.name)[1] is None

    def left_out(self, frame: Frame, bound: dict[str, Any]) -> Any:
        hidden, text = self.streams.given(bound)
        return self.streams.form(hidden, None if self.no_text else text, self.as_tuple)

    def leave(self, frame: Frame, output: Any) -> Any:
        frame.latest = self.streams.returned(output, self.name)[0]
        return output

    def close(self, frame: Frame, output: Any) -> Any:
        ends = self.streams.returned(output, self.name)
        pairs = [(e, h) for e, h in zip(ends, frame.head, strict=True) if e is not None and h is not None]
        if any(e.shape != h.shape for e, h in pairs):
            raise OptionError(
                f"the hidden states have the shape {tuple(pairs[0][1].shape)} after the first block and "
                f"{tuple(pairs[0][0].shape)} after {self.name}; use level='sublayer'"
            )
        if frame.full is None or frame.full:
            frame.keep(self.section, [_rows(e, frame.full) - _rows(h, frame.full) for e, h in pairs], self.name)
        if frame.full is None:
            return output
        rows = frame.reused
        new = [_rows(h, rows) + v for (_, h), v in zip(pairs, frame.carried(self.section), strict=True)]
        filled = _filled([e for e, _ in pairs], new, rows)
        return self.streams.form(filled[0], filled[1] if len(filled) > 1 else None, self.as_tuple)


def _rows(value: torch.Tensor, rows: list[int] | None) -> torch.Tensor:
    return value if rows is None else value.index_select(0, torch.tensor(rows, device=value.device))


def _filled(values: list[torch.Tensor], new: list[torch.Tensor], rows: list[int] | None) -> list[torch.Tensor]:
    if rows is None:
        return new
    return [v.index_copy(0, torch.tensor(rows, device=v.device), n) for v, n in zip(values, new, strict=True)]


def _common(name: str, value: Any) -> bool:
    """Positions are common to all rows, although a batch may happen to be as long as they are."""
    return name in COMMON and all(t.ndim < 3 for t in tensors_in(value))
