"""`calibrate.ays`: the bound in closed form, the search, the SDE's runs, and the grid in schedulers."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from scipy.integrate import quad
from spectral_mixture import mixture

from diffaccel import calibrate, models
from diffaccel.artifact import Artifact
from diffaccel.calibrate.ays import bounds, distances, of_grid, sde
from diffaccel.calibrate.fit_run import Functional
from diffaccel.calibrate.grid import chain, teacher_nodes
from diffaccel.core.grid import AYS
from diffaccel.core.grid import nodes as grid_nodes
from diffaccel.core.node import Node
from diffaccel.core.path import Nodes, Path
from diffaccel.errors import ArtifactError, OptionError
from diffaccel.schedulers import TableScheduler
from diffaccel.testing import pipelines
from diffaccel.testing.problems import Gaussian, four_modes

pytestmark = pytest.mark.filterwarnings("ignore::diffaccel.errors.ArtifactWarning")
PROMPTS = ["a red fox", "a blue car", "two boats", "a hat", "snow", "a tree", "an owl", "the sea"]
SMALL: dict[str, Any] = {"samples": 4, "holdout": 4, "teacher_steps": 16, "rivals": None}
PATHS = [Path.vp_linear(), Path.edm(0.01, 80.0), Path.flow(shift=3.0)]


def closed(nodes: Nodes, variance: float) -> np.ndarray:
    """`E|D_i - D_j|^2` of Gaussian data: predictions along a noising path are a martingale, so it is a difference."""
    m = np.array([variance**2 / (variance + n.level**2) if n.alpha else 0.0 for n in nodes[:-1]])
    return np.abs(m[:, None] - m)


# ---------------------------------------------------------------------- the bound
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.family)
def test_distances_along_a_path_of_gaussian_data(path: Path) -> None:
    nodes = teacher_nodes(path, 12)
    images = 0.5 * np.random.default_rng(0).standard_normal((3, 200_000))
    runner = Functional(Gaussian(np.zeros(1), 0.5).denoise, path, np.zeros_like(images))
    found = distances(runner, range(3), nodes, images, 7)
    assert found.mean(axis=0) == pytest.approx(closed(nodes, 0.25), rel=0.05, abs=2e-4)
    for part in (range(1), range(1, 3)):  # an input's path is its own, whatever it is batched with
        again = distances(runner, part, nodes, images[list(part)], 7)
        assert again == pytest.approx(found[list(part)], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("variance", [0.04, 1.0])
def test_the_bound_is_the_published_integral(variance: float) -> None:
    """`Int t^-3 E|D(x_t) - D(x_(t_i))|^2 dt` in t = sigma/alpha (arXiv:2404.14507), by quadrature."""
    path = Path.edm(0.02, 20.0)
    nodes = teacher_nodes(path, 300)
    found = bounds(closed(nodes, variance), nodes[:-1])
    level = [n.level for n in nodes[:-1]]

    def f(t: float) -> float:
        return variance**2 / (variance + t * t)

    for i, j in ((0, 120), (40, 41), (60, 200), (150, 300)):
        wanted, _ = quad(lambda t, i=i: (f(t) - f(level[i])) / t**3, level[j], level[i], epsabs=0, limit=500)
        assert found[i, j] == pytest.approx(wanted, rel=2e-3)
    grid = [0, 50, 150, 220]
    assert of_grid(found, grid, 300) == found[0, 50] + found[50, 150] + found[150, 220] + found[220, 300]
    assert of_grid(found, grid, 180) == found[0, 50] + found[50, 150] + found[150, 180]


def test_a_start_of_pure_noise_weighs_nothing() -> None:
    nodes = teacher_nodes(Path.flow(), 20)
    found = bounds(closed(nodes, 1.0), nodes[:-1])
    assert nodes[0].alpha == 0 and np.isfinite(found[0, 1:]).all() and found[0, 1] < 1e-3
    assert np.isinf(found[3, :4]).all()


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_the_search_is_exhaustive(calls: int) -> None:
    path = Path.vp_linear()
    nodes = teacher_nodes(path, 11)
    images = np.random.default_rng(0).standard_normal((2, 2))
    runner = Functional(four_modes().denoise, path, np.zeros((2, 2)))
    costs = bounds(distances(runner, range(2), nodes, images, 0), nodes[:-1]).mean(axis=0)
    found = chain(costs, calls)
    best = min(of_grid(costs, (0, *rest), 11) for rest in combinations(range(1, 11), calls - 1))
    assert of_grid(costs, found, 11) == pytest.approx(best, rel=1e-12)


def test_small_noise_in_gaussian_data_gives_a_geometric_grid() -> None:
    """Where the level is far below the data's, the bound depends on ratios of levels only."""
    nodes = teacher_nodes(Path.edm(0.001, 0.1), 400)
    found = [nodes[k].level for k in chain(bounds(closed(nodes, 1.0), nodes[:-1]), 6)]
    ratios = [a / b for a, b in pairwise([*found, 0.001])]
    assert ratios == pytest.approx([100 ** (1 / 6)] * 6, rel=0.03)


