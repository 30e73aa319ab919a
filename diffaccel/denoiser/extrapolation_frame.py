"""Where the steps of a run lie, and what is extrapolated there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..core.extrapolation import Predictor
from ..core.node import Node
from ..core.prediction import Output, pair
from ..core.trace import first_order
from ..errors import OptionError
from .clock import Levels, Run, levels_of
from .extrapolation_report import Report
from .extrapolation_settings import Settings


def matching(sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
    """The state in what the model was fed, of the shape of its output; None where there is no such part.

    Inpainting models are fed further channels behind those of the state.
    """
    if sample.shape == output.shape:
        return sample
    if sample.ndim == output.ndim > 2 and sample.shape[1] > output.shape[1]:
        part = sample[:, : output.shape[1]]
        return part if part.shape == output.shape else None
    return None


@dataclass
class Frame:
    """The coordinate and the quantity of a run.

    Attributes:
        coordinate: "index", "sigma" or "lam".
        predictor: None where the model's output itself is extrapolated.
        levels: noise levels; None where they are not known.
    """

    coordinate: str
    predictor: Predictor | None
    levels: Levels | None

    @classmethod
    def of(cls, run: Run, settings: Settings, report: Report) -> Frame:
        """The frame of a run.

        Raises:
            OptionError: if an option needs noise levels that are not known.
        """
        levels = levels_of(run.scheduler)
        needs = [f"quantity={settings.quantity!r}"] if settings.quantity != "output" else []
        needs += [f"coordinate={settings.coordinate!r}"] if settings.coordinate in ("sigma", "lam") else []
        needs += ["gradient=True"] if settings.gradient else []
        if levels is None and needs:
            raise OptionError(
                f"{needs[0]} needs the noise levels of the run, which the config of {type(run.scheduler).__name__} "
                "does not prove; use coordinate='index' and quantity='output'"
            )
        if levels is not None and run.form in ("1 - t/T", "T - t"):
            if settings.quantity != "output" or settings.gradient:
                raise OptionError(
                    f"{needs[0]}: this pipeline feeds the model a reversed time ({run.form}), so its output need not "
                    "be what the scheduler's config says; use quantity='output'"
                )
            levels = None
        if levels is None:
            report.note("the noise levels are not known: index weights, and a gate relative to the model's output")
        coordinate = settings.coordinate or ("index" if levels is None else "sigma")
        if settings.quantity == "output":
            return cls(coordinate, None, levels)
        return cls(coordinate, Predictor(settings.history, settings.quantity, coordinate), levels)

    # ------------------------------------------------------------------ places
    def _at(self, step: int) -> tuple[Levels, Node]:
        assert self.levels is not None
        return self.levels, self.levels.nodes[step]

    def __post_init__(self) -> None:
        nodes = self.levels.nodes[:-1] if self.levels is not None else ()
        self._places = [self._place(node) for node in nodes]
        self._usable = [self._takes_part(node, place) for node, place in zip(nodes, self._places, strict=True)]

    def _place(self, node: Node) -> float:
        assert self.levels is not None
        return Predictor(coordinate=self.coordinate).position(node, self.levels.path)

    def _takes_part(self, node: Node, place: float) -> bool:
        if self.predictor is not None and self.levels is not None:
            return self.predictor.usable(node, self.levels.path)
        return self.coordinate == "index" or math.isfinite(place)

    def position(self, step: int) -> float:
        """Where a step lies in the coordinate."""
        return self._places[step] if self._places and self.coordinate != "index" else float(step)

    def usable(self, step: int) -> bool:
        """Whether an answer there can take part in an extrapolation."""
        return self._usable[step] if self._usable else True

    def first_order(self, step: int) -> tuple[float, float] | None:
        """(a, b) of the first-order step in the extrapolated quantity: `x_next = a x + b q`."""
        if self.levels is None:
            return None
        levels, node = self._at(step)
        a, b = first_order(node, levels.nodes[step + 1])
        if self.predictor is None:
            u, w = pair(levels.output, "x0", node)
            scale = 1.0
        else:
            u, w = pair(Output(self.predictor.space(levels.path)), "x0", node)
            scale = 1.0 / self.predictor.factor(node, levels.path)
        return float(a + b * u), float(b * w * scale)

    def unscale(self, step: int) -> float:
        """What the model's input is multiplied by to be the state."""
        return 1.0 if self.levels is None else 1.0 / self.levels.fed(step)

    # ------------------------------------------------------------------ quantities
    def _pair(self, step: int) -> tuple[float, float]:
        """(u, w) of the extrapolated quantity: `q = u x + w output`."""
        levels, node = self._at(step)
        assert self.predictor is not None
        u, w = pair(levels.output, self.predictor.space(levels.path), node)
        f = self.predictor.factor(node, levels.path)
        return float(u) * f, float(w) * f

    def _state(self, x: torch.Tensor, like: torch.Tensor, step: int) -> torch.Tensor:
        part = matching(x, like)
        if part is None:
            raise OptionError(
                f"the model's output {tuple(like.shape)} has another shape than the state {tuple(x.shape)} that it is "
                "fed, so it cannot be converted; use quantity='output' without gradient"
            )
        return part.to(like.dtype) * self.unscale(step)

    def quantity(self, output: torch.Tensor, x: torch.Tensor, step: int) -> torch.Tensor:
        """What is extrapolated, from the model's output."""
        if self.predictor is None:
            return output
        u, w = self._pair(step)
        return w * output + u * self._state(x, output, step) if u else w * output

    def output(self, quantity: torch.Tensor, x: torch.Tensor, step: int) -> torch.Tensor:
        """The model's output, from what is extrapolated."""
        if self.predictor is None:
            return quantity
        u, w = self._pair(step)
        return (quantity - u * self._state(x, quantity, step)) / w

    # ------------------------------------------------------------------ slopes, for gradient estimation
    def _slope_pair(self, step: int) -> tuple[float, float]:
        levels, node = self._at(step)
        u, w = pair(levels.output, "flow" if levels.path.family == "flow" else "eps", node)
        return float(u), float(w)

    def slope(self, output: torch.Tensor, x: torch.Tensor, step: int) -> torch.Tensor:
        """The noise prediction (flow on flow paths), from the model's output."""
        u, w = self._slope_pair(step)
        return w * output + u * self._state(x, output, step) if u else w * output

    def from_slope(self, slope: torch.Tensor, x: torch.Tensor, step: int) -> torch.Tensor:
        """The inverse of `slope`."""
        u, w = self._slope_pair(step)
        return (slope - u * self._state(x, slope, step)) / w if u else slope / w
