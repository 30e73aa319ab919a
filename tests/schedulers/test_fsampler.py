"""`FSamplerScheduler`: calls, nodes, settings of the authors' nodes, configs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scheduler_runs import PATHS

from diffaccel.errors import OptionError
from diffaccel.samplers.rewrite import rewritten
from diffaccel.samplers.skip import skip
from diffaccel.schedulers import FSamplerScheduler, TableScheduler
from diffaccel.testing.pipelines import build, call_kwargs, denoiser

SD = {"num_train_timesteps": 1000, **PATHS["sd15"]}


@pytest.mark.filterwarnings("ignore:.*too few for a skip")
@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize("skip", ["h2/s2", "h3/s4", "h4"])
def test_every_number_of_calls(path, skip):
    scheduler = FSamplerScheduler.from_config({"num_train_timesteps": 1000, **PATHS[path]}, skip=skip)
    for calls in (9, 10, 15, 23):
        scheduler.set_timesteps(calls)
        assert len(scheduler.timesteps) == calls == scheduler.num_inference_steps
        assert scheduler.calls_for_nodes(scheduler.nodes) == calls
        assert scheduler.calls_for_nodes(scheduler.nodes + 1) == calls + 1
        assert len(scheduler.sigmas) == calls + 1


def test_settings_of_the_authors_nodes():
    def part(**options):
        return FSamplerScheduler.from_config(SD, **options).config.rewrite[0]

    assert (part()["quantity"], part()["coordinate"], part()["protect"]) == ("x0", "lam", [2, 2])
    assert (part(official=True)["quantity"], part(official=True)["coordinate"]) == ("residual", "index")
    assert part(official="simple")["protect"] == [2, 3]
    with pytest.raises(OptionError, match="leave one of the two out"):
        part(official=True, quantity="eps")
    with pytest.raises(OptionError, match="True, False or 'simple'"):
        part(official="advanced")
    with pytest.raises(OptionError, match="unknown skip pattern"):
        FSamplerScheduler.from_config(SD, skip="h9/s9")


def test_it_is_ddim_with_the_rewriter():
    ours = FSamplerScheduler.from_config(SD, skip="h2/s3")
    same = TableScheduler.from_config(SD, sampler="ddim", rewrite=skip("h2/s3", quantity="x0"))
    for scheduler in (ours, same):
        scheduler.set_timesteps(12)
    assert ours.table == same.table
    assert FSamplerScheduler().config.rewrite[0]["name"] == "skip"


def test_a_config_keeps_its_skips(tmp_path):
    ours = FSamplerScheduler.from_config(SD, skip="h3, 6, 9", quantity="eps")
    ours.save_pretrained(tmp_path)
    loaded = FSamplerScheduler.from_pretrained(tmp_path)
    for scheduler in (ours, loaded, FSamplerScheduler.from_config(ours.config)):
        scheduler.set_timesteps(12)
        assert scheduler.table == ours.table and scheduler.nodes == 14
    changed = FSamplerScheduler.from_config(ours.config, coordinate="sigma").config.rewrite[0]
    assert (changed["pattern"], changed["quantity"], changed["coordinate"]) == ("h3, 6, 9", "eps", "sigma")


def test_too_few_calls_say_so_once():
    scheduler = FSamplerScheduler.from_config(SD)
    with pytest.warns(UserWarning, match="too few for a skip"):
        scheduler.set_timesteps(5)
    plain = TableScheduler.from_config(SD, sampler="ddim")
    plain.set_timesteps(5)
    assert scheduler.table == plain.table


def test_own_timesteps_are_the_nodes():
    scheduler = FSamplerScheduler.from_config(SD)
    scheduler.set_timesteps(timesteps=list(range(950, 0, -50)))
    skipped = [4, 7, 10, 13, 16]
    called = [t for i, t in enumerate(range(950, 0, -50)) if i not in skipped]
    assert scheduler.nodes == 19 and scheduler.timesteps.tolist() == called


@pytest.mark.parametrize("name", ["sd15", "sd15_img2img", "sdxl_img2img", "sd3", "flux", "flux_img2img", "wan"])
def test_pipelines(name):
    pipe = build(name)
    pipe.scheduler = FSamplerScheduler.from_config(pipe.scheduler.config)
    model, seen = denoiser(pipe), []
    true = model.forward
    model.forward = lambda *a, **k: (seen.append(1), true(*a, **k))[1]
    image = pipe(**call_kwargs(name, num_inference_steps=12))[0]
    del model.forward
    assert torch.as_tensor(image).isfinite().all()
    calls = 9 if "img2img" in name else 12
    assert len(seen) == calls * (2 if name == "wan" else 1)


def test_the_last_node_can_be_skipped_by_name():
    made = rewritten("ddim", skip([3, 9]))
    from diffaccel.core.grid import nodes
    from diffaccel.testing.runs import PATHS as paths

    table = made.trace(nodes(paths["vp"], 10, "trailing"))
    assert len(table) == 8 and table.rows[-1].next.sigma == 0
    np.testing.assert_array_equal([row.next is nxt.node for row, nxt in zip(table.rows, table.rows[1:])], True)
