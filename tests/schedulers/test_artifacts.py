"""Artifacts in schedulers: saved beside the config, found again, advised settings, and every refusal."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from scheduler_runs import SD, noise

from diffaccel import TableScheduler
from diffaccel.artifact import Artifact, path_identity
from diffaccel.calibrate import check
from diffaccel.core.grid import nodes
from diffaccel.core.path import Path
from diffaccel.errors import ArtifactError, ArtifactWarning, OptionError
from diffaccel.identity import model_identity
from diffaccel.samplers.registry import get
from diffaccel.schedulers import DCSolverScheduler, DPMSolverV3Scheduler, artifacts
from diffaccel.testing.pipelines import build, call_kwargs

RHO = (1.0, 1.0, 1.3, 0.8, 1.2, 0.9)


def dc_artifact(config, grid="uniform_lambda", model=None, file="mine.safetensors", rho=RHO, kind="epsilon"):
    """An artifact for 6 calls on the path of `config`."""
    path = Path.from_config(config)
    points = nodes(path, len(rho), grid)
    own = {**get("unipc").defaults, "dc_order": 2}
    meta = {
        "runs": [{"calls": len(rho), "guidance": None, "helps": True}],
        "options": {"sampler": "dc", **own},
        "scheduler": {"sampler": "dc", "options": own, "grid": grid},
        "path": path_identity(path, kind),
        "model": model,
        "guidance": 4.0,
    }
    tensors = {"lam_0": np.array([p.lam for p in points]), "ratios_0": np.array(rho)}
    return Artifact("dc", tensors, meta, file)


@pytest.fixture
def config():
    return DDIMScheduler(**SD).config


@pytest.fixture
def scheduler(config):
    return DCSolverScheduler.from_config(config, artifact=dc_artifact(config))


def table(scheduler, n=6):
    scheduler.set_timesteps(n)
    return scheduler.table


# ---------------------------------------------------------------------- in use
def test_the_artifact_reaches_the_rows_and_brings_its_grid(config, scheduler):
    expected = TableScheduler.from_config(
        config, sampler="dc", grid="uniform_lambda", sampler_options={"ratios": list(RHO)}
    )
    assert table(scheduler) == table(expected)
    assert scheduler.config.grid == "uniform_lambda" and scheduler.artifact.kind == "dc"
    assert scheduler.config.artifact == {"file": "mine.safetensors", "sha256": scheduler.artifact.sha256}
    assert "mine.safetensors (6 calls)" in scheduler.explain()
    json.dumps(dict(scheduler.config))


def test_a_file_and_the_general_class_do_the_same(config, scheduler, tmp_path):
    path = dc_artifact(config).save(tmp_path / "mine.safetensors")
    for other in (
        DCSolverScheduler.from_config(config, artifact=str(path)),
        TableScheduler.from_config(config, artifact=path),
        TableScheduler.from_config(config, sampler="dc", artifact=path),
    ):
        assert table(other) == table(scheduler) and other.config.sampler == "dc"


def test_what_the_user_says_wins_over_what_the_artifact_advises(config):
    made = dc_artifact(config)
    scheduler = DCSolverScheduler.from_config(config, artifact=made, grid="karras")
    assert scheduler.config.grid == "karras"
    with pytest.raises(ArtifactError, match="holds no ratios for this run"):
        scheduler.set_timesteps(6)
    with pytest.raises(ArtifactError, match=r"order is 2 there and 3 here"):
        DCSolverScheduler.from_config(config, artifact=made, order=3).set_timesteps(6)


def test_img2img_takes_the_tail_of_the_ratios(scheduler):
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    x = noise(1, 4, 4, 4)
    scheduler.step(x, scheduler.timesteps[2], x)
    late = get("dc").trace(nodes(Path.from_config(scheduler.config), 6, "uniform_lambda")[2:], ratios=[1, 1, *RHO[4:]])
    assert [c.row.out.p for c in scheduler._runs.need().rows] == [r.out.p for r in late.rows]


# ---------------------------------------------------------------------- copies
def test_copies_hold_it(scheduler):
    before = table(scheduler)
    for twin in (
        copy.deepcopy(scheduler),
        pickle.loads(pickle.dumps(scheduler)),
        DCSolverScheduler.from_config(scheduler.config),
        TableScheduler.from_config(scheduler.config),
    ):
        assert table(twin) == before and twin.artifact == scheduler.artifact


def test_it_goes_with_the_sampler_and_gives_way_to_its_option(scheduler):
    assert TableScheduler.from_config(scheduler.config, sampler="dpmpp").config.artifact is None
    by_hand = DCSolverScheduler.from_config(scheduler.config, ratios="none")
    assert by_hand.artifact is None and table(by_hand) != table(scheduler)


def test_a_saved_folder_gives_it_back(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.safetensors", "scheduler_config.json"]
    before = table(scheduler)
    overruled = DCSolverScheduler.from_config(scheduler.config, grid="karras")
    artifacts._SEEN.clear()
    for cls in (DCSolverScheduler, TableScheduler):
        assert table(cls.from_pretrained(tmp_path)) == before
    overruled.save_pretrained(tmp_path)
    artifacts._SEEN.clear()
    assert DCSolverScheduler.from_pretrained(tmp_path).config.grid == "karras"


LOAD = """
import sys
import diffaccel
from diffusers import DiffusionPipeline
scheduler = DiffusionPipeline.from_pretrained(sys.argv[1]).scheduler
scheduler.set_timesteps(6)
print(type(scheduler).__name__, scheduler.artifact.sha256, scheduler.table.digest)
"""


def test_a_pipeline_loaded_in_another_process_has_it(tmp_path):
    pipe = build("sd15")
    made = dc_artifact(pipe.scheduler.config, model=model_identity(pipe))
    pipe.scheduler = DCSolverScheduler.from_config(pipe.scheduler.config, artifact=made, pipe=pipe)
    pipe.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-3:] == ["DCSolverScheduler", made.sha256, table(pipe.scheduler).digest]
    before = pipe(**{**call_kwargs("sd15"), "num_inference_steps": 6}).images
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    after = loaded(**{**call_kwargs("sd15"), "num_inference_steps": 6}).images
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["missing", "another", "truncated"])
def test_a_saved_folder_without_its_artifact(scheduler, config, tmp_path, how):
    scheduler.save_pretrained(tmp_path)
    file = tmp_path / "mine.safetensors"
    if how == "missing":
        file.unlink()
    elif how == "another":
        dc_artifact(config, rho=(1.0, 1.0, 1.1, 1.0, 1.0, 1.0)).save(file)
    else:
        file.write_bytes(file.read_bytes()[:-9])
    artifacts._SEEN.clear()
    message = {"missing": "is missing", "another": "another artifact", "truncated": "truncated"}[how]
    with pytest.raises(ArtifactError, match=message):
        DCSolverScheduler.from_pretrained(tmp_path)


def test_a_config_alone_says_where_its_artifact_lies(scheduler, tmp_path, monkeypatch):
    kept = dict(scheduler.config)
    artifacts._SEEN.clear()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"mine.safetensors.*not here[\s\S]*artifact=FILE"):
        DCSolverScheduler.from_config(kept)


def test_a_hub_repository_is_asked_for_the_file(scheduler, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    scheduler.save_pretrained(tmp_path)
    config, asked = DCSolverScheduler.load_config(tmp_path), []
    load = DCSolverScheduler.load_config.__func__

    def load_config(cls, pretrained_model_name_or_path, subfolder=None, **options):
        return load(cls, tmp_path, **{k: v for k, v in options.items() if k != "token"})

    def download(repo, file, **options):
        asked.append((repo, file, options))
        if not (tmp_path / file.rpartition("/")[2]).is_file():
            raise EntryNotFoundError("404")
        return str(tmp_path / file.rpartition("/")[2])

    monkeypatch.setattr(DCSolverScheduler, "load_config", classmethod(load_config))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    artifacts._SEEN.clear()
    found = DCSolverScheduler.from_pretrained("someone/model", subfolder="scheduler", token="t")
    assert asked == [("someone/model", "scheduler/mine.safetensors", {"token": "t"})]
    assert found.config.artifact == config["artifact"] and table(found) == table(scheduler)
    (tmp_path / "mine.safetensors").unlink()
    artifacts._SEEN.clear()
    with pytest.raises(ArtifactError, match=r"someone/model .* but not that file"):
        DCSolverScheduler.from_pretrained("someone/model", subfolder="scheduler")


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("cls", "command", "without"),
    [
        (DCSolverScheduler, "calibrate dc", "ratios='none'"),
        (DPMSolverV3Scheduler, "calibrate ems", 'statistics="none"'),
    ],
)
def test_without_an_artifact_the_error_shows_the_command(cls, command, without, config):
    with pytest.raises(ArtifactError, match=rf"(?s)diffaccel {command} MODEL.*{without}"):
        cls.from_config(config)
    name = cls.sampler_name
    with pytest.raises(ArtifactError, match=f"diffaccel {command} MODEL"):
        TableScheduler.from_config(config, sampler=name)


def test_another_path_is_refused_with_both_sides(config):
    made = dc_artifact(config)
    other = DDIMScheduler(**{**SD, "beta_end": 0.02}).config
    with pytest.raises(ArtifactError, match=r"another path[\s\S]*artifact:  vp, epsilon[\s\S]*scheduler: vp, epsilon"):
        DCSolverScheduler.from_config(other, artifact=made)
    with pytest.raises(ArtifactError, match=r"vp, epsilon[\s\S]*vp, v_prediction"):
        DCSolverScheduler.from_config(DDIMScheduler(**{**SD, "prediction_type": "v_prediction"}).config, artifact=made)
    with pytest.raises(ArtifactError, match=r"vp, epsilon[\s\S]*flow, flow_prediction"):
        DCSolverScheduler.from_config(FlowMatchEulerDiscreteScheduler().config, artifact=made)


def test_another_shift_of_a_flow_path_is_the_same_path_but_other_nodes():
    config = FlowMatchEulerDiscreteScheduler(shift=3.0).config
    made = dc_artifact(config, grid="trailing", kind="flow_prediction")
    table(DCSolverScheduler.from_config(config, artifact=made))
    other = DCSolverScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=1.0).config, artifact=made)
    with pytest.raises(ArtifactError, match="no ratios for this run"):
        other.set_timesteps(6)


def test_statistics_serve_every_shift_of_a_flow_path():
    """They belong to levels, and the shift moves the nodes only."""
    config = FlowMatchEulerDiscreteScheduler(shift=3.0).config
    held = ems_artifact(config, 4, 8, 8)
    held = Artifact("ems", held.tensors, {"path": path_identity(Path.from_config(config), "flow_prediction")})
    for shift in (3.0, 1.0):
        other = FlowMatchEulerDiscreteScheduler(shift=shift).config
        scheduler = DPMSolverV3Scheduler.from_config(other, artifact=held)
        scheduler.set_timesteps(timesteps=[950.0, 800.0, 500.0, 100.0])
        x = noise(2, 4, 8, 8)
        assert torch.isfinite(scheduler.step(x, scheduler.timesteps[0], x).prev_sample).all()


def test_arguments_that_make_no_sense(config, tmp_path):
    made = dc_artifact(config)
    for options, message in (
        ({"sampler": "dpmpp", "artifact": made}, "takes no calibrated data"),
        ({"sampler": "dc", "artifact": made, "ratios": [1.0] * 6}, "both artifact= and ratios="),
        ({"sampler": "dc", "artifact": 3}, "must be a file or an Artifact"),
        ({"sampler": "unipc", "strict": False}, "pass artifact="),
    ):
        with pytest.raises(OptionError, match=message):
            TableScheduler.from_config(config, **options)
    with pytest.raises(ArtifactError, match="kind 'dc'; 'ems' is needed"):
        DPMSolverV3Scheduler.from_config(config, artifact=made)
    with pytest.raises(ArtifactError, match="there is no artifact"):
        DCSolverScheduler.from_config(config, artifact=tmp_path / "none.safetensors")


def ems_artifact(config, *shape):
    lam = np.linspace(-3.0, 4.0, 30)
    tensors = {"lam": lam, "l": np.ones((30, *shape)), "s": np.zeros((30, *shape)), "b": np.zeros((30, *shape))}
    return Artifact("ems", tensors, {"path": path_identity(Path.from_config(config), "epsilon")})


def test_samples_of_another_size_are_refused_at_the_first_call(config):
    scheduler = DPMSolverV3Scheduler.from_config(config, artifact=ems_artifact(config, 4, 8, 8))
    loop_on(scheduler, (2, 4, 8, 8))
    with pytest.raises(ArtifactError, match=r"\(4, 8, 8\), this run's are \(4, 16, 16\).*reduce='channel'"):
        loop_on(scheduler, (2, 4, 16, 16))
    loop_on(DPMSolverV3Scheduler.from_config(config, artifact=ems_artifact(config, 4, 1, 1)), (2, 4, 16, 16))


def loop_on(scheduler, shape):
    scheduler.set_timesteps(5)
    x = noise(*shape)
    scheduler.step(x, scheduler.timesteps[0], x)


# ---------------------------------------------------------------------- the checkpoint
def test_the_checkpoint_is_checked_where_it_is_given(tmp_path):
    pipe = build("sd15")
    made = dc_artifact(pipe.scheduler.config, model=model_identity(pipe))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtifactWarning)
        assert DCSolverScheduler.from_config(pipe.scheduler.config, artifact=made, pipe=pipe).artifact == made
        assert check(made.save(tmp_path / "a.safetensors"), pipe, guidance=5.0) == made
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.1)
    for function in (
        lambda **o: DCSolverScheduler.from_config(pipe.scheduler.config, artifact=made, pipe=pipe, **o),
        lambda **o: check(made, pipe, **o),
    ):
        with pytest.raises(ArtifactError, match="other weights"):
            function()
        with pytest.warns(ArtifactWarning, match="other weights"):
            function(strict=False)
    with pytest.warns(ArtifactWarning, match="guidance 4"):
        check(made, build("sd15"), guidance=20.0)
    with pytest.raises(ArtifactError, match="another path"):
        check(made, build("sd3"))
