"""Every scheduler class of diffusers is read as its own path, or refused by name; no default is ever dropped."""

from __future__ import annotations

import inspect
import json
from typing import Any

import diffusers
import diffusers.schedulers
import numpy as np
import pytest
from diffusers import SchedulerMixin
from scheduler_cases import build, every_class, table_of

from diffaccel.errors import PathError
from diffaccel.schedulers import TableScheduler
from diffaccel.schedulers.from_config import output_of, read
from diffaccel.schedulers.origins import ORIGINS, REFUSED

# numpy functions that diffusers calls on tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")


# ---------------------------------------------------------------------- every class of diffusers
def test_every_class_is_decided_on():
    undecided = set(every_class()) - set(ORIGINS) - set(REFUSED)
    assert not undecided, f"diffusers has scheduler classes that nobody decided on: {sorted(undecided)}"
    assert not set(ORIGINS) & set(REFUSED)


@pytest.mark.parametrize("name", [n for n in every_class() if n in REFUSED])
def test_refused_classes_say_why(name):
    scheduler = build(name)
    for given in (scheduler, {**scheduler.config, "_class_name": name}):
        with pytest.raises(PathError) as error:
            read(given)
        assert name in str(error.value) and "row 1" in str(error.value) and "by hand" in str(error.value)
        assert all(key in str(error.value) for key, v in scheduler.config.items() if key[0] != "_" and v is not None)


def forms(scheduler: SchedulerMixin) -> list[Any]:
    """The ways in which a config arrives: the object, its live config, what a loaded pipeline has, saved JSON."""
    live = scheduler.config
    return [
        scheduler,
        live,
        {**live, "_class_name": type(scheduler).__name__},
        json.loads(scheduler.to_json_string()),
    ]


@pytest.mark.parametrize("name", [n for n in every_class() if n in ORIGINS])
def test_defaults_of_every_class_give_its_own_path(name):
    scheduler = build(name)
    for given in forms(scheduler):
        got = read(given)
        assert got.settings["path"] == ORIGINS[name].family, got
        json.dumps(got.settings)
        path = got.path
        if path.family == "vp":
            assert np.abs(path.alphas_cumprod - table_of(scheduler)).max() < 1e-6
            assert output_of(got.settings).kind == "eps"
        elif path.family == "edm":
            # the class's own training table, at its ends
            sigmas = np.asarray(scheduler.sigmas, dtype=np.float64)
            assert path.first.sigma == pytest.approx(sigmas[0], rel=1e-6)
            assert path.last.sigma == pytest.approx(sigmas[sigmas > 0][-1], rel=1e-6)
            assert path.first.t == pytest.approx(float(scheduler.timesteps[0]), abs=1e-6)
        else:
            assert (path.first.alpha, path.first.sigma, path.first.t) == (0, 1, 1000)
            assert output_of(got.settings).kind == "flow"


@pytest.mark.parametrize("name", [n for n in every_class() if n in ORIGINS and ORIGINS[n].family == "vp"])
def test_beta_schedules_are_those_of_the_class(name):
    cls = getattr(diffusers.schedulers, name)
    own = {p.name: p.default for p in inspect.signature(cls.__init__).parameters.values()}
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"):
        stated = {"_class_name": name, "beta_schedule": schedule}
        try:
            table = table_of(cls(beta_schedule=schedule))
        except (NotImplementedError, ValueError):
            with pytest.raises(PathError, match="beta_schedule"):
                read(stated)
            continue
        assert np.abs(read(stated).path.alphas_cumprod - table).max() < 1e-6, schedule
        # without the class the schedule's own keys prove it
        known = {k: own[k] for k in ("beta_start", "beta_end", "snr_shift_scale") if k in own}
        alone = read({**known, "beta_schedule": schedule, "num_train_timesteps": 1000, "prediction_type": "sample"})
        assert np.abs(alone.path.alphas_cumprod - table).max() < 1e-6, schedule


# ---------------------------------------------------------------------- dropped defaults
VP_PAIRS = ("DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "LCMScheduler", "DPMSolverMultistepScheduler")


@pytest.mark.parametrize("first", [*VP_PAIRS, "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_our_reading_never_drops_a_default(first):
    """diffusers itself does: its classes would not agree, ours does with the class that the config came from."""
    scheduler = build(first)
    settings = read(scheduler.config).settings
    # through our own saved form, and once through another class of diffusers
    again = json.loads(json.dumps({**settings, "_class_name": "TableScheduler"}))
    assert read(again).path == read(scheduler).path
    hop = build("DDIMScheduler").from_config({**settings, "_class_name": "TableScheduler"})
    assert read(hop).path == read(scheduler).path
    assert np.abs(read(hop).path.alphas_cumprod - table_of(scheduler)).max() < 1e-6


@pytest.mark.parametrize("name", [n for n in every_class() if n in ORIGINS])
def test_our_own_scheduler_keeps_the_path(name):
    first = TableScheduler.from_config(build(name).config)
    saved = json.loads(first.to_json_string())
    for given in (first, first.config, saved, TableScheduler.from_config(saved)):
        assert read(given).path == read(build(name)).path


def test_diffusers_does_drop_them():
    """The reason for the test above; if this fails, diffusers was repaired."""
    other = diffusers.LCMScheduler.from_config(diffusers.DDIMScheduler().config)
    assert np.abs(table_of(other) - table_of(diffusers.DDIMScheduler())).max() > 0.05


def test_values_changed_after_construction_count():
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.register_to_config(sigma_max=200.0, final_sigmas_type="sigma_min")  # as Cosmos does
    settings = read(scheduler.config).settings
    assert settings["sigma_max"] == 200 and settings["final_sigmas_type"] == "sigma_min"


def test_flow_config_in_a_vp_class_stays_flow():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    hop = diffusers.DDIMScheduler.from_config({**flow.config, "_class_name": "FlowMatchEulerDiscreteScheduler"})
    got = read(hop)
    assert got.settings["path"] == "flow" and got.settings["shift"] == 3.0
    saved = json.loads(hop.to_json_string())  # now its betas look as if somebody had stated them
    with pytest.raises(PathError, match=r"(?s)row 3.*shift"):
        read(saved)
