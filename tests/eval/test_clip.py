"""CLIP score and R-precision; each known pitfall is a test. The model is a small CLIP with random weights."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_nets import Pooled, coloured, tiny_clip

from diffaccel.errors import OptionError
from diffaccel.eval import clip, clip_score, features, fid, open_images
from diffaccel.eval.pixels import ImageError
from diffaccel.parallel.generate import Painted, generate, tasks_for

X = coloured(6, size=32)
WORDS = ["red coat", "blue dress on black", "a photo of a green bag", "shoe", "", "a sandal, white background"]
LONG = "a photo of a red coat on a white background and a blue dress on a black background with a {} bag"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def embed(model, prompts: list[str]) -> torch.Tensor:
    return clip.embed_text(*model, prompts)[0]


def test_equals_torchmetrics(model) -> None:
    """Acceptance 7: its update function, through a thin model whose get_*_features return tensors."""
    theirs = importlib.import_module("torchmetrics.functional.multimodal.clip_score")
    net, processor = model

    class Thin(torch.nn.Module):
        config = net.config

        def get_image_features(self, *a, **k):
            return features.projected(net.get_image_features(*a, **k))

        def get_text_features(self, *a, **k):
            return features.projected(net.get_text_features(*a, **k))

    images = [torch.from_numpy(x).permute(2, 0, 1) for x in X]
    want, n = theirs._clip_score_update(images, WORDS, Thin(), processor)
    ours = clip_score(X, WORDS, model=model)
    assert n == 6 and ours.value == pytest.approx(float(want.mean()), abs=1e-4)  # 1e-5 of the range of 100 cos
    assert ours.low < ours.value < ours.high and ours.features.startswith("clip:")


def test_both_conventions_of_transformers(model) -> None:
    """transformers 4 gives tensors, 5 output objects with the projection in pooler_output."""
    net, processor = model

    class Four(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.config = net, net.config

        def get_image_features(self, **k):
            return features.projected(self.net.get_image_features(**k))

        def get_text_features(self, **k):
            return features.projected(self.net.get_text_features(**k))

    assert clip_score(X, WORDS, model=(Four(), processor)).value == clip_score(X, WORDS, model=model).value


@pytest.mark.parametrize("pad", [None, "!"])
def test_padding_does_not_matter(tmp_path: Path, pad: str | None) -> None:
    """Alone and beside a long prompt; pad token = end token (SD's CLIP-L) or token "!" (OpenCLIP-H)."""
    model = tiny_clip(tmp_path, pad)
    together = embed(model, WORDS)
    for i, prompt in enumerate(WORDS):
        assert torch.allclose(embed(model, [prompt])[0], together[i], atol=1e-5), prompt


def test_batches_do_not_matter(model) -> None:
    want = clip_score(X, WORDS, model=model).value
    assert clip_score(X, WORDS, model=model, batch=1).value == pytest.approx(want, abs=1e-3)


def test_long_prompts_keep_their_end_token(model) -> None:
    """Cut input_ids lose it, and every long prompt gets one embedding; the tokenizer keeps it. They are counted."""
    early = [LONG.format("red").replace("coat", thing) for thing in ("coat", "bag")]
    text, truncated = clip.embed_text(*model, [*early, "shoe"])
    assert truncated == 2
    assert not torch.allclose(text[0], text[1], atol=1e-4)
    ids = model[1].tokenizer(early, truncation=True, max_length=16)["input_ids"]
    assert all(len(i) == 16 and i[-1] == model[1].tokenizer.eos_token_id for i in ids)
    score = clip_score(X[:3], [*early, "shoe"], model=model)
    assert score.details["prompts truncated"] == 2 and "prompts truncated: 2" in str(score)


def test_uint8_goes_in(model) -> None:
    """A float image in [0, 1] is brought to uint8 before the processor, which divides by 255 itself."""
    as_float = torch.from_numpy(X).permute(0, 3, 1, 2).float() / 255
    assert clip_score(as_float, WORDS, model=model).value == clip_score(X, WORDS, model=model).value
    one = features.processed(model[1].image_processor, X[0])
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (model[1].image_processor.image_mean, model[1].image_processor.image_std)
    )
    want = (torch.from_numpy(X[0]).permute(2, 0, 1) / 255 - mean) / std
    assert torch.allclose(one, want, atol=1e-5)


def test_notes_and_warnings(model) -> None:
    wide = np.concatenate([X, X], 2)
    assert any("not square" in n for n in clip_score(wide, WORDS, model=model).notes)
    assert any("enlarged" in n for n in clip_score(X[:, :16, :16], WORDS, model=model).notes)
    score = clip_score(X[:4], WORDS, model=model)
    assert any("4 images where 6 were expected" in w for w in score.warnings)
    assert score.details["empty prompts"] == 1 and score.n_a == 4


