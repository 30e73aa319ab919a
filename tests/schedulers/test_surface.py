"""What training code, pipelines and people read from a scheduler: noise, velocities, descriptions, refusals."""

from __future__ import annotations

import re

import diffusers
import numpy as np
import pytest
import torch
from scheduler_runs import PATHS, SD, generator, loop, make, model, noise

from diffaccel import TableScheduler
from diffaccel.errors import DiffaccelError, OptionError, PathError, RunError
from diffaccel.schedulers import UniPCScheduler
from diffaccel.testing.pipelines import build

X, Z = noise(3, 4, 4, 4), noise(3, 4, 4, 4, seed=1)


# ---------------------------------------------------------------------- noise, as training scripts ask for it
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("t", [[0, 500, 999], [321]], ids=["each", "one"])
def test_add_noise_and_velocity_equal_ddpm(t, dtype):
    stock = diffusers.DDPMScheduler(**SD)
    ours = TableScheduler.from_config(stock.config)
    x, z, t = X.to(dtype), Z.to(dtype), torch.tensor(t)
    for name in ("add_noise", "get_velocity"):
        got, expected = getattr(ours, name)(x, z, t), getattr(stock, name)(x.double(), z.double(), t)
        assert got.dtype == dtype
        assert torch.allclose(got.double(), expected, rtol=0, atol=4e-3 if dtype is torch.float16 else 2e-6), name


def test_scale_noise_equals_flow_match_euler():
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = TableScheduler.from_config(stock.config, grid="flow_stock")
    stock.set_timesteps(8)
    ours.set_timesteps(8)
    for begin in (0, 3, 7):
        for scheduler in (stock, ours):
            scheduler.set_begin_index(begin)
        t = stock.timesteps[begin : begin + 1].repeat(3)
        assert torch.allclose(ours.scale_noise(X, t, Z), stock.scale_noise(X, t, Z), atol=1e-6)
        assert torch.equal(ours.scale_noise(X, t, Z), ours.add_noise(X, Z, t))
    with pytest.raises(RunError, match=r"scale_noise\(sample, timestep, noise\)"):
        ours.scale_noise(X, t)


def test_noise_follows_the_run():
    """Before the first call the node that the run begins at, then the one just reached; afterwards what is asked."""
    scheduler = make()
    scheduler.set_timesteps(4)
    t = scheduler.timesteps
    nodes = scheduler.table.nodes

    def level():
        return scheduler.add_noise(0 * X, torch.ones_like(X), t[:1]).flatten()[0].item()

    scheduler.set_begin_index(1)
    levels, x = [level()], X
    for k in t[1:]:
        x = scheduler.step(model(x, k), k, x)[0]
        levels.append(level())
    assert levels == pytest.approx([*(n.sigma for n in nodes[1:-1]), nodes[0].sigma], rel=1e-6)
    batch = scheduler.add_noise(0 * X, torch.ones_like(X), torch.tensor([0, 500, 999]))  # training goes on beside it
    assert (1 - batch[:, 0, 0, 0] ** 2).tolist() == pytest.approx(
        scheduler.alphas_cumprod[[0, 500, 999]].tolist(), rel=1e-4
    )


def test_velocity_is_for_vp_models():
    for path in ("flow", "edm"):
        with pytest.raises(RunError, match=f"get_velocity is for VP models; this path is '{path}'"):
            make(path).get_velocity(X, Z, torch.tensor([1]))


# ---------------------------------------------------------------------- descriptions
@pytest.mark.parametrize("path", PATHS)
def test_explain_has_a_line_for_every_row(path):
    scheduler = make(path, "dpmpp", order=3)
    with pytest.raises(RunError, match="set_timesteps"):
        scheduler.explain()
    scheduler.set_timesteps(6)
    text = scheduler.explain()
    assert f"path {scheduler.config.path}, model predicts {scheduler.config.prediction_type}" in text.splitlines()[0]
    assert "dpmpp(order=3" in text and "6 calls" in text
    rows = re.findall(r"^ *(\d) +(-?[\d.]+) +(-?[\d.]+|-inf) ", text, re.M)
    assert [int(i) for i, _, _ in rows] == list(range(6))
    fed = [float(t) for _, t, _ in rows]
    assert fed == pytest.approx(scheduler.timesteps.tolist(), abs=1e-4)


@pytest.mark.parametrize("told", [True, False])
def test_explain_shows_the_rows_of_a_run_begun_in_the_middle(told):
    scheduler = make("sd15", "dpmpp", order=3)
    scheduler.set_timesteps(6)
    whole = scheduler.explain()
    if told:
        scheduler.set_begin_index(2)
        before = scheduler.explain()
    scheduler.step(X, scheduler.timesteps[2], X)
    text = scheduler.explain()
    assert not told or before == text
    assert "6 calls" in whole and "4 calls, begun at call 2" in text
    rows = dict(re.findall(r"^ *(\d) +(-?[\d.]+) ", text, re.M))
    assert [int(i) for i in rows] == [2, 3, 4, 5]
    assert [float(t) for t in rows.values()] == pytest.approx(scheduler.timesteps[2:].tolist(), abs=1e-4)
    held = re.findall(r"^ *2 .*? x0 .*?\|", text, re.M)[0]
    assert len(held.split()) == 7  # i, t, lam, space, a, one coefficient, |: the run has no history there


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "unipc", "heun"])
def test_table_tensor_replays_the_run(sampler):
    """For CUDA graphs: the row is chosen by a tensor, and nothing but the table is needed."""
    scheduler = make("cosine", sampler)  # predicts x0, the space of these rows
    scheduler.set_timesteps(7)
    table = scheduler.table_tensor()
    assert table.shape == (7, 1 + scheduler.table.depth) and table.dtype == torch.float32
    x, history = X, torch.zeros(scheduler.table.depth, *X.shape)
    for i, t in enumerate(scheduler.timesteps):
        row = table[torch.tensor(i)]
        history = torch.cat([model(x, t)[None], history[:-1]])
        x = row[0] * x + (row[1:].view(-1, 1, 1, 1, 1) * history).sum(0)
    assert torch.allclose(x, loop(scheduler, X), atol=1e-5)


