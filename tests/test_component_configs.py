"""What `generate` compares beside the weights: the configs of a pipeline's components."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from diffaccel import models
from diffaccel.cli import main
from diffaccel.component_configs import component_configs
from diffaccel.painter import load
from diffaccel.testing.pipelines import build, names

SIZE = ["--height", "32", "--width", "32"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    build("sdxl").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", names())
def test_the_same_model_has_the_same_configs(name):
    found = component_configs(build(name))
    assert found == component_configs(build(name, seed=1)) == json.loads(json.dumps(found)), "weights are no config"
    networks = {k for k, v in build(name).components.items() if isinstance(v, torch.nn.Module)}
    assert networks <= set(found) and "scheduler" not in found


def test_where_and_how_a_model_was_loaded_is_no_difference(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "moved")
    first = component_configs(load(str(saved)))
    assert component_configs(load(str(tmp_path / "moved"), "float16")) == first == component_configs(build("sdxl"))
    text = json.dumps(first)
    assert "version" not in text and str(saved) not in text
    assert first["vae"]["scaling_factor"] and first["pipeline"]["force_zeros_for_empty_prompt"] is True


def test_a_tokenizer_is_known_by_its_vocabulary():
    pipe = models.load("tiny-sd")
    before = component_configs(pipe)["tokenizer"]
    pipe.tokenizer.add_tokens(["anything"])
    after = component_configs(pipe)["tokenizer"]
    assert {k for k in before if before[k] != after[k]} == {"vocabulary"}


@pytest.mark.parametrize("file, key", [("vae", "scaling_factor"), ("text_encoder_2", "eos_token_id")])
def test_another_config_is_refused_by_name(saved, tmp_path, capsys, file, key):
    """The weights are the same, the images would not be."""
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "p.txt").write_text("a fox\na hat\n", encoding="utf-8")
    given = [
        "--cpu",
        "--calls",
        "2",
        "--batch",
        "1",
        "--prompts",
        str(tmp_path / "p.txt"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(["generate", str(saved), *given, *SIZE]) == 0
    config = tmp_path / "model" / file / "config.json"
    value = json.loads(config.read_text())
    config.write_text(json.dumps(value | {key: value[key] / 2 if key == "scaling_factor" else 1}))
    (tmp_path / "o/000000/000001.png").unlink()
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "model"), *given, *SIZE]) == 2
    assert f"configs.{file}.{key}: the folder has {value[key]}, this run has" in capsys.readouterr().err
    assert not (tmp_path / "o/000000/000001.png").exists()


@pytest.mark.parametrize("old", ["no configs", "other keys"])
def test_folders_of_other_versions_go_on(saved, tmp_path, capsys, old):
    given = ["generate", str(saved), "--cpu", "--calls", "2", "--batch", "1", "--out", str(tmp_path / "o"), *SIZE]
    (tmp_path / "p.txt").write_text("a fox\na hat\n", encoding="utf-8")
    given += ["--prompts", str(tmp_path / "p.txt")]
    assert main(given) == 0
    manifest = tmp_path / "o" / "manifest.json"
    held = json.loads(manifest.read_text())
    if old == "no configs":
        del held["recipe"]["configs"]
    else:
        held["recipe"]["configs"]["vae"]["of_another_version"] = 1
        del held["recipe"]["configs"]["unet"]["conv_in_kernel"]
    manifest.write_text(json.dumps(held))
    (tmp_path / "o/000000/000001.png").unlink()
    assert main(given) == 0
    said = capsys.readouterr()
    assert "1 made now" in said.out and "not the environment" not in said.err
