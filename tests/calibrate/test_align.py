"""`calibrate.align`: fed timesteps whose best values are known, its guard, and what comes out of pipelines."""

from __future__ import annotations

import math
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch
from spectral_mixture import mixture

from diffaccel import calibrate
from diffaccel.artifact import Artifact
from diffaccel.calibrate.align_core import Aligning, cost, gaps, solved
from diffaccel.calibrate.engine import Engine
from diffaccel.calibrate.fit_core import Fitting, Plan
from diffaccel.calibrate.fit_pipe import Piped
from diffaccel.calibrate.fit_run import Functional, analytic, student
from diffaccel.core.grid import nodes as grid_nodes
from diffaccel.core.node import Node
from diffaccel.core.path import Nodes, Path
from diffaccel.errors import ArtifactError, OptionError
from diffaccel.samplers.fitted import Tables
from diffaccel.schedulers import FittedScheduler, TableScheduler
from diffaccel.testing import pipelines
from diffaccel.testing.problems import Gaussian

pytestmark = pytest.mark.filterwarnings("ignore::diffaccel.errors.ArtifactWarning")
PROMPTS = ["a red fox", "a blue car", "two boats", "a hat", "snow", "a tree", "an owl", "the sea"]
SMALL: dict[str, Any] = {"samples": 4, "holdout": 4, "teacher_steps": 24, "rounds": 2, "rivals": None}


def reading_t(problem: Any, path: Path) -> Any:
    """A model that knows the level only from the t that it is fed."""
    return lambda x, node: problem.denoise(x, path.at(node.t))


# ---------------------------------------------------------------------- known values
@pytest.mark.parametrize("std", [0.3, 0.5])
@pytest.mark.parametrize("path", [Path.vp_linear(), Path.flow()], ids=lambda p: p.family)
def test_one_call_is_told_the_level_at_which_the_prediction_is_the_image(path: Path, std: float) -> None:
    """Gaussian data: the image of x is `x std / sqrt(alpha^2 std^2 + sigma^2)`, the prediction at t is `x gain(t)`."""
    problem = Gaussian(np.zeros(4), std)
    noise = np.random.default_rng(1).standard_normal((24, 4))
    found = calibrate.align_function(
        reading_t(problem, path), path, noise, 1, samples=8, teacher_steps=400, base="ddim", rounds=12, reach=1.0
    )
    fed = path.at(found.tensors["n1.node"][0, 0])
    wanted = std / math.sqrt((path.first.alpha * std) ** 2 + path.first.sigma**2)
    gain = fed.alpha * std**2 / ((fed.alpha * std) ** 2 + fed.sigma**2)
    assert gain == pytest.approx(wanted, rel=1e-3)  # the teacher's own error
    report = found.receipt["1 calls"]
    assert report["verdict"] == "aligned" and report["held-out"]["worst"] < 1e-4
    assert found.tensors["n1.node"][0, 1:].tolist() == [path.first.alpha, path.first.sigma]


@pytest.mark.parametrize("calls", [3, 4])
@pytest.mark.parametrize("path", [Path.vp_linear(), Path.flow()], ids=lambda p: p.family)
def test_more_shifts_than_variances_are_exact(path: Path, calls: int) -> None:
    """First-order rows, two variances: the shifts meet the flow map of both, on noise that they were not found on."""
    problem = Gaussian(np.zeros(4), np.array([0.3, 0.3, 0.7, 0.7]))
    noise = np.random.default_rng(1).standard_normal((24, 4))
    found = calibrate.align_function(
        reading_t(problem, path), path, noise, calls, samples=8, teacher_steps=200, base="ddim", rounds=30, reach=1.0
    )
    report = found.receipt[f"{calls} calls"]
    assert report["held-out"]["worst"] < 1e-10 < 0.3 < report["error on the inputs that were fitted to"]["unaligned"]


@pytest.mark.parametrize(
    ("base", "grid"), [("dpmpp", "linspace_open"), ("dpmpp", "uniform_lambda"), ("ddim", "karras")]
)
def test_it_lowers_the_held_out_error_of_a_mixture(base: str, grid: str) -> None:
    path = Path.vp_linear()
    noise = np.random.default_rng(1).standard_normal((112, 64))
    found = calibrate.align_function(
        reading_t(mixture(), path), path, noise, 6, teacher_steps=60, base=base, grid=grid, rounds=6
    )
    report = found.receipt["6 calls"]
    assert report["verdict"] == "aligned" and report["ratio to it [95 %]"][2] < 0.9


