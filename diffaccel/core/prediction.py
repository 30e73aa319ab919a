"""Conversions among what a model predicts and what a row combines; all are affine in (state, output)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import OptionError, PathError, one_of
from .linear import Coef, fit
from .node import Node

SPACES = ("x0", "eps", "v", "flow")
# diffusers' `prediction_type` -> our space
PREDICTION_TYPES = {
    "sample": "x0",
    "epsilon": "eps",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


@dataclass(frozen=True, slots=True)
class Affine:
    """A space of its own: `P = x * state + eps * (noise prediction)`, with numbers or arrays of one sample's shape.

    DPM-Solver-v3 combines such quantities (arXiv:2310.13268, Eq. 8), and epsilon scaling makes them.

    Args:
        x, eps: the coefficients.
        scale: what the noise prediction was divided by (epsilon scaling); `eps` has the quotient in it already, but
            what else is made of this call (the x0 that policies see) needs to know.
    """

    x: Coef
    eps: Coef
    scale: float = 1.0


Space = str | Affine


@dataclass(frozen=True, slots=True)
class Output:
    """What the model's raw output is.

    Args:
        kind: "x0", "eps", "v", "flow"; or "edm_eps", "edm_v" for a network inside the EDM preconditioning
            (`x0 = c_skip x + c_out output`, arXiv:2206.00364, Table 1; c_out changes its sign for "edm_v").
        sigma_data: standard deviation of the data, for the EDM kinds.
    """

    kind: str
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        one_of("kind of model output", self.kind, [*SPACES, "edm_eps", "edm_v"])

    def input_scale(self, sigma: float) -> float:
        """What a state of an EDM path is multiplied by before the network sees it: c_in of the same table."""
        return (sigma * sigma + self.sigma_data * self.sigma_data) ** -0.5

    @classmethod
    def of(cls, prediction_type: str) -> Output:
        """From diffusers' `prediction_type`."""
        return cls(PREDICTION_TYPES[one_of("prediction_type", prediction_type, PREDICTION_TYPES)])


@dataclass(frozen=True, slots=True)
class Prediction:
    """A value that says what it is, for functional sampling: `Prediction(model(x, t), "eps")`."""

    value: Any
    kind: str = "x0"
    sigma_data: float = 1.0


def pair(output: Output, space: Space, node: Node) -> tuple[Coef, Coef]:
    """`(u, w)` with `P = u * state + w * output`.

    Args:
        output: what the model gives.
        space: what is wanted.
        node: the level at which the model was called.

    Raises:
        PathError: where the information is missing: eps output at alpha = 0 says nothing of x0.
    """
    if isinstance(space, Affine):
        ue, we = _to_eps(output, node)
        return space.x + space.eps * ue, space.eps * we
    if output.kind == space:
        return 0.0, 1.0
    a, s = node.alpha, node.sigma
    one_of("space", space, SPACES)
    if space == "x0":
        return _to_x0(output, node)
    if space == "eps":
        return _to_eps(output, node)
    (u0, w0), (ue, we) = _to_x0(output, node), _to_eps(output, node)
    return (a * ue - s * u0, a * we - s * w0) if space == "v" else (ue - u0, we - w0)


def _to_x0(output: Output, node: Node) -> tuple[float, float]:
    a, s = node.alpha, node.sigma
    if output.kind == "x0":
        return 0.0, 1.0
    if output.kind == "eps":
        if a == 0:
            raise PathError(
                f"at t = {node.t} the signal is zero (zero terminal SNR): a model that predicts epsilon says nothing "
                "of the image there. Zero SNR needs prediction_type 'v_prediction' or 'sample'."
            )
        return 1.0 / a, -s / a
    if output.kind == "v":
        n = a * a + s * s
        return a / n, -s / n
    if output.kind == "flow":
        return 1.0 / (a + s), -s / (a + s)
    return _edm(output, node)


def _to_eps(output: Output, node: Node) -> tuple[float, float]:
    a, s = node.alpha, node.sigma
    if output.kind == "eps":
        return 0.0, 1.0
    if output.kind == "v":
        n = a * a + s * s
        return s / n, a / n
    if output.kind == "flow":
        return 1.0 / (a + s), a / (a + s)
    if s == 0:
        raise PathError(f"at t = {node.t} the state has no noise, so it has no noise prediction")
    u, w = _to_x0(output, node)
    return (1.0 - a * u) / s, -a * w / s


def _edm(output: Output, node: Node) -> tuple[float, float]:
    if node.alpha == 0:
        raise OptionError("EDM preconditioning needs alpha > 0")
    d, s = output.sigma_data, node.level
    skip, out = d * d / (s * s + d * d), s * d / float(np.sqrt(s * s + d * d))
    return skip / node.alpha, out if output.kind == "edm_eps" else -out


def convert(prediction: Any, space: Space, x: Any, node: Node) -> Any:
    """A `Prediction` (or a bare x0) at state x, in the wanted space; arrays or tensors."""
    p = prediction if isinstance(prediction, Prediction) else Prediction(prediction)
    u, w = pair(Output(p.kind, p.sigma_data), space, node)
    if isinstance(u, float) and u == 0.0 and isinstance(w, float) and w == 1.0:
        return p.value
    return x * fit(u, x) + p.value * fit(w, x)
