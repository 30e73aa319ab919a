"""The command in one process: schedulers by name, counted calls, and what is wrong in a command."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import diffaccel as da
from diffaccel import drive, models, painter
from diffaccel.artifact import Receipt, path_identity
from diffaccel.cli import main
from diffaccel.errors import DiffaccelError, OptionError, RunError
from diffaccel.identity import model_identity
from diffaccel.parallel.generate import generate, tasks_for, to_pixels
from diffaccel.pipelines.recipe import Choice, Recipe
from diffaccel.samplers.registry import samplers
from diffaccel.schedulers.from_config import read
from diffaccel.testing.pipelines import build

SIZE = {"height": 32, "width": 32}
TASKS = tasks_for(["a red fox", "a blue coat"])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build("sd15").save_pretrained(folder)
    return folder


@pytest.fixture
def command(model, tmp_path):
    """The arguments of a run that works; `{key: value}` changes options, None drops one."""
    (tmp_path / "prompts.txt").write_text("a red fox\na blue coat\n", encoding="utf-8")
    given = {"prompts": tmp_path / "prompts.txt", "out": tmp_path / "out", "calls": 3, "batch": 2, **SIZE}

    def make(changes: dict, *more: str, which: object = model) -> list[str]:
        options = {k: v for k, v in {**given, **changes}.items() if v is not None}
        return ["generate", str(which), "--cpu", *(f"--{k}={v}" for k, v in options.items()), *more]

    return make


# ---------------------------------------------------------------------- calls
@pytest.mark.parametrize(
    "name, options",
    [
        ("sd15", {"guidance_scale": 4.0, **SIZE}),
        ("sdxl", {**SIZE}),
        ("sd3", {"guidance_scale": 4.0, "max_sequence_length": 16, **SIZE}),
        ("flux", {"max_sequence_length": 16, **SIZE}),  # its grid needs mu, which only the pipeline knows
        ("qwen_image", {"negative_prompt": " ", "true_cfg_scale": 2.0, **SIZE}),  # guidance in two passes
    ],
)
def test_calls_are_exact_and_images_depend_on_their_seed_alone(name, options):
    pipe = build(name)
    both = painter.Painter(pipe, 4, options)(TASKS)
    assert both.calls == 4 and both.images.shape == (2, 32, 32, 3)
    again = painter.Painter(pipe, 4, options)(TASKS)
    assert np.array_equal(both.images, again.images)
    other = painter.Painter(pipe, 4, options)(tasks_for(["a red fox", "a blue coat"], [0, 9]))
    assert np.array_equal(both.images[0], other.images[0]) and not np.array_equal(both.images[1], other.images[1])


def test_classes_need_no_prompts(tmp_path, capsys):
    build("dit").save_pretrained(tmp_path / "model")
    given = ["generate", str(tmp_path / "model"), "--cpu", "--calls", "2", "--out", str(tmp_path / "out")]
    assert main([*given, "--seeds", "3-7"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert [(r["prompt"], r["seed"]) for r in lines] == [(str(k), k + 3) for k in range(5)]


def test_empty_prompts_are_made_and_counted(model, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a fox\n\na hat\n", encoding="utf-8")
    given = ["generate", str(model), "--cpu", "--calls", "3", "--prompts", str(tmp_path / "p.txt")]
    assert main([*given, "--out", str(tmp_path / "out"), "--height", "32", "--width", "32"]) == 0
    said = capsys.readouterr()
    assert "1 of 3 images have an empty prompt" in said.err and "is complete: 3 images" in said.out


@pytest.mark.parametrize(
    "name, more, prompts",
    [
        ("tiny-sd", {"guidance": 4, **SIZE}, models.prompts(16)),
        ("tiny-flow", {"seeds": "4-6", "guidance": 4, **SIZE}, models.prompts(3)),
        ("tiny-pixel", {"seeds": "0-1"}, ["0", "1"]),
    ],
)
def test_the_embedded_models(name, more, prompts, tmp_path):
    """Each makes images of its own prompts, from the command alone: one for each seed, or 16."""
    given = ["generate", name, "--cpu", "--calls", "2", "--out", str(tmp_path / "out")]
    assert main([*given, *(f"--{k}={v}" for k, v in more.items())]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in lines] == prompts and {(r["calls"], r["flaw"]) for r in lines} == {(2, None)}
    assert len({r["sha256"] for r in lines}) == len(prompts)


def test_class_labels():
    found = painter.Painter(build("dit"), 3, {})(tasks_for(["1", "2"]))
    assert found.calls == 3 and len(found.images) == 2
    with pytest.raises(OptionError, match="must be a number, got 'a fox'"):
        painter.Painter(build("dit"), 3, {})(tasks_for(["a fox"]))


@pytest.mark.parametrize("scheduler, calls, steps", [("PNDMScheduler", 5, 4), ("HeunDiscreteScheduler", 5, 3)])
def test_schedulers_that_make_more_calls_than_steps(scheduler, calls, steps):
    pipe = build("sd15")
    pipe.scheduler = painter.scheduler_for(pipe.scheduler.config, type(pipe.scheduler), scheduler, {})
    made = painter.Painter(pipe, calls, SIZE)
    assert made.steps == steps and made(TASKS).calls == calls


def test_a_budget_that_cannot_be_met():
    pipe = build("sd15")
    pipe.scheduler = painter.scheduler_for(pipe.scheduler.config, type(pipe.scheduler), "HeunDiscreteScheduler", {})
    with pytest.raises(OptionError, match=r"cannot spend exactly 4 model calls; nearby it can make 3 \(2 steps\)"):
        painter.Painter(pipe, 4, SIZE)


@pytest.mark.parametrize("calls, steps", [(13, 4), (14, 5), (22, 13)])
def test_every_budget_that_pndm_can_spend(calls, steps):
    """Its Runge-Kutta start costs 9 calls more, and it cannot do fewer than 4 steps."""
    scheduler = diffusers.PNDMScheduler()
    assert drive.steps_for(scheduler, calls) == steps
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == calls
    for budget in (1, 3, 5, 12):
        with pytest.raises(OptionError, match=rf"exactly {budget} model calls; nearby it can make 13 \(4 steps\)$"):
            drive.steps_for(scheduler, budget)


def test_a_wrong_count_is_an_error():
    made = painter.Painter(build("sd15"), 4, SIZE)
    made.steps = 4  # PNDM makes one more
    with pytest.raises(RunError, match="asked for 4 model calls an image and made 5"):
        made(TASKS)


@pytest.mark.parametrize("scheduler", ["unipc", "EulerDiscreteScheduler"])
def test_a_nan_is_counted_and_does_not_end_the_run(scheduler):
    pipe = build("sd15")
    pipe.unet.conv_out.bias.fill_(float("nan"))
    pipe.scheduler = painter.scheduler_for(pipe.scheduler.config, type(pipe.scheduler), scheduler, {})
    images = painter.Painter(pipe, 3, SIZE)(TASKS).images
    assert [to_pixels(image)[1] for image in images] == ["nan", "nan"]


@pytest.mark.parametrize(
    "scheduler, options",
    [
        ("dpmpp_2m_sde", {}),  # SD3 gives its scheduler no generator
        ("DPMSolverSDEScheduler", {}),  # draws a seed from torch's own source
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ],
)
def test_noise_that_no_generator_is_given_for(scheduler, options, tmp_path):
    """The same bytes in two folders, also where a batch is made again; and torch's own source is left alone."""
    if scheduler == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    pipe = models.load("tiny-sd" if scheduler == "DPMSolverSDEScheduler" else "tiny-flow")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = painter.scheduler_for(pipe.scheduler.config, type(pipe.scheduler), scheduler, options)
    if scheduler in samplers() and not hasattr(pipe.scheduler, "generator"):
        pytest.skip("this scheduler cannot be given generators")
    paint = painter.Painter(pipe, 5, SIZE)
    torch.manual_seed(7)
    state = torch.get_rng_state()

    def fill(out: Path) -> list[bytes]:
        generate(paint, tasks_for(["a coat"] * 4, range(4)), out, batch=2, recipe={}, progress=False)
        return [p.read_bytes() for p in sorted(out.rglob("*.png"))]

    first = fill(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state) and len(set(first)) == 4
    torch.manual_seed(8)
    assert fill(tmp_path / "b") == first
    (tmp_path / "b/000000/000002.png").unlink()
    assert fill(tmp_path / "b") == first


