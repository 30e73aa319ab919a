"""The analytic model of tests/golden/rewriters_and_policies (see the README beside the data), and its cases."""

from __future__ import annotations

import json

import golden_data
import numpy as np
import pytest

from diffaccel.core.prediction import Prediction, convert

FOLDER = "rewriters_and_policies"
GMM = {"K": 3, "scale": 0.8, "phase": 0.7, "freq": 1.3, "s0": 0.25, "ds": 0.10}


class Mixture:
    """The model of these files for samples of d numbers; see the README beside them."""

    def __init__(self, d, settings):
        g = GMM | settings
        j, k = np.arange(1, d + 1), np.arange(g["K"])[:, None]
        self.mu = g["scale"] * np.sin(g["freq"] * (k + 1) * j + g["phase"] * k)
        self.std = g["s0"] + g["ds"] * k
        self.w = (np.arange(g["K"]) + 1) / np.arange(1, g["K"] + 1).sum()

    def eps(self, x, node):
        v = (node.alpha * self.std) ** 2 + node.sigma**2
        away = x.reshape(len(x), 1, -1) - node.alpha * self.mu
        log = np.log(self.w) - 0.5 * (away**2 / v + np.log(v)).sum(-1)
        share = np.exp(log - log.max(1, keepdims=True))
        share = (share / share.sum(1, keepdims=True))[..., None]
        return (node.sigma * (share * away / v).sum(1)).reshape(x.shape)


def cases(file):
    """A parameter (arrays, meta) for each case of a file."""
    for path in golden_data.cases(FOLDER, file):
        data = golden_data.load(path)
        for key in data:
            if key.endswith("/meta"):
                case = key.removesuffix("/meta")
                arrays = {k.split("/")[1]: v for k, v in data.items() if k.startswith(f"{case}/")}
                meta = json.loads(str(data[key])) | {"case": case}
                yield pytest.param(arrays, meta, id=case)


def model_of(data, meta):
    return Mixture(data["x_init"][0].size, meta["gmm"])


def replayed(table, start, model, noise=()):
    """States before each call and at the end, with the recorded draws in order."""
    draws = iter(noise)
    return table.apply(
        start, lambda x, node, space: prediction(model, x, node, space), lambda x: next(draws), trajectory=True
    )


def prediction(model, x, node, space):
    return convert(Prediction(model.eps(x, node), "eps"), space, x, node)


def assert_states(states, data, atol=1e-9, rtol=0.0):
    np.testing.assert_allclose(np.stack(states[:-1]), data["call_x"], rtol=rtol, atol=atol)
    np.testing.assert_allclose(states[-1], data["out"], rtol=rtol, atol=atol)