def test_a_fitted_table_can_be_aligned() -> None:
    """Its coefficients and levels stay; it is compared with itself."""
    path, noise = Path.vp_linear(), np.random.default_rng(1).standard_normal((40, 64))
    model = reading_t(mixture(), path)
    base = calibrate.fit_function(model, path, noise, 5, samples=8, teacher_steps=40, grids="dp2", moves=0)
    found = calibrate.align_function(model, path, noise, 5, base=base, samples=8, teacher_steps=40)
    assert np.array_equal(found.tensors["n5.w"], base.tensors["n5.w"])
    assert np.array_equal(found.tensors["n5.start"], base.tensors["n5.start"])
    assert np.array_equal(found.tensors["n5.node"][:, 1:], base.tensors["n5.node"][:, 1:])
    own = next(b for b in found.receipt["5 calls"]["baselines"] if b["name"].endswith("unaligned"))
    assert own["median"] == pytest.approx(base.receipt["5 calls"]["held-out"]["median"], rel=1e-3)


def test_equations_are_those_of_the_normalised_residuals() -> None:
    """Whatever the batches; their gradient is that of the mean log error."""
    path, noise = Path.vp_linear(), np.random.default_rng(1).standard_normal((12, 4))
    problem = Gaussian(np.zeros(4), np.array([0.3, 0.5, 0.7, 0.9]))
    nodes = grid_nodes(path, 4)
    found = []
    for batch in (3, 8):
        made = Fitting(Functional(reading_t(problem, path), path, noise, batch), Plan((4,), 8, 4, 40, rivals="none"))
        made.keeps = False
        made.learn()
        job = Aligning(made, nodes, analytic(nodes, 3), 0.5)
        at = np.array([-0.1, 0.05, 0.1, 0.02])
        found.append(job.equations(at, range(8)))
    for a, b in zip(*found, strict=True):
        assert a == pytest.approx(b, rel=1e-10)
    slopes = []
    for i in range(4):
        h = 0.01 * np.eye(4)[i]
        up, down = (np.log(job.errors(at + s * h, range(8)).values).sum() for s in (1, -1))
        slopes.append((up - down) / 0.02)
    assert found[0][1] == pytest.approx(np.array(slopes), rel=0.1, abs=0.02 * float(np.abs(slopes).max()))


def test_parts_of_a_step() -> None:
    assert gaps([10.0, 7.0, 3.0, 0.0]) == pytest.approx([3.0, 3.5, 3.5])
    a = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.0]])
    step = solved(a, np.array([1.0, 2.0, 0.0]), 0.0)
    assert step[2] == 0 and a[:2, :2] @ step[:2] == pytest.approx([-1.0, -2.0])
    assert cost(4, 8, 2) == 4 * (8 + 2 * (4 * 5 + 8 * 4))


# ---------------------------------------------------------------------- guard
def test_a_model_that_does_not_read_t_gains_nothing() -> None:
    """The artifact holds the unaligned table, and says so."""
    path, noise = Path.flow(), np.random.default_rng(1).standard_normal((24, 64))
    found = calibrate.align_function(mixture().denoise, path, noise, 4, samples=8, teacher_steps=40)
    report = found.receipt["4 calls"]
    assert report["verdict"].startswith("analytic: no benefit found")
    assert report["rounds"].startswith("none kept")
    nodes = grid_nodes(path, 4)
    assert found.tensors["n4.node"] == pytest.approx(np.array([n.key for n in nodes[:-1]]), abs=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "1 round or more"),
        ({"reach": 0.0}, "a reach in"),
        ({"base": "ddpm"}, "draws no noise"),
        ({"base": "heun"}, "one call an interval"),
        ({"base": "ghvb"}, "is none of order"),
        ({"base": "dpmpp", "options": {"oder": 2}}, "oder"),
        ({"base": "dpmpp", "grid": "karas"}, "unknown grid 'karas'"),
    ],
)
def test_what_cannot_be_aligned(options: dict[str, Any], message: str) -> None:
    noise = np.random.default_rng(0).standard_normal((12, 64))
    with pytest.raises(OptionError, match=message):
        calibrate.align_function(
            mixture().denoise, Path.flow(), noise, **{"samples": 4, "calls": 4, "teacher_steps": 24, **options}
        )


# ---------------------------------------------------------------------- pipelines
def call_of(name: str) -> dict[str, Any]:
    drop = ("prompt", "num_inference_steps", "output_type", "generator")
    return {k: v for k, v in pipelines.call_kwargs(name).items() if k not in drop}


