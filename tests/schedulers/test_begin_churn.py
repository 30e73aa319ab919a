"""Heun with churn raises levels between the nodes of the grid: a run cannot begin there."""

import pytest
import torch

from diffaccel import TableScheduler
from diffaccel.errors import OptionError


def churned(**options):
    scheduler = TableScheduler(sampler="heun", sampler_options={"s_churn": 20.0, **options})
    scheduler.set_timesteps(9)
    return scheduler


def begin(scheduler, k):
    scheduler.set_begin_index(k)
    x = torch.ones(1, 4, 8, 8)
    return scheduler.step(x, scheduler.timesteps[k], x).prev_sample


def test_a_churned_run_begins_at_its_first_call():
    assert begin(churned(), 0).isfinite().all()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_beginning_in_the_middle_is_refused_with_the_reason(k):
    with pytest.raises(OptionError, match="churn"):
        begin(churned(), k)


def test_without_churn_every_call_can_be_the_first():
    scheduler = TableScheduler(sampler="heun")
    for k in range(9):
        scheduler.set_timesteps(9)
        assert begin(scheduler, k).isfinite().all()
