"""Heun with churn raises levels between the nodes of the grid; a run can begin at any of its calls all the same."""

import pytest
import torch

from diffaccel import TableScheduler
from diffaccel.core.table import Table
from diffaccel.testing.runs import point_mass_error

CALLS = 9


def begun(k, **options):
    """The rows of a run that begins at call k, after its first step, and the state then."""
    scheduler = TableScheduler(sampler="heun", sampler_options=options)
    scheduler.set_timesteps(CALLS)
    scheduler.set_begin_index(k)
    x = torch.ones(1, 4, 8, 8)
    after = scheduler.step(x, scheduler.timesteps[k], x, generator=torch.Generator().manual_seed(0)).prev_sample
    return scheduler, Table(tuple(c.row for c in scheduler._runs.need().rows)), after


@pytest.mark.parametrize("k", range(CALLS))
@pytest.mark.parametrize("options", [{}, {"s_churn": 20.0}])
def test_every_call_can_be_the_first(k, options):
    scheduler, table, after = begun(k, **options)
    assert after.isfinite().all()
    assert [r.t for r in table.rows] == pytest.approx(scheduler.timesteps[k:].tolist())
    assert point_mass_error(table) < 1e-9, "the mean and the variance along the run are those of the path"


def test_a_churned_run_keeps_its_own_rows_from_the_next_interval_on():
    whole = begun(0, s_churn=20.0)[1]
    raised = [i for i, row in enumerate(whole.rows) if row.draws]
    assert len(raised) >= 3
    for k in range(1, CALLS):
        cut = k in raised  # the inner call of an interval: one bridging row
        assert Table(begun(k, s_churn=20.0)[1].rows[cut:]) == Table(whole.rows[k + cut :])
