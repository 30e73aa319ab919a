"""Variance compensation: a per-channel affine map of the state after each step (Q&C, arXiv:2503.02508, VC).

After step i: `x <- mu_ref[i] + K[i] (x - mu_acc[i])`. The three are fitted on runs of the same noise with and without
acceleration, one step after the other: row i on a trajectory that rows 0..i-1 corrected already. Fitted all at once on
the uncorrected trajectory, the rows multiply each other's corrections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import ArtifactError, OptionError, RunError, one_of

KINDS = ("std", "ls", "tac")
FEWEST = 8  # images of a fit
Total = Callable[[torch.Tensor], torch.Tensor]  # the sum of a tensor over all processes
GAIN, PRODUCT = (0.8, 1.25), (0.5, 2.0)  # beyond these a fit is not a correction but an artefact


def alone(share: torch.Tensor) -> torch.Tensor:
    """`Total` of one process."""
    return share


def channel_axis(x: torch.Tensor) -> int:
    """The axis of the channels: the last of tokens (B, tokens, C), else the second."""
    return -1 if x.ndim == 3 else 1


@dataclass(frozen=True, eq=False)
class Compensation:
    """The map of each step.

    Args:
        mu_ref, mu_acc, gain: (N, C) each.
        axis: of the channels in a state; None: `channel_axis`.

    Raises:
        ArtifactError: arrays that do not belong together or are not finite; a gain outside [0.8, 1.25], or a product
            of a channel's gains outside [0.5, 2].
    """

    mu_ref: np.ndarray
    mu_acc: np.ndarray
    gain: np.ndarray
    axis: int | None = None

    def __post_init__(self) -> None:
        shapes = {np.shape(v) for v in (self.mu_ref, self.mu_acc, self.gain)}
        if len(shapes) != 1 or np.ndim(self.gain) != 2:
            raise ArtifactError(f"a compensation is three arrays (steps, channels), got shapes {sorted(shapes)}")
        if not all(np.isfinite(v).all() for v in (self.mu_ref, self.mu_acc, self.gain)):
            raise ArtifactError("a compensation holds values that are not finite; fit it again")
        (low, high), (least, most) = self.range, self.product_range
        if low < GAIN[0] or high > GAIN[1] or least < PRODUCT[0] or most > PRODUCT[1]:
            raise ArtifactError(
                f"the gains of this compensation lie in [{low:.3g}, {high:.3g}], their products in [{least:.3g}, "
                f"{most:.3g}]; beyond {list(GAIN)} and {list(PRODUCT)} it is no correction. Fit it on more images, or "
                "with fewer reused steps"
            )

    def __len__(self) -> int:
        return len(self.gain)

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest gain."""
        return float(np.min(self.gain, initial=1.0)), float(np.max(self.gain, initial=1.0))

    @property
    def product_range(self) -> tuple[float, float]:
        """Smallest and largest product of a channel's gains."""
        products = np.prod(self.gain, axis=0)
        return float(products.min(initial=1.0)), float(products.max(initial=1.0))

    def apply(self, step: int, x: torch.Tensor) -> torch.Tensor:
        """The state after step `step`, corrected; the same tensor where the row changes nothing.

        Args:
            step: 0..N-1.
            x: (B, ...) of any float dtype; computed in float32, or float64 for float64.

        Raises:
            RunError: a step or a number of channels that the compensation was not fitted for.
        """
        axis = channel_axis(x) if self.axis is None else self.axis
        if not 0 <= step < len(self) or x.shape[axis] != self.gain.shape[1]:
            raise RunError(
                f"the compensation was fitted for {len(self)} steps of {self.gain.shape[1]} channels; this is step "
                f"{step} of a state {tuple(x.shape)}"
            )
        if np.array_equal(self.mu_ref[step], self.mu_acc[step]) and np.all(self.gain[step] == 1):
            return x
        return _mapped(x, axis, self.mu_ref[step], self.mu_acc[step], self.gain[step])

    def tensors(self) -> dict[str, np.ndarray]:
        """For an artifact."""
        return {"mu_ref": self.mu_ref, "mu_acc": self.mu_acc, "gain": self.gain}


