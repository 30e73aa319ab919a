"""What `bottleneck` measures in a run."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.stages import Size
from ..schedulers.staged_run import Switch


@dataclass(frozen=True)
class StageReport:
    """One stage as it ran: size of its latents, calls, flow times from start to end, seconds, FLOPs of one call."""

    size: Size
    calls: int
    times: tuple[float, ...]
    sigmas: tuple[float, ...]
    seconds: float
    flops: float | None


@dataclass(frozen=True)
class StagedReport:
    """What was measured in a run.

    Args:
        stages, switches: in order.
        fill, history: of the transitions.
        step_equivalents: work in calls at full size, `sum n_k F_k / F_full`, F counted by `torch.utils.flop_counter`;
            None where it could not be counted (a compiled module).
        plain_calls: the plain run of equal work, which every comparison should stand beside.
        rewritten: denoiser calls whose size arguments were rewritten.
        stored: bytes of latents kept for the transitions.
        seeds: of the images' transition noise.
        complete: whether the run reached its last call.
    """

    stages: tuple[StageReport, ...]
    switches: tuple[Switch, ...]
    fill: str
    step_equivalents: float | None
    plain_calls: int | None
    rewritten: int
    stored: int
    seeds: tuple[int, ...]
    complete: bool

    @property
    def calls(self) -> int:
        """Model calls."""
        return sum(s.calls for s in self.stages)

    def __str__(self) -> str:
        lines = []
        for k, s in enumerate(self.stages):
            cost = "" if s.flops is None else f", {s.flops / 1e9:.3g} GFLOP a call"
            lines.append(
                f"stage {k}: {s.size[0]}x{s.size[1]}, {s.calls} calls, flow time {s.times[0]:.3f} to "
                f"{s.times[-1]:.3f}, {s.seconds:.3f} s{cost}"
            )
            if k < len(self.switches):
                lines.append(_line(self.switches[k]))
        if self.step_equivalents is not None:
            lines.append(
                f"work: {self.step_equivalents:.2f} calls at full size for {self.calls} calls; compare with a plain "
                f"run of {self.plain_calls}"
            )
        return "\n".join(lines if self.complete else [*lines, "INCOMPLETE: the run was cut short"])


def _line(s: Switch) -> str:
    what = f"  {s.kind}, r = {s.r:.3f}, rho {s.rho:.4g} -> {s.rho_after:.4g}"
    fill = "" if s.fill is None else f", new band {s.fill}{' (fresh noise)' if s.drew else ''}"
    lost = "" if s.missing is None else f", predicted missing power {s.missing:.2%}, W2^2 {s.w2:.3g} an element"
    return f"{what}{fill}{lost}, {1e3 * s.seconds:.1f} ms"