def test_a_scheduler_is_lent_the_generators_of_its_batch():
    pipe, seen = build("sd3"), []
    pipe.scheduler.generator = None
    options = {"max_sequence_length": 16, **SIZE}
    painter.Painter(pipe, 2, options, lambda: seen.append([g.initial_seed() for g in pipe.scheduler.generator]))(TASKS)
    assert seen and all(seeds == [0, 1] for seeds in seen) and pipe.scheduler.generator is None


def test_every_pass_can_be_interrupted():
    seen = []
    painter.Painter(build("sd15"), 3, SIZE, lambda: seen.append(1))(TASKS)
    assert len(seen) == 3


@pytest.mark.parametrize(
    "name, call",
    [("sd15", {"width": 48}), ("sdxl", {"height": 48}), ("sd3", {"height": 48, "max_sequence_length": 16})],
)
def test_one_side_alone_counts(name, call):
    """The other is the pipeline's own, which it makes where none is given."""
    pipe = build(name)
    more = {k: v for k, v in call.items() if k not in drive.SIDES}
    own = painter.Painter(pipe, 3, more)(TASKS[:1]).images.shape[1:3]
    made = painter.Painter(pipe, 3, call)(TASKS[:1]).images.shape[1:3]
    assert made == tuple(call.get(side, n) for side, n in zip(drive.SIDES, own)) != own


