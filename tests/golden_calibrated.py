"""The model and the paths of tests/golden/solvers_calibrated_official; see the README there."""

from __future__ import annotations

import numpy as np

from diffaccel.core.families import betas
from diffaccel.core.node import Node
from diffaccel.core.path import Nodes, Path

FOLDER = "solvers_calibrated_official"


class Mixture:
    """The analytic model that every file stores."""

    def __init__(self, data):
        self.mu, self.var, self.w = data["mu"], data["var"], data["w"]

    def eps(self, x, node):
        flat = x.reshape(len(x), 1, -1)
        v = node.alpha**2 * self.var + node.sigma**2
        away = flat - node.alpha * self.mu
        log = np.log(self.w) - 0.5 * (away**2 / v + np.log(v)).sum(-1)
        share = np.exp(log - log.max(1, keepdims=True))
        share = (share / share.sum(1, keepdims=True))[..., None]
        return (node.sigma * (share * away / v).sum(1)).reshape(x.shape)

    def predict(self, x, node, space):
        e = self.eps(x, node)
        return e if space == "eps" else (x - node.sigma * e) / node.alpha


def build_nodes(family, times):
    """Nodes at the times of the reference runs, which count as the README of the data says."""
    if family == "edm":
        path = Path.edm(0.002, 80.0, time="sigma")
        return Nodes([path.at(t) for t in times], path)
    if family == "vp_linear":
        path = Path.vp_linear(0.1, 20.0)
        return Nodes([path.at(t) for t in times], path)
    path = Path.vp(betas("scaled_linear", 0.00085, 0.012, 1000))
    log_alpha = np.interp(times, (np.arange(1000) + 1) / 1000, 0.5 * np.log(path.alphas_cumprod))
    pairs = [(float(np.exp(a)), float(np.sqrt(-np.expm1(2 * a)))) for a in log_alpha]
    return Nodes([Node(float(t), a, s) for t, (a, s) in zip(times, pairs, strict=True)], path)