@pytest.mark.parametrize("name", ["sd15", "v", "sd3"])
def test_the_scheduler_feeds_what_was_found(name: str, tmp_path: FilePath) -> None:
    """With guidance; an eps, a v and a flow pipeline. The model sees the fed t, the images are those of the receipt."""
    kind = "sd15" if name == "v" else name
    pipe = pipelines.build(kind)
    if name == "v":
        pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    before, call = pipe.scheduler, call_of(kind)
    made = calibrate.align(pipe, PROMPTS, 4, **SMALL, progress=False, batch=4, **call)
    assert pipe.scheduler is before and made.meta["cost"] == made.receipt["cost"]
    tensors = dict(made.tensors)
    if made.receipt["4 calls"]["verdict"] != "aligned":  # random weights may gain nothing: then with shifts of our own
        tensors["n4.node"] = tensors["n4.node"] * np.array([0.97, 1.0, 1.0])
        made = Artifact("align", tensors, made.meta)
    rows = Tables.of(made).rows(4)
    runner = Piped(Engine(pipe, PROMPTS, call=call, batch=4, progress=False))
    wanted = student(runner, range(4, 8), Nodes(rows.nodes(runner.path.end), runner.path), rows.w)
    FittedScheduler.from_config(before.config, artifact=made, pipe=pipe).save_pretrained(tmp_path)
    pipe.scheduler = FittedScheduler.from_pretrained(tmp_path)
    seen: list[float] = []
    network = getattr(pipe, "unet", None) or pipe.transformer
    network.register_forward_pre_hook(
        lambda m, a, k: seen.append(float((k.get("timestep") if "timestep" in k else a[1]).flatten()[0])),
        with_kwargs=True,
    )
    found = pipe(
        prompt=[PROMPTS[i] for i in range(4, 8)],
        generator=[torch.Generator().manual_seed(i) for i in range(4, 8)],
        num_inference_steps=4,
        output_type="latent",
        **call,
    ).images
    assert seen == pytest.approx(rows.node[:, 0].tolist(), rel=1e-6)
    assert found.detach().float().numpy() == pytest.approx(wanted, abs=2e-5 * float(np.abs(wanted).max()))


def test_a_searched_table_can_be_aligned_and_nothing_twice(capsys: pytest.CaptureFixture[str]) -> None:
    pipe, call = pipelines.build("sd15"), call_of("sd15")
    small = {k: v for k, v in SMALL.items() if k != "rounds"}
    searched = calibrate.search(pipe, PROMPTS, 3, **small, trials=2, beam_width=1, progress=False, **call)
    capsys.readouterr()
    made = calibrate.align(pipe, PROMPTS, 3, base=searched, **SMALL, **call)
    planned = int(capsys.readouterr().out.split("at most ")[1].split()[0])
    assert 0.3 * planned < made.meta["cost"]["calls"] <= planned
    assert np.array_equal(made.tensors["n3.w"], searched.tensors["n3.w"])
    assert np.array_equal(made.tensors["n3.node"][:, 1:], searched.tensors["n3.node"][:, 1:])
    with pytest.raises(OptionError, match="is aligned already"):
        calibrate.align(pipe, PROMPTS, 3, base=made, **SMALL, progress=False, **call)
    with pytest.raises(OptionError, match="an artifact has its rows"):
        calibrate.align(pipe, PROMPTS, 3, base=searched, grid="karras", **SMALL, progress=False, **call)
    with pytest.raises(ArtifactError, match="holds tables for 3 calls, not 4"):
        calibrate.align(pipe, PROMPTS, 4, base=searched, **SMALL, progress=False, **call)
    with pytest.raises(ArtifactError, match="other weights"):
        calibrate.align(pipelines.build("sd15", seed=1), PROMPTS, 3, base=searched, **SMALL, progress=False, **call)


def test_levels_stay_where_they_are() -> None:
    path = Path.flow()
    nodes = grid_nodes(path, 4)
    made = Fitting(Functional(mixture().denoise, path, np.zeros((8, 64))), Plan((4,), 4, 4, 24, rivals="none"))
    fed = Aligning(made, nodes, analytic(nodes, 2), 2.0).at(np.array([0.5, -0.25, 0.0, 2.0]))
    assert [(n.alpha, n.sigma) for n in fed] == [(n.alpha, n.sigma) for n in nodes]
    assert fed[0].t == path.first.t  # never beyond what the model was trained on
    assert fed[1].t == pytest.approx(nodes[1].t - 0.25 * (nodes[0].t - nodes[2].t) / 2)
    assert all(isinstance(n, Node) for n in fed)