def test_table_tensor_refuses_what_it_cannot_hold():
    scheduler = make(sampler="ddpm")
    scheduler.set_timesteps(4)
    with pytest.raises(OptionError, match="'ddpm' has more than scalar coefficients"):
        scheduler.table_tensor()


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "dpmp"}, "unknown sampler 'dpmp'. Did you mean 'dpmpp'"),
        ({"sampler": "dpmpp", "order": 4}, "order must be an integer from 1 to 3, got 4"),
        ({"sampler": "dpmpp", "ordre": 2}, "takes no option 'ordre'"),
        ({"sampler": "ddim", "order": 2}, "takes no option 'order'. Sampler 'ddim' takes: eta"),
        ({"grid": "karas"}, "unknown grid 'karas'. Did you mean 'karras'"),
        ({"grid": "karras", "grid_options": {"roh": 7}}, "no option 'roh'. Did you mean 'rho'"),
        ({"use_karras_sigmas": True}, "grid='karras'"),
        ({"final_sigmas_type": "one"}, "unknown final_sigmas_type 'one'"),
        ({"check_finite": "gpu"}, "unknown check_finite 'gpu'"),
        ({"prediction_type": "eps"}, "prediction_type 'eps' does not belong to a vp path"),
        ({"path": "vpp"}, "unknown path 'vpp'"),
        (
            {"shift": 3.0},
            "shift of flow models stands beside beta_start, beta_end, beta_schedule: two keys",
        ),
    ],
    ids=str,
)
def test_bad_options_are_named_before_any_call(options, message):
    with pytest.raises(DiffaccelError, match=re.escape(message).replace(r"\ ", " ")):
        scheduler = TableScheduler.from_config(diffusers.PNDMScheduler(**SD).config, **options)
        scheduler.set_timesteps(6)


def test_constructor_refuses_the_same():
    for settings in ({"sampler": "nope"}, {"sampler_options": {"x": 1}}, {"grid": "nope"}):
        with pytest.raises(OptionError):
            TableScheduler(**SD, **settings)
    with pytest.raises(PathError, match="edm"):
        TableScheduler(path="edm")
    with pytest.raises(OptionError, match="UniPCScheduler is the sampler 'unipc'; use TableScheduler for 'ddim'"):
        UniPCScheduler(**SD, sampler="ddim")


def test_generators_must_fit_the_batch():
    scheduler = make(sampler="ddpm")
    scheduler.set_timesteps(3)
    with pytest.raises(RunError, match="2 generators for a batch of 3"):
        scheduler.step(X, scheduler.timesteps[0], X, generator=[generator(0), generator(1)])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_generators_of_images_where_the_pipeline_steps_pairs(guidance):
    """DiT with guidance hands `step` twice as many samples as images: each image has its own generator's noise."""
    pipe = build("dit")
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="ddpm")

    def made(labels, seeds):
        pipe.scheduler.generator = [generator(s) for s in seeds]
        given = {"num_inference_steps": 4, "guidance_scale": guidance, "output_type": "np"}
        return pipe(labels, generator=[generator(s) for s in seeds], **given).images

    both = made([1, 2], [5, 6])
    assert np.abs(both[1:] - made([2], [6])).max() < 1e-5  # the batch size rounds
    other = made([1, 2], [5, 7])
    assert np.array_equal(both[0], other[0]) and not np.array_equal(both[1], other[1])
    pipe.scheduler.generator = [generator(s) for s in range(3)]
    with pytest.raises(RunError, match="3 generators for a batch of"):
        pipe([1, 2], num_inference_steps=4, guidance_scale=guidance, output_type="np")


def test_from_config_returns_unused_arguments_as_diffusers_does():
    scheduler, unused = TableScheduler.from_config(diffusers.DDIMScheduler(**SD).config, return_unused_kwargs=True)
    assert isinstance(scheduler, TableScheduler) and unused == {}


def test_a_pipeline_may_change_the_config_after_construction():
    """SD's `__init__` replaces the whole config where `steps_offset` is not 1."""
    pipe = build("sd15")
    stock = diffusers.DPMSolverMultistepScheduler(**SD, steps_offset=0)
    ours = TableScheduler.from_config(stock.config, sampler="unipc", order=3)
    ours.set_timesteps(5)
    table = ours.table
    again = type(pipe)(**{**pipe.components, "scheduler": ours, "requires_safety_checker": False})
    assert again.scheduler.config.steps_offset == 1
    again.scheduler.set_timesteps(5)
    assert again.scheduler.table == table
