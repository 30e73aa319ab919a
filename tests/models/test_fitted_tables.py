"""The fitted tables that ship with the embedded models belong to their weights and do what they are for."""

import pytest

from diffaccel import FittedScheduler, compare, models
from diffaccel.artifact import Artifact

NAMES = ("tiny-sd", "tiny-flow")


@pytest.mark.parametrize("name", NAMES)
def test_table_belongs_to_the_weights_and_is_nearer_than_stock(name: str) -> None:
    pipe = models.load(name)
    pipe.set_progress_bar_config(disable=True)
    artifact = Artifact.load(models.fitted(name), "fit")
    job = compare.job_for(pipe, name, 8, seed=3)
    target = compare.run(pipe, compare.teacher(pipe.scheduler.config), 60, job)
    fitted = FittedScheduler.from_config(pipe.scheduler.config, artifact=artifact, pipe=pipe)
    ours = compare.generate(pipe, fitted, 8, job)
    stock = compare.run(pipe, compare.teacher(pipe.scheduler.config), 8, job)
    assert ours.calls == stock.calls == 8
    assert float(compare.errors(ours, target).median()) < 0.7 * float(compare.errors(stock, target).median())


def test_a_model_without_a_table_is_said() -> None:
    with pytest.raises(ValueError, match="tables for tiny-flow, tiny-sd"):
        models.fitted("tiny-clip")
