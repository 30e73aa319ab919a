"""Every part of the training, a few steps of it, on a stand-in data set; the result loads as stock pipelines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from diffaccel import models
from diffaccel.models import data, denoise, encoders, export, nets, train, words


@pytest.fixture(scope="module")
def trained(fake_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT folder after two steps of every part."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        for module, names in ((encoders, ("VAE", "CLIP", "FEATURES")), (denoise, ("SD", "FLOW", "PIXEL"))):
            for name in names:
                patch.setattr(module, name, dataclasses.replace(getattr(module, name), steps=2, batch=4))
        patch.setattr(denoise, "POOL", {32: 90, 64: 8})
        assert train.main(["all", "--data", str(fake_data), "--out", str(out)]) == 0
    return out


@pytest.fixture
def installed(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(models, "_WEIGHTS", trained / "weights")
    return trained


def test_receipts(trained: Path, fake_data: Path) -> None:
    for part, folder in export.FOLDERS.items():
        receipt = json.loads((trained / "weights" / folder / "receipt.json").read_text())
        assert receipt["part"] == part and receipt["steps"] == 2 and receipt["complete"]
        assert receipt["data_sha256"]["train"] == data.load(fake_data, "train").digest


def test_no_machine_path_in_the_folders(trained: Path) -> None:
    for file in (trained / "weights").rglob("*.json"):
        assert str(trained.parent) not in file.read_text(), file


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-flow"])
def test_text_pipelines(installed: Path, name: str) -> None:
    pipe = models.load(name)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 4.0}
    if name == "tiny-flow":
        options["max_sequence_length"] = 1
    assert type(pipe).__module__.startswith("diffusers.")
    assert pipe(models.prompts(2), **options).images[0].size == (32, 32)
    assert pipe(models.prompts(1), height=64, width=64, **options).images[0].size == (64, 64)


def test_missing_part_is_an_error(fake_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["sd", "--data", str(fake_data), "--out", str(tmp_path)]) == 2
    assert "'clip'" in capsys.readouterr().err
    assert train.main(["sd", "--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "dataset-fashion-mnist" in capsys.readouterr().err


def test_ship_leaves_the_vae_out(trained: Path, tmp_path: Path) -> None:
    export.ship(trained, tmp_path / "weights")
    assert [f.name for f in (tmp_path / "weights" / "tiny-vae").iterdir()] == ["receipt.json"]
    assert (tmp_path / "weights" / "tiny-sd" / "vae" / "config.json").is_file()


def test_folding_keeps_images_and_whitens_latents(fake_data: Path) -> None:
    net = nets.vae().eval()
    with torch.no_grad():
        net.quant_conv.bias[:8] += 2 * torch.arange(8)
    images = data.draw(data.load(fake_data, "train"), 40, torch.Generator().manual_seed(0)).images
    z = encoders.encode(net, images)
    before = net.decode(z).sample
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    posterior = net.encode(data.to_float(images[:2])).latent_dist.std
    encoders.fold_latents(net, mean, std)
    folded = encoders.encode(net, images)
    assert folded.mean((0, 2, 3)).abs().max() < 1e-3 and (folded.std((0, 2, 3)) - 1).abs().max() < 1e-3
    torch.testing.assert_close(folded, (z - mean.view(-1, 1, 1)) / std.view(-1, 1, 1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net.decode(folded).sample, before, atol=1e-4, rtol=1e-4)
    after = net.encode(data.to_float(images[:2])).latent_dist.std
    torch.testing.assert_close(after * std.view(-1, 1, 1), posterior, atol=1e-5, rtol=1e-4)


def test_tokenizer_and_positives(tmp_path: Path) -> None:
    nets.write_tokenizer_files(tmp_path)
    tok = nets.tokenizer(tmp_path)
    assert len(tok) == 594 and tok.pad_token_id == tok.eos_token_id == 593
    assert max(len(ids) for ids in tok(words.all_captions())["input_ids"]) <= nets.MAX_TOKENS
    one = torch.tensor
    batch = data.Batch(one([]), one([1, 1, 1, 2]), one([0, 0, 0, 0]), one([0, 1, 0, 0]), one([3, 0, 1, 0]))
    assert encoders.clip_targets(batch).tolist() == [[1, 1, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]


def test_flow_transformer_starts_at_zero() -> None:
    """Zero-initialised modulation and output: the untrained model predicts exactly zero."""
    net = nets.flow_transformer()
    y = net(
        torch.randn(1, 8, 8, 8),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 17, 192),
        pooled_projections=torch.randn(1, 128),
    ).sample.detach()
    assert float(y.abs().max()) == 0.0
