"""`Cache`: which steps run the denoiser in full, what is kept of them, and how it is carried to the others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..artifact import Artifact
from ..errors import ArtifactError, OptionError, one_of

LEVELS = ("stack", "sublayer", "deep")
VARIABLES = ("step", "lam")
CFG = ("joint", "separate")
HIGHEST = 3  # order of a forecast; weights grow like (gap/spacing)**order


def letters(full: Iterable[object]) -> str:
    """Decisions as reports and artifacts have them: `F..F` for (1, 0, 0, 1)."""
    return "".join("F" if yes else "." for yes in full)


@dataclass(frozen=True)
class Cache:
    """Settings of a denoiser cache; made by `every`, `mask`, `learned` or `first_block`.

    Attributes:
        kind: "every", "mask", "learned" or "first_block".
        forecast: order of the polynomial through the last full values; 0: reuse of the last one.
        level: what is kept: "stack" (residual of all transformer blocks after the first), "sublayer" (the output of
            each attention and feed-forward), "deep" (UNets: all between `down_blocks[0]` and `up_blocks[-1]`); None:
            "deep" for UNets, else "stack".
        variable: of the polynomial: "step", or "lam" (half log-SNR).
        interval, warmup, tail: of `every`.
        rows: of `mask` and `learned`: 1 where the step is full.
        threshold, max_run, accumulate, cfg: of `first_block`.
        artifact: of `learned`.
    """

    kind: str
    forecast: int = 1
    level: str | None = None
    variable: str = "step"
    interval: int = 0
    warmup: int = 0
    tail: int = 0
    rows: tuple[int, ...] = ()
    threshold: float = 0.0
    max_run: int = 0
    accumulate: bool = True
    cfg: str = "joint"
    artifact: Artifact | None = None

    def __post_init__(self) -> None:
        _whole("forecast", self.forecast, 0)
        if self.forecast > HIGHEST:
            raise OptionError(f"forecast={self.forecast}: orders up to {HIGHEST} are offered; order 1 is the default")
        if self.level is not None:
            one_of("level", self.level, LEVELS)
        one_of("variable", self.variable, VARIABLES)
        if self.variable == "lam" and self.forecast == 0:
            raise OptionError("variable='lam' has no effect at forecast=0, which reuses the last value")

    # ------------------------------------------------------------------ policies
    @classmethod
    def every(cls, n: int, warmup: int = 3, tail: int = 1, **how: Any) -> Cache:
        """Full at steps `i < warmup`, `(i - warmup) % n == 0` and `i >= N - tail` (FORA, arXiv:2407.01425).

        Args:
            n: interval between full steps, >= 1 (1: every step is full).
            warmup, tail: full steps at both ends.
            how: `forecast`, `level`, `variable`.

        Raises:
            OptionError: an option out of range, or unknown.
        """
        how = _shared("Cache.every", how)
        return cls("every", interval=_whole("interval n", n, 1), warmup=_whole("warmup", warmup, 0),
                   tail=_whole("tail", tail, 0), **how)  # fmt: skip

    @classmethod
    def mask(cls, rows: Sequence[int], **how: Any) -> Cache:
        """Explicit steps: one 0 or 1 each, 1 for full; the first must be 1.

        Args:
            rows: N values; the run must have N steps.
            how: `forecast`, `level`, `variable`.

        Raises:
            OptionError: no 0/1 list, or one that begins with 0.
        """
        return cls("mask", rows=_mask(rows), **_shared("Cache.mask", how))

    @classmethod
    def learned(
        cls, artifact: Artifact | str | os.PathLike[str], full: int | None = None, *, force: bool = False
    ) -> Cache:
        """A mask that `diffaccel.calibrate.cache` found on this checkpoint, with the settings it was found with.

        Args:
            artifact: or its file.
            full: number of full steps, where masks were learned for several; None: the best of them.
            force: use it although its receipt says that no benefit was found.

        Raises:
            ArtifactError: no artifact of kind "cache", one without such a mask, or one without benefit.
        """
        found = artifact.of_kind("cache") if isinstance(artifact, Artifact) else Artifact.load(artifact, "cache")
        learned = {run["full"]: run for run in found.meta.get("runs", []) if run["learned"]}
        if not learned or (full is not None and full not in learned):
            wanted = "no learned mask" if full is None else f"no learned mask of {full} full steps"
            raise ArtifactError(f"{found.file} holds {wanted}; it holds those of {sorted(learned) or 'none'}")
        chosen = found.meta if full is None else learned[full]
        if not chosen["benefit"] and not force:
            raise ArtifactError(
                f"{found.file} says 'no benefit found': its mask did not beat plain runs of equal cost. Use "
                "fewer steps without a cache, or force=True to run it anyway"
            )
        made = cls.from_dict(chosen["cache"])
        return replace(made, kind="learned", rows=_mask(chosen["mask"]), artifact=found)

    @classmethod
    def first_block(
        cls, threshold: float | None = None, max_run: int = 3, accumulate: bool = True, cfg: str = "joint", **how: Any
    ) -> Cache:
        """Each row decides by how much the first block's residual f changed (as First Block Cache, but per row).

        `d = mean|f - f_before| / mean|f_before|` over the row's tokens. A step is reused while d stays below the
        threshold. (A UNet's first block is `down_blocks[0]`, and f is its output.)

        Args:
            threshold: in (0, 1). There is no default: a value that suits one model and step count reuses nothing, or
                everything, on another. `handle.report()` of a run shows the quantiles of d.
            max_run: steps in a row that may be reused.
            accumulate: sum d from step to step since the last full one; False: d is against the last full step.
            cfg: "joint": both guidance branches of an image are full where one of them asks for it (where they are
                called one after the other: where the first does); "separate": each by itself.
            how: `forecast`, `level`, `variable`.

        Raises:
            OptionError: an option out of range, or no threshold.
        """
        if threshold is None:
            raise OptionError(
                "first_block needs threshold=: no value suits all models. Run once with a small one (0.05) and read "
                "the quantiles of d in report()"
            )
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not number or not 0 < threshold < 1:
            raise OptionError(f"threshold={threshold!r} must lie between 0 and 1: it bounds a relative change")
        return cls("first_block", threshold=float(threshold), max_run=_whole("max_run", max_run, 1),
                   accumulate=bool(accumulate), cfg=one_of("cfg", cfg, CFG),
                   **_shared("Cache.first_block", how))  # fmt: skip

    # ------------------------------------------------------------------ what a run asks
    @property
    def static(self) -> bool:
        """Whether the steps are known before the run."""
        return self.kind != "first_block"

    def full_steps(self, steps: int) -> tuple[bool, ...]:
        """Which of N steps are full, for policies that are known before the run.

        Raises:
            OptionError: a mask of another length, or a forecast of an order that no reused step can have.
        """
        if self.kind == "every":
            i, n, w = range(steps), self.interval, self.warmup
            found = tuple(k < max(w, 1) or (k >= w and (k - w) % n == 0) or k >= steps - self.tail for k in i)
        else:
            found = tuple(bool(r) for r in self.rows)
        if len(found) != steps:
            raise OptionError(f"the mask of {self.name} has {len(found)} steps, the run has {steps}")
        most = max((sum(found[:k]) for k, full in enumerate(found) if not full), default=self.forecast + 1)
        if self.forecast > most - 1:
            raise OptionError(
                f"forecast={self.forecast} goes through {self.forecast + 1} full values, but at most {most} lie before "
                f"a reused step of {self.name} over {steps} steps; lower it, or make more steps full"
            )
        return found

    @property
    def name(self) -> str:
        """Short text for reports."""
        if self.kind == "every":
            return f"every({self.interval}, warmup={self.warmup}, tail={self.tail})"
        if self.kind == "first_block":
            return f"first_block({self.threshold:g}, max_run={self.max_run})"
        return f"{self.kind}({letters(self.rows)})"

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the artifact of `learned` is not among them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items() if k != "artifact"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cache:
        """The inverse of `to_dict`."""
        return cls(**{**values, "rows": tuple(values.get("rows", ()))})


def _shared(where: str, how: dict[str, Any]) -> dict[str, Any]:
    for name in how:
        one_of(f"option of {where}", name, ("forecast", "level", "variable"))
    return how


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name}={value!r} must be a whole number, at least {least}")
    return value


def _mask(rows: Sequence[int]) -> tuple[int, ...]:
    given = list(rows) if isinstance(rows, Iterable) else []
    found = tuple(int(r) for r in given if r in (0, 1))
    if len(found) != len(given) or not found:
        raise OptionError(f"a mask is a list of 0 and 1, one for each step; not {rows!r}")
    if not found[0]:
        raise OptionError("mask[0] is 0, but there is nothing to reuse at the first step: it must be 1")
    return found