@pytest.mark.slow
def test_the_shape_is_that_of_the_published_schedule() -> None:
    """Of ten calls for SD 1.5 (the bound ends where its last call is); the model here is the embedded one."""
    pipe = models.load("tiny-sd")
    pipe.set_progress_bar_config(disable=True)
    found = calibrate.ays(
        pipe, models.prompts(8), 10, samples=4, holdout=4, teacher_steps=60, until=0.1, guidance=4.0, progress=False,
        rivals=None, height=32, width=32,
    )  # fmt: skip
    level = np.array(found.receipt["10 calls"]["sigma/alpha"], dtype=float)
    published = np.array(AYS["sd15"])
    assert np.corrcoef(np.log(level), np.log(published))[0, 1] > 0.97
    assert np.abs(np.log(level / published)).max() < 1.0


# ---------------------------------------------------------------------- the SDE
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.family)
def test_all_grids_see_the_same_brownian_path(path: Path) -> None:
    """A model that always answers the same makes every step exact, so that the states at shared nodes agree."""
    nodes = teacher_nodes(path, 16)
    point = np.array([0.3, -1.0, 2.0])
    seen: dict[float, list[np.ndarray]] = {}

    def predict(x: np.ndarray, node: Node) -> np.ndarray:
        seen.setdefault(node.t, []).append(x)
        return np.broadcast_to(point, x.shape) + 0.0 * x

    runner = Functional(predict, path, np.random.default_rng(0).standard_normal((2, 3)))
    for chosen in (range(17), [0, 5, 9, 13], [0, 13]):
        sde(runner, range(2), nodes, chosen, 3)
    assert len(seen[nodes[13].t]) == 3 and len(seen[nodes[9].t]) == 2
    for k in (5, 9, 13):
        first, *others = seen[nodes[k].t]
        for other in others:
            assert other == pytest.approx(first, abs=1e-12)


def test_the_sde_has_the_law_of_the_data() -> None:
    """Gaussian data, many steps: mean and variance of the images; at few calls the variance is too small."""
    path = Path.vp_linear()
    nodes = teacher_nodes(path, 200)
    problem = Gaussian(np.array([0.7]), 0.4)
    runner = Functional(problem.denoise, path, np.random.default_rng(0).standard_normal((1, 40_000)))
    many, few = (sde(runner, [0], nodes, chosen, 0) for chosen in (range(201), [0, 60, 120]))
    assert float(many.mean()) == pytest.approx(0.7, abs=0.01)
    assert float(many.std()) == pytest.approx(0.4, rel=0.05)
    assert abs(float(few.std()) - 0.4) > 3 * abs(float(many.std()) - 0.4)


# ---------------------------------------------------------------------- functions
def test_the_bound_falls_on_images_that_it_was_not_found_on() -> None:
    path = Path.vp_linear()
    noise = np.random.default_rng(1).standard_normal((48, 64))
    images = mixture().draw(np.random.default_rng(2), 48)
    options: dict[str, Any] = {"images": images, "teacher_steps": 60}
    found = calibrate.ays_function(mixture().denoise, path, noise, (5, 10), until=None, **options)
    for calls in (5, 10):
        report = found.receipt[f"{calls} calls"]
        assert report["bound on held-out images [ratio to the base, 95 %]"][2] < 1
        assert min(report["mean bounds"].values()) == report["mean bounds"]["AYS"]
    assert found.meta["options"]["images"] == "given"
    auto = calibrate.ays_function(mixture().denoise, path, noise, 5, **options)
    tried = auto.receipt["5 calls"]["SDE error on the fitted inputs, by end"]
    assert tried[str(auto.receipt["5 calls"]["the bound ends at sigma/alpha"])] == min(tried.values())