def test_sizes_that_are_refused(monkeypatch):
    pipe = build("sd15")
    for wrong in (0, -8, 32.0):
        with pytest.raises(OptionError, match="height is a whole number of pixels, 1 or more"):
            painter.Painter(pipe, 2, {"height": wrong, "width": 32})
    monkeypatch.setattr(pipe, "vae_scale_factor", None)
    with pytest.raises(OptionError, match="give height and width"):
        painter.Painter(pipe, 2, {"height": 32})


def test_another_size_than_asked_for_is_an_error():
    pipe = build("flux")  # rounds to whole tokens
    with pytest.raises(RunError, match=r"asked for images of 33x32 pixels \(height x width\) and made 32x32"):
        painter.Painter(pipe, 2, {"height": 33, "width": 32, "max_sequence_length": 16})(TASKS)


# ---------------------------------------------------------------------- schedulers by name
@pytest.mark.parametrize(
    "name, options, kind",
    [
        (None, {}, "PNDMScheduler"),
        ("unipc", {"order": 3}, "TableScheduler"),
        ("UniPCScheduler", {"order": 2}, "UniPCScheduler"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, "EulerDiscreteScheduler"),
    ],
)
def test_scheduler_names(name, options, kind):
    pipe = build("sd15")
    found = painter.scheduler_for(pipe.scheduler.config, type(pipe.scheduler), name, options)
    assert type(found).__name__ == kind
    shown = drive.plain_config(found)
    assert all(shown.get(k, (shown.get("sampler_options") or {}).get(k)) == v for k, v in options.items())
    assert json.loads(json.dumps(shown)) == shown
    assert drive.scheduler_name(found).startswith(kind)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("unipcc", {}, "unknown scheduler 'unipcc'. Did you mean 'unipc'?"),
        ("EulerDiscretScheduler", {}, "Did you mean 'EulerDiscreteScheduler'?"),
        ("unipc", {"ordre": 3}, "ordre"),
        ("VQDiffusionScheduler", {}, "cannot be made from this checkpoint's scheduler config: "),
        ("AmusedScheduler", {}, "cannot be made from this checkpoint's scheduler config: "),
        ("UnCLIPScheduler", {}, "cannot be made from this checkpoint's scheduler config: "),
        ("EulerDiscreteScheduler", {"order": 3}, "EulerDiscreteScheduler takes no option 'order'"),
    ],
)
def test_wrong_schedulers(name, options, message):
    pipe = build("sd15")
    with pytest.raises(OptionError) as error:
        painter.scheduler_for(pipe.scheduler.config, type(pipe.scheduler), name, options)
    assert message in str(error.value)