def test_image_i_has_prompt_i_mod_p(model) -> None:
    two = clip_score(X, WORDS[:2], model=model)
    assert two.value == pytest.approx(clip_score(X, WORDS[:2] * 3, model=model).value, abs=1e-5)
    assert two.value != pytest.approx(clip_score(X, WORDS[1::-1], model=model).value, abs=1e-3)


def test_variants(model) -> None:
    """Not clamped, no logit scale; Hessel's prefix, weight and clamp."""
    x, y = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [-1.0, 1.0]])
    assert clip.pair_scores(x, y).tolist() == pytest.approx([100, -100 / 2**0.5])
    assert clip.pair_scores(x, y, "hessel").tolist() == pytest.approx([2.5, 0])
    got = clip_score(X, WORDS, model=model, variant="hessel")
    images = features.extract(open_images(X), features.clip_features("c", *model)).values
    text = embed(model, ["A photo depicts " + w for w in WORDS])
    assert got.value == pytest.approx(float(clip.pair_scores(images, text, "hessel").mean()), abs=1e-5)
    with pytest.raises(OptionError, match="cosine, hessel"):
        clip_score(X, WORDS, model=model, variant="clamped")


def test_r_precision() -> None:
    """Own prompt nearest: 1; random: 1/(k + 1); equal embeddings are a miss; the draw is the same for every row."""
    g = torch.Generator().manual_seed(0)
    text = torch.randn(300, 32, generator=g)
    own = np.arange(300)
    assert clip.r_precision(text, text, own).all()
    noise = torch.randn(300, 32, generator=g)
    assert 0 < float(clip.r_precision(noise, text, own, 4).float().mean()) < 0.35
    assert torch.equal(clip.r_precision(noise, text, own), clip.r_precision(noise, text, own))
    assert not clip.r_precision(text[:1].expand(2, -1), text[:1].expand(2, -1), np.arange(2)).any()


def test_skipped_images_leave_the_others_their_prompts(tmp_path: Path, model) -> None:
    from PIL import Image

    for i in (0, 2):
        Image.fromarray(X[i]).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    got = clip_score(tmp_path, WORDS, model=model, unreadable="skip")
    want = clip_score(X[[0, 2]], [WORDS[0], WORDS[2]], model=model)
    assert (got.value, got.n_a) == (pytest.approx(want.value, rel=1e-6), 2)
    assert any("1 unreadable images skipped, first: 1.png" in w for w in got.warnings)
    assert clip_score(open_images(tmp_path, unreadable="skip"), WORDS, model=model).value == got.value


def test_a_part_of_a_generate_folder_keeps_its_prompts(tmp_path: Path, model) -> None:
    """It is refused; told the number, image i is still image i. Other files of the folder do not count."""
    tasks = tasks_for([f"{i} coats" for i in range(6)])
    generate(lambda t: Painted(X[[x.index for x in t]] / 255, 1), tasks, tmp_path, batch=2, recipe={}, progress=False)
    (tmp_path / "grid.png").write_bytes((tmp_path / "000000/000000.png").read_bytes())
    assert len(open_images(tmp_path)) == 6
    (tmp_path / "000000/000001.png").unlink()
    (tmp_path / "000000/000004.png").write_bytes(b"x")
    for read in (
        lambda: clip_score(tmp_path, WORDS, model=model),
        lambda: clip_score(tmp_path, WORDS, model=model, expected=5),
        lambda: fid(X, tmp_path, features=Pooled(), expected=4),  # `expected` is of the first side
    ):
        with pytest.raises(ImageError, match=r"2 of 6 images are missing or damaged, first: image 1.*generate.*--exp"):
            read()
    kept = [0, 2, 3, 5]
    own = clip_score(tmp_path, [t.prompt for t in tasks], model=model, expected=4)
    assert "other prompts" not in " ".join(own.warnings)
    assert list(open_images(tmp_path, expected=4, unreadable="skip").numbers) == kept
    got = clip_score(tmp_path, WORDS, model=model, expected=4)
    assert got.value == pytest.approx(clip_score(X[kept], [WORDS[i] for i in kept], model=model).value, rel=1e-6)
    assert "4 of 4 images were made from other prompts" in " ".join(got.warnings)
    assert "first: image 0 from '0 coats', scored with 'red coat'" in " ".join(got.warnings)
    assert fid(tmp_path, X, features=Pooled(), expected=4).n_a == 4
