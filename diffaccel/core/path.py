"""Paths: the (alpha, sigma) family that a model was trained on, and nodes on it."""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex, overload

import numpy as np

from ..errors import PathError
from .node import Node

if TYPE_CHECKING:
    from .families import EDM, VP, Flow, VPContinuous


class Nodes(tuple[Node, ...]):
    """The nodes of a run (one more than intervals), and the path that they lie on."""

    path: Path

    def __new__(cls, nodes: Iterable[Node], path: Path) -> Nodes:
        self = super().__new__(cls, nodes)
        self.path = path
        return self

    @overload
    def __getitem__(self, key: SupportsIndex) -> Node: ...
    @overload
    def __getitem__(self, key: slice) -> Nodes: ...
    def __getitem__(self, key: Any) -> Any:
        got = super().__getitem__(key)
        return Nodes(got, self.path) if isinstance(key, slice) else got

    def __reduce__(self) -> Any:
        return (Nodes, (tuple(self), self.path))

    def between(self, s: Node, t: Node, r: float) -> Node:
        """The node a fraction `r` of the way from s to t in `lam`; both must have finite `lam`."""
        return self.path.at_lam(s.lam + r * (t.lam - s.lam))


class Path:
    """`x_t = alpha_t x0 + sigma_t eps`. Build one with `Path.vp`, `.vp_linear`, `.cosine`, `.edm`, `.flow`.

    Attributes of every path: `family` ("vp", "edm", "flow"), `first` (the noisiest training node), `last` (the
    cleanest), `end` (sigma = 0, alpha = 1).
    """

    family: ClassVar[str]

    # ------------------------------------------------------------------ to be defined by each family
    def at(self, t: float) -> Node:
        """The node at which the model is fed `t`."""
        raise NotImplementedError

    def at_lam(self, lam: float) -> Node:
        """The node with half log-SNR `lam` (finite)."""
        raise NotImplementedError

    @property
    def first(self) -> Node:
        """The noisiest node that the model was trained on."""
        raise NotImplementedError

    @property
    def last(self) -> Node:
        """The cleanest node that the model was trained on."""
        raise NotImplementedError

    # ------------------------------------------------------------------ common
    @property
    def end(self) -> Node:
        """Where a run ends by default: no noise. The model is never called there."""
        return Node(self.last.t, 1.0, 0.0)

    def at_level(self, level: float) -> Node:
        """The node with noise-to-signal ratio `sigma / alpha = level`; 0 gives `end`, inf the first node if it is
        pure noise."""
        if level == 0:
            return self.end
        if level == math.inf and self.first.alpha == 0:
            return self.first
        if not (math.isfinite(level) and level > 0):
            raise PathError(f"no node of the {self.family} path has sigma/alpha = {level}")
        return self.at_lam(-math.log(level))

    def node(self, alpha: float, sigma: float) -> Node:
        """The node of this path with the signal-to-noise ratio of (alpha, sigma)."""
        if sigma == 0:
            return self.end
        return self.at_level(math.inf if alpha == 0 else sigma / alpha)

    def warp(self, u: float) -> float:
        """The t of a uniform time u in units of t; only flow paths shift it."""
        return u

    @property
    def digest(self) -> str:
        """SHA-256 of lam on 64 values of t, to tell paths apart."""
        ts = np.linspace(self.last.t, self.first.t, 65)[:-1]
        return hashlib.sha256(np.round([self.at(t).lam for t in ts], 9).tobytes()).hexdigest()

    # ------------------------------------------------------------------ constructors
    @staticmethod
    def vp(
        betas: Sequence[float] | np.ndarray,
        *,
        zero_snr: bool = False,
        snr_shift: float | None = None,
        interpolation: str = "lam",
    ) -> VP:
        """Variance preserving, from the betas of T training steps; see `VP`."""
        from .families import VP

        return VP(tuple(float(b) for b in betas), zero_snr, snr_shift, interpolation)

    @staticmethod
    def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> VPContinuous:
        """Continuous VP, t in (0, 1], `ln alpha = -(beta_max - beta_min) t^2/4 - beta_min t/2` (2011.13456, Eq. 33)."""
        from .families import VPContinuous

        return VPContinuous("linear", beta_min, beta_max, t_min, 1.0)

    @staticmethod
    def cosine(s: float = 0.008, t_min: float = 1e-3, t_max: float = 0.9946) -> VPContinuous:
        """Continuous VP, `alpha = cos((t + s)/(1 + s) pi/2) / cos(s/(1 + s) pi/2)` (2102.09672, Eq. 17)."""
        from .families import VPContinuous

        return VPContinuous("cosine", s, 0.0, t_min, t_max)

    @staticmethod
    def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, *, sigma_data: float = 0.5, time: str = "log") -> EDM:
        """Variance exploding, alpha = 1; see `EDM`."""
        from .families import EDM

        return EDM(sigma_min, sigma_max, sigma_data, time)

    @staticmethod
    def flow(
        shift: float = 1.0,
        *,
        train_steps: int = 1000,
        mu: float | None = None,
        shift_type: str = "exponential",
        terminal: float | None = None,
    ) -> Flow:
        """Flow matching, alpha = 1 - sigma; see `Flow`."""
        from .families import Flow

        return Flow(shift, train_steps, mu, shift_type, terminal)

    @staticmethod
    def from_config(config: Any, **options: Any) -> Path:
        """The path that a diffusers scheduler config proves.

        Raises:
            PathError: if the config proves none; the message lists the keys it saw.
        """
        # Imported by name: reading configs needs diffusers, which this package must not import.
        reader = importlib.import_module("diffaccel.schedulers.from_config")
        path: Path = reader.read(config, **options).path
        return path


def iadb(model: Any) -> Any:
    """A model of Iterative alpha-(de)Blending (arXiv:2305.03486) as a `predict` of the functional interface.

    `model(x, a)` predicts `x0 - noise` at the blending `a = 1 - sigma`, from 0 (noise) to 1: on a flow path that is
    the negative of the velocity, at the time 1 - sigma. Its own sampler, `x += (a' - a) d`, is `ddim` there.

    Returns:
        `predict(x, node)` for `diffaccel.sample(predict, x, nodes=nodes(Path.flow(), ...))`.
    """
    from .prediction import Prediction

    def predict(x: Any, node: Node) -> Prediction:
        return Prediction(-model(x, 1.0 - node.sigma), "flow")

    return predict