def test_where_nothing_helps_it_holds_the_base_grid() -> None:
    """One call: every grid is the same."""
    path = Path.vp_linear()
    noise = np.random.default_rng(1).standard_normal((16, 64))
    found = calibrate.ays_function(mixture().denoise, path, noise, 1, samples=8, teacher_steps=24)
    assert found.receipt["1 calls"]["verdict"] == "no benefit found: it holds time"
    assert found.tensors["n1.node"] == pytest.approx(np.array([path.first.key]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": 200.0}, "until must be a level from"),
        ({"until": "best"}, "'auto', got 'best'"),
        ({"until": 100.0}, "too few for 4 calls"),
        ({"calls": 9}, "nothing to gain"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    noise = np.random.default_rng(0).standard_normal((8, 64))
    with pytest.raises(OptionError, match=message):
        calibrate.ays_function(
            mixture().denoise, Path.vp_linear(), noise, **{"samples": 4, "calls": 4, "teacher_steps": 24, **options}
        )


# ---------------------------------------------------------------------- pipelines
def call_of(name: str) -> dict[str, Any]:
    drop = ("prompt", "num_inference_steps", "output_type", "generator")
    return {k: v for k, v in pipelines.call_kwargs(name).items() if k not in drop}


@pytest.fixture(scope="module")
def sd15() -> tuple[Any, Artifact]:
    pipe = pipelines.build("sd15")
    return pipe, calibrate.ays(pipe, PROMPTS, (2, 3), **SMALL, progress=False, **call_of("sd15"))


@pytest.mark.parametrize("name", ["v", "sd3"])
def test_v_and_flow_pipelines_have_a_grid(name: str) -> None:
    kind = "sd15" if name == "v" else name
    pipe = pipelines.build(kind)
    if name == "v":
        pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    before = pipe.scheduler
    made = calibrate.ays(pipe, PROMPTS, 3, until=1.0, **SMALL, progress=False, batch=3, **call_of(kind))
    assert pipe.scheduler is before
    scheduler = TableScheduler.from_config(before.config, sampler="dpmpp_2m_sde", grid=made, pipe=pipe)
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == pytest.approx(made.tensors["n3.node"][:, 0].tolist(), rel=1e-6)


def test_the_grid_serves_every_scheduler(sd15: tuple[Any, Artifact], tmp_path: FilePath) -> None:
    """Any sampler of ours, by artifact or file; saved with the config alone; diffusers' own by `timesteps`."""
    pipe, made = sd15
    config, file = pipe.scheduler.config, tmp_path / "ays.safetensors"
    made.save(file)
    times = made.tensors["n3.node"][:, 0].tolist()
    for grid in (made, file, str(file)):
        scheduler = TableScheduler.from_config(config, sampler="ddpm", grid=grid, pipe=pipe)
        scheduler.save_pretrained(tmp_path)
        for each in (scheduler, TableScheduler.from_pretrained(tmp_path), TableScheduler.from_config(scheduler.config)):
            each.set_timesteps(3)
            assert each.timesteps.tolist() == pytest.approx(times, rel=1e-6)
    scheduler.set_timesteps(2)
    with pytest.raises(OptionError, match="holds times for 2, 3 calls, not 4"):
        scheduler.set_timesteps(4)
    own = DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++")
    own.set_timesteps(timesteps=[round(t) for t in times])
    assert own.timesteps.tolist() == [round(t) for t in times]
    pipe.scheduler, before = scheduler, pipe.scheduler
    call = {**pipelines.call_kwargs("sd15"), "num_inference_steps": 3, "output_type": "latent"}
    try:
        assert torch.isfinite(pipe(**call).images).all()
    finally:
        pipe.scheduler = before


def test_a_grid_of_another_path_or_checkpoint_is_refused(sd15: tuple[Any, Artifact]) -> None:
    pipe, made = sd15
    config = pipe.scheduler.config
    with pytest.raises(ArtifactError, match="calibrated on another path"):
        TableScheduler.from_config(config, sampler="ddpm", grid=made, beta_end=0.02)
    with pytest.raises(ArtifactError, match="other weights"):
        TableScheduler.from_config(config, grid=made, pipe=pipelines.build("sd15", seed=1))
    with pytest.raises(OptionError, match="grid_options= has no effect"):
        TableScheduler.from_config(config, grid=made, grid_options={"rho": 7.0})
    with pytest.raises(ArtifactError, match="'ays' is needed"):
        TableScheduler.from_config(config, grid=Artifact("fit", {}, {}, "f.safetensors"))
    with pytest.raises(OptionError, match="takes no calibrated data"):
        TableScheduler.from_config(config, artifact=made)
    with pytest.raises(OptionError, match="pipe= and strict= are for"):
        TableScheduler.from_config(config, grid="karras", pipe=pipe)


def test_planned_calls_bound_what_is_spent(capsys: pytest.CaptureFixture[str]) -> None:
    made = calibrate.ays(pipelines.build("sd15"), PROMPTS, 2, **SMALL, **call_of("sd15"))
    planned = int(capsys.readouterr().out.split("at most ")[1].split()[0])
    assert 0.5 * planned < made.meta["cost"]["calls"] <= planned


def test_images_of_the_users_own(sd15: tuple[Any, Artifact]) -> None:
    pipe, _ = sd15
    images = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    made = calibrate.ays(pipe, PROMPTS, 2, images=images, until=1.0, **SMALL, progress=False, **call_of("sd15"))
    assert made.meta["options"]["images"] == "given"
    with pytest.raises(OptionError, match=r"of shape \(8, 4, 16, 16\)"):
        calibrate.ays(pipe, PROMPTS, 2, images=images[:3], **SMALL, progress=False, **call_of("sd15"))


# ---------------------------------------------------------------------- the grid `listed`
def test_listed_times() -> None:
    path = Path.flow(shift=3.0)
    times = [1000.0, 800.0, 300.0]
    found = grid_nodes(path, 3, "listed", times=times)
    assert [n.t for n in found[:-1]] == times and found[-1].sigma == 0
    assert [n.key for n in grid_nodes(path, 3, "listed", times={"3": times, "5": []})] == [n.key for n in found]
    assert grid_nodes(path, 3, "listed", times=times, final="sigma_min")[-1].key == path.last.key
    assert math.isclose(found[1].sigma, 0.8)  # no shift
    with pytest.raises(OptionError, match="needs times"):
        grid_nodes(path, 3, "listed")
    with pytest.raises(OptionError, match="noise must fall"):
        grid_nodes(path, 3, "listed", times=times[::-1])