class Fit:
    """Fits a compensation while the accelerated pipeline runs: call `correct` after each step, in order.

        fit = Fit(reference)                      # states after each step of the full run
        for i in range(N): x = fit.correct(i, step(x))
        compensation = fit.done()

    Args:
        reference: (N, B, ...) states after each step of the unaccelerated run of the same noise, all images of the fit
            (of this process).
        kind: "std": ratio of the standard deviations; "ls": least squares; "tac": least squares with the weights
            `1/max(e^2, v/100) + 1/v` of the reference's deviation e and variance v, which favour values near the mean.
        axis: of the channels; None: `channel_axis`.
        shift: correct the mean too; False keeps the accelerated run's.
        total: sums over the processes that share the images; they call `correct` at the same steps.

    Raises:
        OptionError: an unknown kind, or fewer than 8 images.
    """

    def __init__(
        self,
        reference: torch.Tensor,
        kind: str = "std",
        *,
        axis: int | None = None,
        shift: bool = True,
        total: Total = alone,
    ) -> None:
        self.kind, self.reference, self.shift = one_of("compensation", kind, KINDS), reference, shift
        self.total = total
        if reference.ndim < 3 or int(total(torch.tensor([float(reference.shape[1])]))) < FEWEST:
            raise OptionError(
                f"a compensation is fitted on {FEWEST} images or more, the states of the reference have the shape "
                f"{tuple(reference.shape)} (steps, images, ...)"
            )
        self.axis = channel_axis(reference[0]) if axis is None else axis
        self._rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def correct(self, step: int, x: torch.Tensor) -> torch.Tensor:
        """Fit the row of this step on the accelerated states x (B, ...) and return them corrected.

        Raises:
            RunError: out of order, or other images than the reference's.
        """
        if step != len(self._rows) or step >= len(self.reference) or x.shape != self.reference.shape[1:]:
            raise RunError(
                f"a compensation is fitted step by step on all images at once: this is step {step} of states "
                f"{tuple(x.shape)}, due is step {len(self._rows)} of {len(self.reference)} with states "
                f"{tuple(self.reference.shape[1:])}"
            )
        row = fit_row(self.reference[step], x, self.kind, self.axis, self.shift, self.total)
        self._rows.append(row)
        return _mapped(x, self.axis, *row)

    def done(self) -> Compensation:
        """The fitted rows.

        Raises:
            RunError: if the run did not end.
            ArtifactError: if the gains are no correction, see `Compensation`.
        """
        if len(self._rows) != len(self.reference):
            raise RunError(f"{len(self._rows)} of {len(self.reference)} steps were fitted; did the run stop early?")
        mu_ref, mu_acc, gain = (np.stack(part) for part in zip(*self._rows))
        return Compensation(mu_ref, mu_acc, gain, self.axis)


def fit_row(
    reference: torch.Tensor,
    accelerated: torch.Tensor,
    kind: str = "std",
    axis: int | None = None,
    shift: bool = True,
    total: Total = alone,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mu_ref, mu_acc, K), (C,) float64 each, of one step; means and variances are over images and positions (ddof 0).

    Args:
        reference, accelerated: (B, ...) states of the same images.
        total: see `Fit`.
    """
    axis = channel_axis(reference) if axis is None else axis
    ref, acc = (v.detach().double().movedim(axis, 0).flatten(1) for v in (reference, accelerated))
    count, *sums = total(torch.stack([torch.full_like(ref[:, 0], ref.shape[1]), ref.sum(1), acc.sum(1)]))
    mu_ref, mu_acc = (s / count for s in sums)
    e_ref, e_acc = ref - mu_ref[:, None], acc - mu_acc[:, None]
    parts = torch.stack([e_ref.square().sum(1), e_acc.square().sum(1), (e_ref * e_acc).sum(1)])
    v_ref, v_acc, both = (s / count for s in total(parts))
    if kind == "std":
        gain = (v_ref / v_acc).sqrt()
    elif kind == "ls":
        gain = both / v_acc
    else:
        v = v_ref[:, None]
        weight = 1 / torch.maximum(e_ref.square(), 0.01 * v) + 1 / v
        above, below = total(torch.stack([(weight * e_ref * e_acc).sum(1), (weight * e_acc.square()).sum(1)]))
        gain = above / below
    gain = torch.where((v_ref > 0) & (v_acc > 0), gain, torch.ones_like(gain))  # a constant channel has no gain
    row = (mu_ref if shift else mu_acc, mu_acc, gain)
    return tuple(part.cpu().numpy() for part in row)  # type: ignore[return-value]


def _mapped(x: torch.Tensor, axis: int, mu_ref: np.ndarray, mu_acc: np.ndarray, gain: np.ndarray) -> torch.Tensor:
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    shape = [1] * x.ndim
    shape[axis] = -1
    ref, acc, k = (torch.tensor(v, dtype=dtype, device=x.device).reshape(shape) for v in (mu_ref, mu_acc, gain))
    return (ref + k * (x.to(dtype) - acc)).to(x.dtype)
