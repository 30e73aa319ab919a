"""How the ranks that share an image work together."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OptionError, one_of

ATTENTION, ALL = frozenset({"attn"}), frozenset({"attn", "conv", "gn"})
# What is received one call late after the warm-up, and the synchronous calls before it.
LATE = {"sync": frozenset[str](), "fresh_halo": ATTENTION, "displaced": ALL, "partial": ALL}
WARMUP = {"sync": 0, "fresh_halo": 4, "displaced": 5, "partial": 5}
GUIDANCE = ("auto", "split", "patches")


@dataclass(frozen=True)
class Settings:
    """How ranks work together.

    Args:
        mode: "sync": as one device computes it. "fresh_halo": keys and values of other ranks are those of the call
            before, rows and statistics are fresh. "displaced" (DistriFusion): all of them are those of the call before.
            "partial" (PCPP): as "displaced", and only the neighbours' nearest keys and values.
        ratio: share of a neighbour's patch, in (0, 1]; "partial" only. Default 0.3.
        warmup: synchronous calls at the begin of a run. Default 4 for "fresh_halo", 5 for "displaced" and "partial"
            (which its authors call 4).
        extrapolate: continue the line through the last two keys and values; "fresh_halo" only. Default True.
        gn: late statistics are "corrected" by the change of one's own (DistriFusion's default) or "stale"; "displaced"
            and "partial" only.
        guidance: "split": one half of the ranks takes one half of the batch, which is one side of guidance; "patches":
            all ranks share every image; "auto": split wherever ranks and batch are even.

    Raises:
        OptionError: an option that is unknown, out of range, or without effect.
    """

    mode: str = "fresh_halo"
    ratio: float | None = None
    warmup: int | None = None
    extrapolate: bool | None = None
    gn: str | None = None
    guidance: str = "auto"

    def __post_init__(self) -> None:
        one_of("mode", self.mode, LATE)
        one_of("guidance", self.guidance, GUIDANCE)
        used = {
            "ratio": self.mode == "partial",
            "warmup": self.mode != "sync",
            "extrapolate": self.mode == "fresh_halo",
            "gn": "gn" in LATE[self.mode],
        }
        for name, fits in used.items():
            if getattr(self, name) is not None and not fits:
                raise OptionError(f"{name} has no effect with mode={self.mode!r}")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise OptionError(f"ratio is a share of a neighbour's patch, in (0, 1]; got {self.ratio}")
        if self.warmup is not None and self.warmup < 1:
            raise OptionError(f"warmup must be 1 or more (the first call has nothing to go by), got {self.warmup}")
        if self.gn is not None:
            one_of("gn", self.gn, ("corrected", "stale"))
        defaults = {"ratio": 0.3, "warmup": WARMUP[self.mode], "extrapolate": True, "gn": "corrected"}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value if used[name] else None)
