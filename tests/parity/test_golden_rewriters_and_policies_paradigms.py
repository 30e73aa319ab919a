"""Picard iteration against the authors' code (tests/golden/rewriters_and_policies/paradigms.npz)."""

from __future__ import annotations

import json

import golden_data
import numpy as np
import pytest

from diffaccel.core.families import betas
from diffaccel.core.path import Nodes, Path
from diffaccel.core.prediction import Prediction, convert
from diffaccel.parallel.picard import picard, variances
from diffaccel.samplers.registry import get
from diffaccel.testing.problems import Mixture

GMM = {"K": 3, "scale": 0.8, "phase": 0.7, "freq": 1.3, "s0": 0.25, "ds": 0.10}


def _cases():
    for path in golden_data.cases("rewriters_and_policies", "paradigms*.npz"):
        with np.load(path) as data:
            names = [key.removesuffix("/meta") for key in data.files if key.endswith("/meta")]
        for name in names:
            yield pytest.param(path, name, id=name)


CASES = list(_cases())


def model(shape, settings):
    """The mixture of these files (see the README beside them) as `predict(x, node, space)`."""
    g = GMM | settings
    j, k = np.arange(1, np.prod(shape) + 1), np.arange(g["K"])
    means = g["scale"] * np.sin(g["freq"] * (k[:, None] + 1) * j + g["phase"] * k[:, None])
    law = Mixture(k + 1.0, means, g["s0"] + g["ds"] * k)

    def predict(x, node, space):
        e = law.noise(x.reshape(len(x), -1), node).reshape(x.shape)
        return convert(Prediction(e, "eps"), space, x, node)

    return predict


class Case:
    def __init__(self, path, name):
        data = golden_data.load(path)
        self.data = {key.removeprefix(f"{name}/"): value for key, value in data.items() if key.startswith(f"{name}/")}
        self.meta = json.loads(str(self.data["meta"]))
        path = Path.vp(betas("scaled_linear", 0.00085, 0.012, 1000))
        nodes = Nodes([*(path.at(float(t)) for t in self.data["timesteps"]), path.end], path)
        self.table = get(self.meta["kind"]).trace(nodes)
        self.x = self.data["x_init"]
        self.predict = model(self.x.shape[1:], self.meta["gmm"])

    def noise(self):
        draws = iter(self.data["noise"])
        return lambda _: next(draws)

    def batch(self, states, nodes, spaces):
        return [self.predict(*request) for request in zip(states, nodes, spaces, strict=True)]

    def run(self, **options):
        return picard(self.table, self.x, self.batch, self.noise(), window=self.meta["parallel"], **options)


@pytest.mark.parametrize(("path", "name"), CASES)
def test_sequential(path, name):
    case = Case(path, name)
    out = case.table.apply(case.x, case.predict, case.noise())
    np.testing.assert_allclose(out, case.data["out_sequential"], atol=1e-9, rtol=0)


@pytest.mark.parametrize(("path", "name"), CASES)
def test_official_rule(path, name):
    """Result, windows, sweeps and calls."""
    case = Case(path, name)
    out, work = case.run(tol=case.meta["tolerance"], rule="official")
    steps = case.data["timesteps"]
    windows = [(s.rows, steps[s.first], steps[s.first + s.rows - 1]) for s in work.sweeps]
    np.testing.assert_array_equal(windows, case.data["windows"])
    assert (len(work.sweeps), work.calls) == (int(case.data["passes"]), int(case.data["calls"]))
    np.testing.assert_allclose(out, case.data["out"], atol=1e-9, rtol=0)


@pytest.mark.parametrize(("path", "name"), CASES)
def test_variances(path, name):
    """The scale of the error is the variance of the DDPM posterior."""
    case = Case(path, name)
    np.testing.assert_allclose(variances(case.table, floor=False)[:-1], case.data["variance"], atol=1e-12)


@pytest.mark.parametrize(("path", "name"), CASES)
def test_own_rule(path, name):
    """No more sweeps and calls than the official rule took, and as near to the sequential run as the tolerance says."""
    case = Case(path, name)
    out, work = case.run(tol=case.meta["tolerance"])
    assert len(work.sweeps) <= int(case.data["passes"])
    assert work.calls <= int(case.data["calls"])
    off = np.sqrt(np.mean((out - case.data["out_sequential"]) ** 2))
    assert off <= case.meta["tolerance"]
