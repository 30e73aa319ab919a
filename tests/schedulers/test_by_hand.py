"""What people do by hand: edited previews, options from arrays, samplers as objects, noise of their own."""

from __future__ import annotations

import copy
import logging
import threading
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from scheduler_runs import SD, generator, make, noise

import diffaccel as da
from diffaccel import TableScheduler, models
from diffaccel.core.path import Path
from diffaccel.errors import OptionError, PathError, RunError
from diffaccel.samplers.registry import REGISTRY, get, sampler
from diffaccel.schedulers import FittedScheduler
from diffaccel.testing.certify import equal_methods
from diffaccel.testing.pipelines import build, call_kwargs

X = noise(2, 4, 6, 6)
CFG = diffusers.DDIMScheduler(**SD, clip_sample=False).config
FLOW = diffusers.FlowMatchEulerDiscreteScheduler().config
of = TableScheduler.from_config


# ---------------------------------------------------------------------- previews
@pytest.mark.parametrize("kind", ["epsilon", "sample"])
@pytest.mark.parametrize("name", ["dpmpp", "unipc", "ddim", "deis", "ghvb"])
def test_an_edited_preview_changes_nothing(name, kind):
    ends = []
    for edit in (False, True):
        scheduler, x = make("sd15", name, {"prediction_type": kind}), X
        scheduler.set_timesteps(6)
        for t in scheduler.timesteps:
            said = 0.3 * x
            out = scheduler.step(said, t, x)
            if edit:
                out.pred_original_sample.mul_(0.5).clamp_(0, 1)
                assert torch.equal(said, 0.3 * x)
            x = out.prev_sample
        ends.append(x)
    assert torch.equal(*ends)


# ---------------------------------------------------------------------- where a run begins
def test_heun_begun_by_value_begins_an_interval():
    scheduler = of(CFG, sampler="heun")
    scheduler.set_timesteps(9)
    times = scheduler.timesteps.tolist()
    assert times[3] == times[4]
    for t in times[4:]:
        scheduler.step(X, t, X)
    assert scheduler.step_index == 9


# ---------------------------------------------------------------------- noise
def test_its_own_generator_serves_pipelines_that_pass_none(caplog):
    pipe, found = build("sd3"), []
    pipe.scheduler = of(pipe.scheduler.config, sampler="dpmpp_2m_sde")
    with caplog.at_level(logging.WARNING, logger="diffaccel"):
        for seed in (5, 5, 6):
            pipe.scheduler.generator = torch.Generator().manual_seed(seed)
            found.append(pipe(**call_kwargs("sd3", num_inference_steps=5, output_type="latent"))[0])
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
        assert "global generator" not in caplog.text
        pipe.scheduler.generator = None
        pipe(**call_kwargs("sd3", num_inference_steps=5, output_type="latent"))
    assert caplog.text.count("scheduler.generator") == 1  # once, not at every step


def test_a_generator_given_to_step_comes_first_and_the_other_belongs_to_its_thread():
    scheduler = of(CFG, sampler="ddim", eta=1.0)
    scheduler.generator = generator(1)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(scheduler.generator))
    thread.start()
    thread.join()
    assert seen == [None]
    ends = []
    for given in (generator(2), generator(2), None):
        scheduler.set_timesteps(3)
        ends.append(scheduler.step(X, scheduler.timesteps[0], X, generator=given).prev_sample)
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])
    with pytest.raises(OptionError, match="list of them, or None; got 3"):
        scheduler.generator = 3


def test_add_noise_of_several_levels_during_a_run_means_each_of_them():
    ours, stock = of(CFG), diffusers.DDIMScheduler.from_config(CFG)
    z, t = noise(2, 4, 6, 6, seed=3), torch.tensor([10, 900])
    ours.set_timesteps(8)
    ours.set_begin_index(3)
    assert torch.allclose(ours.add_noise(X, z, t), stock.add_noise(X, z, t), atol=1e-6)
    same = ours.timesteps[3].repeat(2)
    assert torch.equal(ours.add_noise(X, z, same), ours.add_noise(X, z, same[:1]))
    assert torch.equal(of(CFG).add_noise(X, z, 900), of(CFG).add_noise(X, z, t[1:]))
    with pytest.raises(RunError, match="3 timesteps for 2 samples"):
        ours.add_noise(X, z, torch.tensor([1, 2, 3]))


