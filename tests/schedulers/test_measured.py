"""Settings that an artifact holds for each number of calls: which one a run takes, and that the user's own win."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from diffusers import DDIMScheduler
from scheduler_runs import SD, loop, noise

from diffaccel.artifact import Artifact, path_identity
from diffaccel.core.path import Path
from diffaccel.core.quad import Ems
from diffaccel.errors import OptionError
from diffaccel.schedulers import DPMSolverV3Scheduler, TableScheduler
from diffaccel.schedulers.measured import advice

CONFIG = DDIMScheduler(**SD, timestep_spacing="trailing").config
LAM = np.linspace(-3.0, 4.0, 30)
SHAPE = (2, 4, 4)


def setting(grid, grid_options=None, **options):
    return {"options": options, "grid": grid, "grid_options": grid_options or {}}


FIVE = setting("karras", {"rho": 4.0}, order=2, corrector=None)
EIGHT = setting("mid", {"w": 0.4}, order=3, corrector="same", pseudo=["predictor"])
BY_CALLS = {
    "5": [FIVE, setting("mid", {"w": 0.4}, order=2, corrector="plus"), setting("trailing", order=3, corrector="same")],
    "8": [EIGHT, FIVE],
}


def artifact():
    l, s, b = np.random.default_rng(0).standard_normal((3, 30, *SHAPE))
    tensors = {"lam": LAM, "l": 0.5 + 0.1 * l, "s": 0.1 * s, "b": 0.1 * b}
    meta = {"path": path_identity(Path.from_config(CONFIG), "epsilon")}
    return Artifact("ems", tensors, meta | {"scheduler": {"sampler": "dpm_v3", "by_calls": BY_CALLS}})


HELD = artifact()
STATISTICS = Ems(*(HELD.tensors[k] for k in ("lam", "l", "s", "b")))


def table(scheduler, n):
    scheduler.set_timesteps(n)
    return scheduler.table


def expected(n, taken, **own):
    """The table of a scheduler that is told everything."""
    options = {**taken["options"], **own, "statistics": STATISTICS}
    made = TableScheduler.from_config(
        CONFIG, sampler="dpm_v3", grid=taken["grid"], grid_options=taken["grid_options"], sampler_options=options
    )
    return table(made, n)


@pytest.mark.parametrize(("n", "taken"), [(5, FIVE), (8, EIGHT), (1, FIVE), (6, FIVE), (7, EIGHT), (30, EIGHT)])
def test_a_run_takes_the_best_of_its_number_of_calls_or_of_the_nearest(n, taken):
    for made in (
        DPMSolverV3Scheduler.from_config(CONFIG, artifact=HELD),
        TableScheduler.from_config(CONFIG, artifact=HELD),
        TableScheduler.from_config(CONFIG, sampler="dpm_v3", artifact=HELD),
    ):
        assert table(made, n) == expected(n, taken)
        assert ("measured no settings" in made.explain()) == (n not in (5, 8))
        assert f"order={taken['options']['order']}" in made.explain().replace(": ", "=").replace("'", "")
    assert table(made, 5) == expected(5, FIVE) and table(made, 8) == expected(8, EIGHT)


def test_what_the_user_says_wins_and_the_best_that_agrees_is_taken():
    def made(n, **own):
        return table(DPMSolverV3Scheduler.from_config(CONFIG, artifact=HELD, **own), n)

    plus, third = BY_CALLS["5"][1:]
    assert made(5, corrector="plus") == expected(5, plus)
    assert made(5, order=3) == expected(5, third)
    assert made(5, sampler_options={"order": 3}) == expected(5, third)
    assert made(5, grid="mid", grid_options={"w": 0.4}) == expected(5, plus)
    assert made(5, grid="uniform_lambda") == expected(5, setting("uniform_lambda", **FIVE["options"]))
    assert made(5, grid="mid", grid_options={"w": 0.4}, order=3) == expected(5, setting("mid", {"w": 0.4}, order=3))
    # an option that the settings do not differ in goes with the best of them
    assert made(5, lower_order_final=False) == expected(5, FIVE, lower_order_final=False)
    assert made(5, quadrature="trapezoid") == expected(5, FIVE, quadrature="trapezoid")
    # nothing measured agrees: the user's options stand alone, not mixed with others'
    assert made(8, order=1) == expected(8, setting("mid", {"w": 0.4}, order=1))


def test_the_config_holds_the_choice_and_copies_make_it_again(tmp_path):
    made = DPMSolverV3Scheduler.from_config(CONFIG, artifact=HELD)
    assert made.config.grid == "by_calls" and made.config.sampler_options is None
    made.save_pretrained(tmp_path)
    for twin in (
        copy.deepcopy(made),
        DPMSolverV3Scheduler.from_pretrained(tmp_path),
        DPMSolverV3Scheduler.from_config(made.config),
        TableScheduler.from_config(made.config),
    ):
        assert table(twin, 8) == expected(8, EIGHT) and table(twin, 5) == expected(5, FIVE)
    other = TableScheduler.from_config(made.config, sampler="dpmpp", grid="karras")
    assert table(other, 5).sampler == "dpmpp"


def test_given_nodes_and_a_later_beginning_keep_the_options_of_the_whole_run():
    made = DPMSolverV3Scheduler.from_config(CONFIG, artifact=HELD)
    made.set_timesteps(timesteps=[900, 700, 500, 300, 100])
    assert made.table.options["corrector"] is None and made.table.options["order"] == 2
    made.set_timesteps(8)
    made.set_begin_index(3)
    x = noise(1, *SHAPE)
    made.step(x, made.timesteps[3], x)
    run = made._runs.need()
    assert run.options["pseudo"] == ["predictor"] and run.start == 3
    made.set_timesteps(8)
    made.sigmas[-2] = made.sigmas[-3]  # as Cosmos 2 does: compiled again with the same options
    made.step(x, made.timesteps[0], x)
    assert made.table.options["order"] == 3 and "compiled again" in made.explain()
    made.set_timesteps(5)
    assert loop(made, x).isfinite().all()


def test_options_that_contradict_are_refused_when_the_run_begins():
    made = DPMSolverV3Scheduler.from_config(CONFIG, artifact=HELD, pseudo=["corrector"], corrector=None)
    with pytest.raises(OptionError, match="no effect"):
        made.set_timesteps(8)


def test_what_a_recipe_says_of_such_an_artifact():
    assert advice(HELD, 8) == {"sampler": "dpm_v3", **EIGHT}
    plain = Artifact("dc", {}, {"scheduler": {"sampler": "dc", "grid": "karras", "options": {}}})
    assert advice(plain, 8) == plain.meta["scheduler"] and advice(Artifact("ays", {}), 8) == {}
