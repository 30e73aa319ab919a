"""Feature networks: resizers, Inception's architecture and weights file, CLIP, anything with an id."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_nets import Pooled, coloured, inception_state, tiny_clip

from diffaccel.errors import OptionError
from diffaccel.eval import features, fid, inception, open_images
from diffaccel.eval.features import Features, extract, get
from diffaccel.eval.resize import RESIZERS

X = coloured(9)


def test_importing_is_cheap() -> None:
    code = (
        "import sys, diffaccel.eval, diffaccel.eval.command; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'diffusers', 'transformers', 'torchmetrics')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_functions_whatever_was_imported_first() -> None:
    import diffaccel.eval as room

    for name in room.__all__:
        assert callable(getattr(room, name)), name
    assert set(room.__all__) <= set(dir(room))
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        room.fit  # noqa: B018


@pytest.mark.parametrize("name", RESIZERS)
def test_resizers(name: str) -> None:
    """Constant images stay constant, the size is k, values stay in range; equal size is the identity."""
    resize = RESIZERS[name]
    flat = np.full((20, 14, 3), 77, np.uint8)
    assert (resize(flat, 9) - 77).abs().max() < 1e-4
    out = resize(X[0], 37)
    assert out.shape == (3, 37, 37) and out.dtype == torch.float32
    assert out.min() >= 0 and out.max() <= 255
    assert torch.allclose(resize(X[0], 16), torch.from_numpy(X[0]).permute(2, 0, 1).float(), atol=1e-4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the form of the old files: without batch counters."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    state = inception.Inception().state_dict()
    old_form = {k: v for k, v in state.items() if "num_batches_tracked" not in k}
    torch.save(old_form, file)
    return file


def test_inception_is_the_one_of_fid() -> None:
    """Parameters: torchvision's 23,834,568 without auxiliary head and with 1000 classes, and 8 classes more."""
    net = inception.Inception()
    assert sum(p.numel() for p in net.parameters()) == 23_834_568 + 8 * 2049
    assert net.state_dict()["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)
    assert net.state_dict()["Mixed_6b.branch7x7dbl_5.conv.weight"].shape == (192, 128, 1, 7)
    assert net.fc.out_features == 1008


def test_inception_equals_torch_fidelity(tmp_path: Path) -> None:
    """torch-fidelity 0.4.0's own module (and its resize) gave these features on the same weights and images."""
    torch.save(inception_state(), tmp_path / "weights.pth")
    got = extract(open_images(coloured(2, 7, size=40)), get("inception-v3:tf", weights=tmp_path / "weights.pth")).values
    want = [1.308944, 0.0, 0.252748, 0.082857, 1.998348, 0.154281, 0.0, 1.476931]
    assert got[1, ::256].tolist() == pytest.approx(want, abs=1e-4)
    assert got.abs().sum(1).tolist() == pytest.approx([1028.037842, 1161.315674], rel=1e-5)


def test_inception_features(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(inception.VARIABLE, str(weights))
    network = get()
    assert network.id == "inception-v3:clean" and network.dim == 2048
    got = extract(open_images(X[:2]), network).values
    assert got.shape == (2, 2048) and got.dtype == torch.float32
    # average pools leave the padding out of the count: a constant map stays constant
    assert torch.equal(inception._average(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))
    low, high = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert network.prepare(low).min() == -1 and network.prepare(high).max() == 127 / 128
    by_torch = get("inception-v3:torch")
    assert by_torch.prepare(low).min() == -1 and float(by_torch.prepare(high).max()) == pytest.approx(1)


def test_inception_weights_that_are_missing_or_wrong(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(inception.VARIABLE, raising=False)
    monkeypatch.setattr(inception.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"weights-inception-2015-12-05.*DIFFACCEL_INCEPTION.*tiny-fashion"):
        inception.load()
    with pytest.raises(OptionError, match="no Inception weights at"):
        inception.load(tmp_path / "absent.pth")
    torch.save({**torch.load(weights), "AuxLogits.fc.bias": torch.zeros(3)}, tmp_path / "torchvision.pth")
    with pytest.raises(OptionError, match=r"not the state dict of FID's Inception.*AuxLogits"):
        inception.load(tmp_path / "torchvision.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(OptionError, match="cannot read Inception weights"):
        inception.load(tmp_path / "text.pth")
    damaged = tmp_path / inception.WEIGHTS
    damaged.write_bytes(weights.read_bytes())
    with pytest.raises(OptionError, match="damaged: its SHA-256"):
        inception.load(damaged)


def test_names_and_ids() -> None:
    with pytest.raises(OptionError, match="Did you mean 'clean'"):
        get("inception-v3:claen")
    with pytest.raises(OptionError, match=r"unknown features 'dino'.*tiny-fashion"):
        get("dino")
    with pytest.raises(OptionError, match="needs an attribute `id`"):
        get(lambda x: x)
    with pytest.raises(OptionError, match="a name, Features, or a callable"):
        get(3)
    assert features.canonical("clip:a/b") == "clip:a/b@pil-bicubic" == features.canonical("clip:a/b@pil-bicubic")
    network = get(Pooled())
    assert get(network) is network and network.dim == 12 and not network.is_inception


def test_clip_embeddings(tmp_path: Path) -> None:
    model, processor = tiny_clip(tmp_path)
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    network = get(f"clip:{tmp_path / 'm'}")
    assert network.id.endswith("@pil-bicubic") and network.dim == 24
    got = extract(open_images(coloured(5, size=32)), network).values
    pixels = processor.image_processor(list(coloured(5, size=32)), return_tensors="pt")["pixel_values"]
    want = features.projected(model.get_image_features(pixel_values=pixels))
    assert torch.allclose(got, want, atol=1e-5)
    with pytest.raises(OptionError, match="cannot load the CLIP model"):
        get(f"clip:{tmp_path / 'absent'}")


def test_images_are_resized_in_pil_whatever_is_installed() -> None:
    """With torchvision, transformers would give a processor that resizes otherwise."""
    import transformers

    plain = transformers.CLIPImageProcessor(size={"shortest_edge": 48}, resample=3)
    assert features.in_pil(plain) is plain  # torchvision is not installed here

    class CLIPImageProcessorFast:
        def to_dict(self) -> dict:
            return plain.to_dict()

    got = features.in_pil(CLIPImageProcessorFast())
    assert type(got) is type(plain) and got.size == plain.size


def test_dino_class_token(tmp_path: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(Dinov2Config(**shape)).eval()
    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    network = get(f"dino:{tmp_path}")
    assert network.id == f"dino:{tmp_path}@pil" and network.dim == 16
    got = extract(open_images(coloured(3, size=32)), network).values
    pixels = processor(list(coloured(3, size=32)), return_tensors="pt")["pixel_values"]
    assert torch.allclose(got, model(pixel_values=pixels).last_hidden_state[:, 0], atol=1e-5)
    with pytest.raises(OptionError, match="cannot load the DINO model"):
        get(f"dino:{tmp_path / 'absent'}")


def test_inception_through_torch_fidelity(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loader is used if it is importable and no file is given (here a stand-in with the same names)."""
    (tmp_path / "torch_fidelity").mkdir()
    (tmp_path / "torch_fidelity" / "__init__.py").write_text("")
    (tmp_path / "torch_fidelity" / "feature_extractor_inceptionv3.py").write_text(
        "import torch\n"
        "class FeatureExtractorInceptionV3:\n"
        "    def __init__(self, name, features_list):\n"
        "        assert features_list == ['2048']\n"
        f"    def state_dict(self):\n        return torch.load({str(weights)!r})\n"
    )
    monkeypatch.delenv(inception.VARIABLE, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [m for m in sys.modules if m.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    assert torch.equal(inception.load().fc.bias, torch.load(weights)["fc.bias"])
    for name in [m for m in sys.modules if m.split(".")[0] == "torch_fidelity"]:
        del sys.modules[name]


def test_both_conventions_of_transformers() -> None:
    class Output:
        pooler_output = torch.ones(2)

    assert features.projected(Output()) is Output.pooler_output
    assert features.projected(torch.zeros(1)).shape == (1,)


def test_extraction_does_not_depend_on_batch_or_threads_or_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    want = extract(open_images(X), get(Pooled()), batch=64).values
    assert torch.equal(extract(open_images(X), get(Pooled()), batch=2, workers=3, progress=True).values, want)
    monkeypatch.setattr(features, "_IN_MEMORY", 100)
    assert torch.equal(extract(open_images(X), get(Pooled()), batch=4).values, want)


def test_networks_with_the_wrong_output() -> None:
    flat = Features("flat", None, lambda x: torch.from_numpy(x), lambda x: x.float().mean())
    with pytest.raises(OptionError, match=r"flat must give \(N, d\) for 9 images, it gave \(\)"):
        fid(X, X, features=flat)