def test_pipelines_that_generate_cannot_drive():
    with pytest.raises(OptionError, match="takes neither prompts nor class labels"):
        painter.Painter(build("ddpm"), 3, {})
    with pytest.raises(OptionError, match=r"takes no option 'guidance'.*Did you mean"):
        painter.Painter(build("sd15"), 3, {"guidance": 3})
    with pytest.raises(OptionError, match="not images"):
        painter.Painter(build("wan"), 2, {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16})(TASKS)


def test_a_fingerprint_sees_one_changed_weight():
    pipe = build("sd15")
    before = drive.fingerprint(pipe)
    assert drive.fingerprint(build("sd15")) == before != drive.fingerprint(build("sd15", seed=1))
    with torch.no_grad():
        next(pipe.vae.parameters()).view(-1)[0] += 1
    assert drive.fingerprint(pipe) != before


# ---------------------------------------------------------------------- the command
def test_a_run_and_its_status(command, tmp_path, capsys):
    given = command(
        {"seeds": "5-8", "scheduler": "unipc", "guidance": 4}, "--option", "order=3", "--option", "grid=mid"
    )
    assert main(given) == 0
    said = capsys.readouterr()
    assert "is complete: 4 images; 4 made now" in said.out and "1 process on cpu" in said.err
    recipe = json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]
    assert recipe["scheduler"]["config"]["sampler_options"] == {"order": 3}
    assert recipe["call"] == {"guidance_scale": 4.0, **SIZE} and recipe["calls"] == 3
    assert main(["generate", "--status", str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "000000" / "000002.png").unlink()
    assert main(["generate", "--status", str(tmp_path / "out"), "--verify", "full"]) == 1
    assert "3 of 4 images done, 0 missing, 1 damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, more, message",
    [
        ({"out": None, "calls": None}, (), "generate needs --out, --calls"),
        ({"prompts": None}, (), "generate needs --prompts: StableDiffusionPipeline makes images of texts"),
        ({"prompts": "nowhere.txt"}, (), "nowhere.txt: cannot read the prompts"),
        ({"seeds": "9-3"}, (), "runs backwards"),
        ({"seeds": "7"}, (), "the last 1 prompts would never be used"),
        ({"batch": 0}, (), "batch = 0"),
        ({"calls": 0}, (), "1 model call or more, got 0"),
        ({"threads": 0}, (), "--threads is 1 or more"),
        ({"processes": 2}, (), "--processes 2 was asked for but 1 run"),
        ({"dtype": "float23"}, (), "unknown dtype 'float23'. Did you mean"),
        ({"verify": "hard"}, (), "verify is 'fast'"),
        ({"scheduler": "unipcc"}, (), "Did you mean 'unipc'"),
        ({}, ("--option", "order"), "--option is written key=value, got 'order'"),
        ({}, ("--call", "eta=0", "--call", "eta=1"), "--call eta is given twice"),
        ({}, ("--call", "etta=0"), "takes no option 'etta'. Did you mean 'eta'"),
        ({"height": 33}, (), "divisible by 8"),
        ({"guidance": "nan"}, (), "--guidance is a finite number, got nan"),
        ({"guidance": 5}, ("--call", "guidance_scale=7"), "--call guidance_scale=7 are the same option"),
    ],
)
def test_wrong_commands(command, tmp_path, capsys, changes, more, message):
    assert main(command(changes, *more)) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not list(tmp_path.rglob("*.png"))