# ---------------------------------------------------------------------- options
def test_options_from_numpy_are_kept_as_their_file_holds_them(tmp_path):
    times = {5: np.array([999, 700, 400, 100, 10])}
    made = of(CFG, sampler="ddim", eta=np.float32(0.5), grid="listed", grid_options={"times": times})
    assert "eta" in repr(made)
    made.save_pretrained(tmp_path)
    again = TableScheduler.from_pretrained(tmp_path)
    for scheduler in (made, again):
        scheduler.set_timesteps(5)
        assert scheduler.timesteps.tolist() == [999, 700, 400, 100, 10]
    assert again.config.sampler_options == made.config.sampler_options == {"eta": 0.5}
    assert of(CFG, order=np.int64(2)).config.sampler_options == {"order": 2}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"order": 9}, "order must be an integer from 1 to 3"),
        ({"form": "x"}, "unknown form 'x'"),
        ({"lower_order_final": "no"}, "lower_order_final must be true or false, got 'no'"),
        ({"sampler": "ddim", "eta": "a"}, "eta must be a number, got 'a'"),
        ({"sampler": "ddim", "eta": 5}, r"eta must lie in \[0, 1\]"),
        ({"sampler_options": 5}, "sampler_options is a dict of options of 'dpmpp', got 5"),
        ({"sampler_options": {"order": print}}, "an option cannot be saved"),
        ({"grid_options": "x"}, "grid_options is a dict"),
        ({"thresholding": "yes"}, "thresholding must be true or false, got 'yes'"),
    ],
)
def test_wrong_options_show_when_the_scheduler_is_made(wrong, message):
    with pytest.raises(OptionError, match=message):
        of(CFG, **wrong)


def test_a_sampler_as_an_object_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(REGISTRY, "mine", get("ddim"))  # taken away again afterwards
    del REGISTRY["mine"]
    mine = replace(get("ddim"), name="mine")
    made = of(CFG, sampler=mine)
    assert made.config.sampler == "mine" and "mine" in repr(made)
    made.save_pretrained(tmp_path)
    assert TableScheduler.from_pretrained(tmp_path).config.sampler == "mine"
    with pytest.raises(OptionError, match="another sampler is registered under this name"):
        of(CFG, sampler=replace(mine, paper="another"))


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "CogVideoXDDIMScheduler", "DDIMScheduler"])
def test_a_config_without_its_class_is_portable_to_the_usual_one(name):
    kind = getattr(diffusers, name)
    assert type(of(kind().config).portable()) is kind


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": "karras", "grid_options": {"rho": 0.0}}, "rho must be above 0"),
        ({"grid": "karras", "grid_options": {"rh": 7.0}}, "rh"),
        ({"grid": "beta", "grid_options": {"sigma_min": 3.0, "sigma_max": 1.0}}, "0 < sigma_min < sigma_max"),
        ({"grid_options": {"wrong": 1}}, "wrong"),
        ({"grid": "flow_stock"}, "is for flow paths"),
    ],
)
def test_wrong_grids_show_when_the_scheduler_is_made(settings, message):
    with pytest.raises(OptionError, match=message):
        of(CFG, **settings)


def test_a_path_of_few_training_steps_is_not_tried_with_more():
    few = TableScheduler(num_train_timesteps=8, sampler="unipc", sampler_options={"order": 2}, grid="quadratic")
    few.set_timesteps(4)
    assert len(few.timesteps) == 4


def test_restart_leaves_fitted_tables_alone():
    config = models.load("tiny-sd").scheduler.config
    with pytest.raises(OptionError, match="'fitted' has its nodes for each number of calls"):
        FittedScheduler.from_config(config, artifact=models.fitted("tiny-sd"), rewrite=[da.restart()])


# ---------------------------------------------------------------------- plug-ins
def test_a_plug_in_that_does_not_trace_is_no_hindrance(monkeypatch):
    from diffaccel.samplers import registry

    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))

    @sampler("branches", order=1)
    def branches(x, nodes, predict, noise):
        for node in nodes[:-1]:
            d = predict(x, node)
            x = x + d if d > 0 else x
        return x

    assert "branches" in registry.samplers()
    assert "ddpm" in equal_methods(get("ddim"), {"eta": 1.0})


# ---------------------------------------------------------------------- values that mean nothing
def raw(**settings):
    return lambda: TableScheduler(**settings)


