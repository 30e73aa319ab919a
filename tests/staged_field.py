"""Staged runs on an exact Gaussian field: every mode is a linear combination of independent unit noises."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from diffaccel.core.path import Nodes, Path
from diffaccel.core.stages import ratio
from diffaccel.samplers.registry import get
from diffaccel.schedulers.resize import dct, idct

FLOW = Path.flow()


class Field:
    """The exact denoiser of a Gaussian field at every size, on states made of independent noises.

    A state (K, H, W) holds in its K images the coefficients of K independent unit noises (the start's, and one for
    each transition that draws), mode by mode; the model and every solver are linear, so that nothing is random.
    """

    def __init__(self, power):
        self.power = power

    def clean(self, x, t):
        h, w = x.shape[-2:]
        p = h * w / self.power.size * self.power[:h, :w]
        return torch.from_numpy((1 - t) * p / ((1 - t) ** 2 * p + t**2)) * x


def run_field(scheduler, field, start):
    """The result's coefficients. States are kept as latents; each image of the batch is one independent noise."""
    scheduler.set_timesteps(scheduler.num_inference_steps)
    x = start
    for i in range(scheduler.num_inference_steps):
        scheduler.resize_to(tuple(field.power.shape))
        t, seen = scheduler.run.time, scheduler.shrunk(x) if i == 0 else x
        x0 = idct(field.clean(dct(seen), t))
        x = scheduler.step((seen - x0) / t, None, x, return_dict=False)[0]
    return dct(x)[:, 0].numpy()


def unit_start(count, size):
    """(count, 1, H, W): image 0 has coefficient 1 in every mode, the others are empty until a transition draws."""
    start = torch.zeros(count, 1, *size, dtype=torch.float64)
    start[0] = idct(torch.ones(1, *size, dtype=torch.float64))
    return start


def unit_noise(monkeypatch):
    """The k-th draw of a run is 1 in every mode of image k."""

    def drawer(seeds, device):
        counter = unit_noise.counter

        def draw(shape):
            z = torch.zeros(shape, dtype=torch.float64)
            z[next(counter)] = 1.0
            return z

        return draw

    unit_noise.counter = itertools.count(1)
    monkeypatch.setattr("diffaccel.schedulers.staged_run.drawer", drawer)


def w2(gains, power):
    """Squared Wasserstein distance to the field for each element, from (K, H, W) gains."""
    return float(((np.sqrt((gains**2).sum(0)) - np.sqrt(power)) ** 2).mean())


def paired(gains, reference):
    """Expected squared distance for each element to a run whose only noise is the start: gains (K, H, W), (H, W)."""
    return float(((gains[0] - reference) ** 2 + (gains[1:] ** 2).sum(0)).mean())


def solved(solver, times, power, x):
    """The exact field's coefficients after a plain run over flow times; x (K, h, w) coefficients."""
    nodes = Nodes([FLOW.at(1000 * float(t)) for t in times], FLOW)

    def predict(state, node, space):
        assert space == "x0"
        return node.alpha * power / (node.alpha**2 * power + node.sigma**2) * state

    return get(solver).trace(nodes).apply(x, predict)


def tweedie(solver, times, low_power, high_power, after):
    """The baseline: posterior mean at the end of the low stage, resized, with fresh noise; gains (2, H, W)."""
    h, w = low_power.shape
    x = solved(solver, times, low_power, np.ones((1, h, w)))
    t = float(times[-1])
    clean = (1 - t) * low_power / ((1 - t) ** 2 * low_power + t**2) * x
    start = np.zeros((2, *high_power.shape))
    start[0, :h, :w] = (1 - after[0]) * ratio((h, w), high_power.shape) * clean[0]
    start[1] = after[0]
    return solved(solver, after, high_power, start)
