"""Time-Shift (target-level form) against its authors' code (tests/golden/rewriters_and_policies/time_shift.npz)."""

from __future__ import annotations

import golden_mixture as golden
import numpy as np
import pytest
import torch

from diffaccel import TableScheduler, time_shift
from diffaccel.core.path import Nodes
from diffaccel.samplers.epsilon_scale import epsilon_scale
from diffaccel.samplers.registry import get
from diffaccel.schedulers.from_config import path_of
from diffaccel.schedulers.plan import run_on

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "check_finite": "never"}
# the first update of F-PNDM's Runge-Kutta start takes four calls, in the middle of shifted intervals, which no
# pipeline can feed; its first calls are the history of the multistep updates
SAMPLERS = {"euler": ("ddim", {}), "ddpm": ("ddpm", {}), "s_pndm": ("pndm", {"order": 2}), "f_pndm": ("ipndm", {})}
WARM_UP, STAGES = 3, 4


def begun(meta, data):
    """A scheduler at the start of the recorded run."""
    name, options = SAMPLERS[meta["method"]]
    policy = [time_shift(meta["window"], meta["cutoff"])] if meta["shift"] else None
    updates = len(data["t_next"])
    rewrite = None
    if meta["fix_scale"]:
        rewrite = [epsilon_scale(meta["fix_scale"])]
    elif meta["step_size"]:  # counted from the noisy end there
        rewrite = [epsilon_scale(1 + meta["step_size"] * (updates - 1), slope_per_call=-meta["step_size"])]
    scheduler = TableScheduler(**LINEAR, sampler=name, sampler_options=options, policy=policy, rewrite=rewrite)
    path = path_of(scheduler.config)
    steps = np.arange(updates)[::-1] * (1000 // meta["S"]) + 1
    nodes = Nodes([path.at(float(t)) for t in [*steps, 0]], path)
    found, chosen = scheduler._sampler()
    assert found.options(chosen) == get(name).options(options)
    run = run_on(nodes, found, chosen, updates + (name == "pndm"), None)
    scheduler._aim(run, run.table)
    run.begin = 0
    scheduler._runs.set(run)
    return scheduler


class Replay:
    """A generator's place is taken by the recorded draws."""

    def __init__(self, monkeypatch, draws):
        self.draws = iter(draws)
        monkeypatch.setattr("diffaccel.schedulers.run._drawn", lambda x, generator: torch.tensor(next(self.draws)))


def chosen_steps(scheduler, updates, warm):
    """(updates, B) the training step that each update was aimed at."""
    run = scheduler._runs.need()
    rows = [run.rows[i].row.next.t for i in range(warm, len(run.rows))]
    found = np.tile(np.array(rows)[:, None], (1, 3))
    for i, k in run.shifts.chosen if run.shifts else []:
        found[i - warm] = run.shifts.aims[i].positions[k.numpy()]
    assert len(found) == updates
    return found


@pytest.mark.parametrize(("data", "meta"), list(golden.cases("time_shift.npz")))
def test_time_shift(data, meta, monkeypatch):
    Replay(monkeypatch, data["noise"])
    scheduler = begun(meta, data)
    model = golden.model_of(data, meta)
    calls = list(range(len(data["call_x"])))
    runge_kutta = meta["method"] == "f_pndm"
    if runge_kutta:
        calls = [STAGES * i for i in range(WARM_UP)] + calls[STAGES * WARM_UP :]
    warm = int(meta["method"] == "s_pndm")  # the first update has two calls
    for j, call in enumerate(calls):
        if runge_kutta and j <= WARM_UP:
            x = data["call_x"][call]
        np.testing.assert_allclose(x if j else data["x_init"], data["call_x"][call], rtol=0, atol=1e-9)
        x = torch.tensor(data["call_x"][call])
        node = scheduler._runs.need().nodes[j]
        assert np.all(data["call_t"][call] == node.t)
        x = scheduler.step(torch.tensor(model.eps(x.numpy(), node)), scheduler.timesteps[j], x)[0].numpy()
    np.testing.assert_allclose(x, data["out"], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(chosen_steps(scheduler, len(data["t_next"]), warm), data["t_next"])
