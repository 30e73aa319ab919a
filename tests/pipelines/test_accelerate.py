"""A recipe on a pipeline: what runs is what it names, nothing else may run, and it can be undone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from diffusers import EulerDiscreteScheduler

import diffaccel as da
from diffaccel import models
from diffaccel.artifact import Artifact, Receipt, path_identity
from diffaccel.errors import ArtifactError, ArtifactWarning, OptionError, RunError
from diffaccel.identity import model_identity
from diffaccel.pipelines.recipe import Choice, Recipe
from diffaccel.schedulers import FittedScheduler, TableScheduler
from diffaccel.schedulers.from_config import read
from diffaccel.testing.pipelines import build, call_kwargs, denoiser
from diffaccel.tune.sources import embedded

PIPELINES = ("sd15", "sdxl", "sd3", "flux", "qwen_image", "wan")
SETTINGS = {"sampler": "unipc", "sampler_options": {"order": 2}, "grid": "trailing", "grid_options": None}


def recipe_for(pipe, shape, *, calls=3, settings=None, artifact=None, helps=True, guidance=4.0):
    choice = Choice("tuned", "scheduler", {**SETTINGS, "final_sigmas_type": "zero"} if settings is None else settings,
                    calls, artifact=artifact)  # fmt: skip
    reading = read(pipe.scheduler.config)
    made_on = {
        "pipeline": type(pipe).__name__,
        "model": model_identity(pipe),
        "path": path_identity(reading.path, reading.settings["prediction_type"]),
        "guidance": guidance,
        "shape": list(shape),
        "call": {},
    }
    verdict = "better than everything" if helps else "no benefit found against the pipeline's scheduler"
    return Recipe(choice, made_on, Receipt({"verdict": verdict, "helps": helps, "calls": calls}))


def seen_shape(pipe, kwargs):
    shapes = []

    def see(module, args, given):
        shapes.append(tuple((args[0] if args else given.get("sample", given.get("hidden_states"))).shape[1:]))

    hook = denoiser(pipe).register_forward_pre_hook(see, with_kwargs=True)
    pipe(**kwargs)
    hook.remove()
    return shapes[0]


def ran(pipe, name, **more):
    return pipe(**call_kwargs(name, num_inference_steps=3), **more)[0]


@pytest.mark.parametrize("name", PIPELINES)
def test_what_runs_is_what_it_names_and_it_can_be_undone(name, tmp_path):
    pipe = build(name)
    shape, before = seen_shape(pipe, call_kwargs(name, num_inference_steps=2)), pipe.scheduler
    plain, state = ran(pipe, name), dict(pipe.components)
    expected = build(name)
    expected.scheduler = TableScheduler.from_config(expected.scheduler.config, **SETTINGS)
    wanted = ran(expected, name)
    recipe_for(pipe, shape).save(tmp_path / "recipe.json")
    kwargs = {k: v for k, v in call_kwargs(name).items() if k != "num_inference_steps"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtifactWarning)
        with da.accelerate(pipe, tmp_path / "recipe.json") as h:
            assert pipe.scheduler is not before
            assert torch.equal(torch.as_tensor(h(**kwargs)[0]), torch.as_tensor(wanted))
            assert torch.equal(torch.as_tensor(ran(pipe, name)), torch.as_tensor(wanted))
            assert h.report().calls == 3 and "3 model calls an image; last run: 3" in str(h.report())
            with pytest.raises(ArtifactError, match=r"recipe.json is a recipe for 3 model calls, and this run has 4"):
                pipe(**call_kwargs(name, num_inference_steps=4))
    assert pipe.scheduler is before and dict(pipe.components) == state
    assert not hasattr(denoiser(pipe), "_diffusers_hook")
    assert torch.equal(torch.as_tensor(ran(pipe, name)), torch.as_tensor(plain))


@pytest.fixture(scope="module")
def sd():
    pipe = build("sd15")
    return pipe, seen_shape(pipe, call_kwargs("sd15", num_inference_steps=1))


def test_twice_is_refused_and_removed_twice_is_fine(sd):
    pipe, _ = sd
    before, recipe = pipe.scheduler, recipe_for(*sd)
    h = da.accelerate(pipe, recipe)
    with pytest.raises(OptionError, match="wrapped by 'accelerate' already"):
        da.accelerate(pipe, recipe)
    h.remove()
    h.remove()
    assert pipe.scheduler is before
    with pytest.raises(RunError, match="was taken off this pipeline"):
        h("a red fox")
    again = da.accelerate(pipe, recipe)
    pipe.scheduler = before
    with pytest.raises(RunError, match=r"pipe.scheduler was replaced by a"):
        again.remove()
    pipe.scheduler = again.inner._scheduler
    again.remove()
    assert pipe.scheduler is before


def test_a_copy_is_refused(sd):
    pipe, _ = sd
    with da.accelerate(pipe, recipe_for(*sd)), pytest.raises(OptionError, match="run the weights of the original"):
        copy.deepcopy(pipe)
    assert copy.deepcopy(pipe).unet is not pipe.unet


def test_the_scheduler_is_back_after_an_error(sd):
    before = sd[0].scheduler
    with pytest.raises(ZeroDivisionError), da.accelerate(sd[0], recipe_for(*sd)):
        raise ZeroDivisionError
    assert sd[0].scheduler is before and not hasattr(sd[0].unet, "_diffusers_hook")


def test_other_numbers_of_calls_are_refused_before_the_first_model_call(sd):
    pipe, _ = sd
    calls = []
    hook = pipe.unet.conv_in.register_forward_pre_hook(lambda *a: calls.append(1))
    with da.accelerate(pipe, recipe_for(*sd)) as h:
        with pytest.raises(ArtifactError, match="recipe for 3 model calls, not 8"):
            h("a red fox", num_inference_steps=8)
        with pytest.raises(ArtifactError, match="this run has 20"):
            pipe("a red fox", num_inference_steps=20)
    hook.remove()
    assert not calls


def test_another_checkpoint_is_refused_and_a_fine_tune_warned_about(sd):
    other, before = build("sd15", seed=1), sd[0].scheduler
    with pytest.raises(ArtifactError, match=r"recipe.json was calibrated on other weights"):
        da.accelerate(other, recipe_for(*sd))
    with pytest.warns(ArtifactWarning, match="other weights"), da.accelerate(other, recipe_for(*sd), strict=False) as h:
        h("a red fox", height=32, width=32, output_type="latent")
    assert sd[0].scheduler is before


def test_another_scheduler_of_the_checkpoint_is_no_other_path(sd):
    pipe = build("sd15")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    da.accelerate(pipe, recipe_for(*sd)).remove()


def test_another_kind_of_pipeline_or_path_is_refused(sd):
    with pytest.raises(ArtifactError, match="tuned on a StableDiffusionPipeline, this is a FluxPipeline"):
        da.accelerate(build("flux"), recipe_for(*sd))
    pipe = build("sd15")
    for changes in ({"beta_end": 0.02}, {"prediction_type": "v_prediction"}):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
        with pytest.raises(ArtifactError, match="was calibrated on another path"):
            da.accelerate(pipe, recipe_for(*sd))
        assert not hasattr(pipe.unet, "_diffusers_hook")


def test_another_size_is_warned_about_once_and_another_layout_refused(sd):
    pipe, shape = sd
    small = {"height": 16, "width": 32, "output_type": "latent"}
    with da.accelerate(pipe, recipe_for(*sd)) as h:
        with pytest.warns(ArtifactWarning, match=r"of shape \(4, 16, 16\), this run's are \(4, 8, 16\)"):
            h("a red fox", **small)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ArtifactWarning)
            h("a red fox", **small)
    for other in ((8, *shape[1:]), (64, 4)):
        with (
            da.accelerate(pipe, recipe_for(pipe, other)) as h,
            pytest.raises(ArtifactError, match="other channels or another packing"),
        ):
            h("a red fox", height=32, width=32)


def test_another_guidance_scale_and_a_receipt_without_benefit_are_warned_about(sd):
    with (
        da.accelerate(sd[0], recipe_for(*sd)) as h,
        pytest.warns(ArtifactWarning, match="at guidance 4, this run"),
    ):
        h("a red fox", height=32, width=32, guidance_scale=12.0, output_type="latent")
    with pytest.warns(ArtifactWarning, match="no benefit found against"):
        da.accelerate(sd[0], recipe_for(*sd, helps=False)).remove()
    with pytest.raises(OptionError, match="recipe must be a file or a Recipe, got a dict"):
        da.accelerate(sd[0], {})


def test_the_scale_of_true_guidance_is_compared():
    pipe = build("qwen_image")
    kwargs = call_kwargs("qwen_image", num_inference_steps=3)
    made = recipe_for(pipe, seen_shape(pipe, kwargs), guidance=8.0)
    with (
        da.accelerate(pipe, made) as h,
        pytest.warns(ArtifactWarning, match="calibrated at guidance 8, this run uses 2"),
    ):
        h(**kwargs)


def test_a_choice_of_our_own_scheduler_is_replaced_whole(sd):
    """A pipeline that runs a sampler of ours with rewriters: the recipe names the run, not the config."""
    pipe, _ = sd
    before = pipe.scheduler
    wanted = TableScheduler.from_config(before.config, **SETTINGS)
    wanted.set_timesteps(3)
    own = TableScheduler.from_config(before.config, sampler="deis", grid="karras", rewrite=[da.momentum(0.5)])
    pipe.scheduler = own
    with da.accelerate(pipe, recipe_for(*sd)):
        pipe.scheduler.set_timesteps(3)
        assert pipe.scheduler._runs.need().table == wanted._runs.need().table
    assert pipe.scheduler is own
    pipe.scheduler = before


def test_an_offloaded_model(sd):
    from accelerate import cpu_offload

    found = []
    for offloaded in (False, True):
        pipe = build("sd15")
        if offloaded:
            cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
        before = pipe.scheduler
        with da.accelerate(pipe, recipe_for(*sd)) as h:
            with pytest.raises(ArtifactError, match="this run has 5"):
                pipe("a red fox", num_inference_steps=5)
            kwargs = {k: v for k, v in call_kwargs("sd15").items() if k != "num_inference_steps"}
            found.append(h(**kwargs)[0])
        assert pipe.scheduler is before
        assert torch.isfinite(ran(pipe, "sd15")).all()
    assert torch.equal(*found)


def test_a_fitted_table_in_a_recipe_runs_as_its_artifact_does(tmp_path):
    """The trained model: through JSON, the same image to the last bit; and saved with the pipeline."""
    pipe, held = models.load("tiny-sd"), Artifact.load(models.fitted("tiny-sd"))
    pipe.set_progress_bar_config(disable=True)
    call = {
        "prompt": "a photo of a red coat",
        "height": 32,
        "width": 32,
        "guidance_scale": 4.0,
        "output_type": "latent",
    }
    before, recipe = pipe.scheduler, None
    pipe.scheduler = FittedScheduler.from_config(before.config, artifact=held)
    wanted = pipe(**call, num_inference_steps=8, generator=torch.Generator().manual_seed(1)).images
    pipe.scheduler = before
    settings = {"sampler": "fitted", "sampler_options": None}
    recipe = recipe_for(pipe, (8, 8, 8), calls=8, settings=settings, artifact=embedded(held, 8))
    recipe.save(tmp_path / "recipe.json")
    with da.accelerate(pipe, tmp_path / "recipe.json") as h:
        assert torch.equal(h(**call, generator=torch.Generator().manual_seed(1)).images, wanted)
        pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    assert pipe.scheduler is before
    pipe.scheduler = TableScheduler.from_pretrained(tmp_path / "scheduler")
    assert pipe.scheduler.artifact.meta["model"]["weights_sha256"] == model_identity(pipe)["weights_sha256"]
    again = pipe(**call, num_inference_steps=8, generator=torch.Generator().manual_seed(1)).images
    assert torch.equal(again, wanted)


def test_staged_resolution_as_a_recipe():
    pipe = models.load("tiny-sd")
    pipe.set_progress_bar_config(disable=True)
    before, call = pipe.scheduler, {"height": 64, "width": 64, "output_type": "latent"}
    with da.bottleneck(pipe, "few-4") as h:
        wanted = h("a photo of a red coat", **call, generator=torch.Generator().manual_seed(1)).images
    made = recipe_for(pipe, (8, 16, 16), calls=4)
    choice = Choice("bottleneck(few-4)", "bottleneck", {"stages": "few-4"}, 4, 2.0)
    with da.accelerate(pipe, Recipe(choice, made.made_on, made.receipt)) as h:
        found = h("a photo of a red coat", **call, generator=torch.Generator().manual_seed(1)).images
        assert h.report().last.calls == 4
    assert torch.equal(found, wanted) and pipe.scheduler is before