@pytest.mark.parametrize(
    ("make_it", "kind", "message"),
    [
        (raw(path="flow", shift=None), PathError, "'flow' path cannot be made of .*'shift': None"),
        (raw(num_train_timesteps=1000.5), PathError, "'vp' path cannot be made of .*1000.5"),
        (lambda: of({**CFG, "num_train_timesteps": 1000.7}), PathError, "must be a whole number, got 1000.7"),
        (lambda: of({**CFG, "rescale_betas_zero_snr": "false"}), OptionError, "must be true or false, got 'false'"),
        (lambda: of(FLOW, use_dynamic_shifting="false"), OptionError, "must be true or false, got 'false'"),
    ],
)
def test_settings_that_make_no_path(make_it, kind, message):
    with pytest.raises(kind, match=message):
        make_it()


def test_values_of_another_kind_are_refused_by_name():
    scheduler = of(CFG, sampler="dpmpp")
    with pytest.raises(RunError, match="noise must be tensors, got Tensor and NoneType"):
        scheduler.add_noise(X, None, torch.tensor([10]))
    scheduler.set_timesteps(5)
    for wrong in ("1", 1.5, None, 9):
        with pytest.raises(RunError, match=r"this run has calls 0\.\.4"):
            scheduler.set_begin_index(wrong)
    for wrong in (None, torch.tensor([1, 2]), "a"):
        with pytest.raises(RunError, match="needs one timestep, a number"):
            scheduler.step(X, wrong, X)
    with pytest.raises(OptionError, match="mu must be a number, got 'a'"):
        of(FLOW, use_dynamic_shifting=True).set_timesteps(5, mu="a")


@pytest.mark.parametrize(
    ("path", "given", "side"),
    [
        ("sd15", {"sigmas": [20.0, 15.0, 1.0]}, "sigmas: sigma/alpha = 20 is above 14.6"),
        ("sd15", {"sigmas": [10.0, 1.0, 0.001]}, "sigmas: sigma/alpha = 0.001 is below 0.029"),
        ("edm", {"sigmas": [100.0, 1.0]}, "sigmas: sigma/alpha = 100 is above 80"),
        ("edm", {"timesteps": [3.0, -3.0]}, "timesteps: sigma/alpha = 1.* is above 80"),
    ],
)
def test_levels_outside_the_path_are_refused(path, given, side):
    with pytest.raises(OptionError, match=f"{side}.*the model was not trained there"):
        make(path).set_timesteps(**given)
    make("sd15").set_timesteps(sigmas=[14.615, 6.475, 0.152])  # published with few digits


def test_samplers_of_two_calls_say_that_they_move_the_nodes():
    scheduler = make("sd15", "heun")
    scheduler.set_timesteps(timesteps=[900, 600, 300, 100])
    assert "heun makes 4 calls on 3 intervals: its nodes lie on the curve through the values" in scheduler.explain()
    scheduler = make("sd15", "dpmpp")
    scheduler.set_timesteps(timesteps=[900, 600, 300, 100])
    assert "intervals" not in scheduler.explain()


def test_a_copy_keeps_the_source_of_noise():
    scheduler = make("sd15", "ddpm")
    scheduler.generator = generator()
    assert copy.deepcopy(scheduler).generator is scheduler.generator


def test_a_cell_run_twice_registers_its_sampler_again():
    def cell():
        def sample_cell(model, x, sigmas, disable=None):
            for i in range(len(sigmas) - 1):
                d = (x - model(x, sigmas[i] * x.new_ones([x.shape[0]]))) / sigmas[i]
                x = x + d * (sigmas[i + 1] - sigmas[i])
            return x

        return da.from_k_diffusion(sample_cell, name="a_cell")

    try:
        first, second = (TableScheduler(**SD, sampler=cell()) for _ in range(2))
        for one in (first, second):
            one.set_timesteps(5)
        assert first.table == second.table
        other = replace(cell(), loop=get("ddim").loop)
        with pytest.raises(OptionError, match=r"another sampler is registered.*from_k_diffusion\(fn, name="):
            TableScheduler(**SD, sampler=other)
    finally:
        REGISTRY.pop("a_cell", None)


def test_sample_looks_at_what_predict_gives():
    nodes = da.nodes(Path.vp_linear(), 4)
    for wrong, message in (
        (np.zeros(3), r"shape \(2,\) of the state, got \(3,\)"),
        (None, "got NoneType"),
        (np.array([0.0, np.nan]), "NaN or infinity"),
    ):
        with pytest.raises(RunError, match=message):
            da.sample(lambda x, node, wrong=wrong: wrong, np.ones(2), "ddim", nodes=nodes)