def test_the_example(model, tmp_path, capsys, monkeypatch):
    script = Path(__file__).resolve().parents[1] / "examples" / "multi_gpu_generate.py"
    options = ["--model", str(model), "--images", "3", "--calls", "2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [str(script), *options])
    runpy.run_path(str(script), run_name="__main__")
    assert "3 made now by 1 process(es)" in capsys.readouterr().out


def test_a_wrong_model(command, capsys):
    assert main(command({}, which="no/such-model-here")) == 2
    assert "cannot load the model 'no/such-model-here'" in capsys.readouterr().err


def test_values_of_options():
    from diffaccel.key_values import key_values

    texts = ["a=1", "b=0.5", "c=true", "d=None", "e=karras", "f=[1, 2]", "g=x=y", "h="]
    found = {"a": 1, "b": 0.5, "c": True, "d": None, "e": "karras", "f": [1, 2], "g": "x=y", "h": ""}
    assert key_values(texts, "--option") == found
    with pytest.raises(DiffaccelError):
        key_values(["=1"], "--option")


# ---------------------------------------------------------------------- recipes
@pytest.mark.parametrize("kind", ["scheduler", "cached", "bottleneck"])
def test_a_recipe_decides_scheduler_and_calls(kind, tmp_path, capsys):
    """The images are those that the recipe's handle makes, and the folder knows which recipe made them."""
    pipe, out = models.load("tiny-sd"), tmp_path / "out"
    scheduled = {"sampler": "unipc", "sampler_options": {"order": 2}, "grid": "trailing"}
    settings = {
        "scheduler": scheduled,
        "cached": {"scheduler": scheduled, "cache": da.Cache.every(2, warmup=2).to_dict()},
        "bottleneck": {"stages": "few-8"},
    }
    reading = read(pipe.scheduler.config)
    made_on = {"pipeline": type(pipe).__name__, "model": model_identity(pipe), "guidance": 4.0, "shape": [8, 16, 16]}
    made_on["path"] = path_identity(reading.path, reading.settings["prediction_type"])
    recipe = Recipe(Choice("tuned", kind, settings[kind], 8), made_on, Receipt({"verdict": "better", "helps": True}))
    recipe.save(tmp_path / "recipe.json")
    (tmp_path / "p.txt").write_text("a photo of a red coat\n", encoding="utf-8")
    given = ["generate", "tiny-sd", "--cpu", "--recipe", str(tmp_path / "recipe.json"), "--guidance", "4"]
    given += ["--prompts", str(tmp_path / "p.txt"), "--out", str(out), "--height", "64", "--width", "64"]
    assert main(given) == 0, capsys.readouterr().err
    line = json.loads((out / "images.jsonl").read_text().splitlines()[0])
    pipe.set_progress_bar_config(disable=True)
    with da.accelerate(pipe, recipe) as h:
        call = {"height": 64, "width": 64, "guidance_scale": 4.0, "output_type": "np"}
        image = h(["a photo of a red coat"], generator=[torch.Generator().manual_seed(0)], **call).images[0]
    assert line["calls"] == 8
    assert np.array_equal(np.asarray(Image.open(out / line["file"])), np.round(image * 255).astype(np.uint8))
    assert recipe.sha256 in (out / "manifest.json").read_text()
    for more, message in (
        (["--calls", "5"], "a recipe for 8 model calls, not for --calls 5"),
        (["--scheduler", "deis"], "leave out --scheduler"),
    ):
        assert main([*given, *more]) == 2 and message in capsys.readouterr().err
