"""Put trained nets into folders that `from_pretrained` reads: float16 safetensors, no pickles, no machine paths."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch

from . import data, encoders, nets
from .fit import write_receipt
from .words import BACKGROUNDS, COLOURS, THINGS

FOLDERS = {
    "vae": "tiny-vae",
    "clip": "tiny-clip",
    "features": "tiny-fashion",
    "sd": "tiny-sd",
    "flow": "tiny-flow",
    "pixel": "tiny-pixel",
}
REFERENCE_ROWS = {32: 1000, 64: 400}  # feature rows kept beside mu and sigma


class MissingPart(RuntimeError):
    """A part is needed that has not been trained yet."""


def folder(part: str, out: Path) -> Path:
    return out / "weights" / FOLDERS[part]


def _need(part: str, out: Path) -> Path:
    path = folder(part, out)
    if not path.is_dir():
        raise MissingPart(f"{path} is not there: train the part '{part}' into the same --out first")
    return path


def receipt(part: str, content: dict, out: Path) -> None:
    write_receipt(folder(part, out), content)


def half(module):
    """A float16 copy; the trained module stays float32."""
    return copy.deepcopy(module).to("cpu", torch.float16).eval()


def vae(net, out: Path) -> None:
    half(net).save_pretrained(folder("vae", out))


def load_vae(out: Path):
    """The exported VAE (rounded to float16, computed in float32): what the denoisers must be trained on."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(_need("vae", out), torch_dtype=torch.float32).eval().requires_grad_(False)


def clip(net, tok, out: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPProcessor

    size = {"height": 32, "width": 32}
    image = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    path = folder("clip", out)
    half(net).save_pretrained(path)
    CLIPProcessor(image, tok).save_pretrained(path)
    image.save_pretrained(path)  # transformers 4 reads preprocessor_config.json
    for name in ("vocab.json", "merges.txt"):  # and its CLIPTokenizer reads these two
        shutil.copy(out / "tokenizer" / name, path / name)


def load_text(out: Path) -> tuple:
    """(tokenizer, CLIPTextModel, CLIPTextModelWithProjection) out of the exported `tiny-clip`."""
    from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    path = _need("clip", out)
    whole = CLIPModel.from_pretrained(path).float()
    state = whole.state_dict()
    pair = []
    for cls in (CLIPTextModel, CLIPTextModelWithProjection):
        model = cls(whole.config.text_config).float()  # the config says float16
        own = {}
        for key in model.state_dict():
            source = key if key in state else f"text_model.{key}"
            own[key] = state[source]
        model.load_state_dict(own)
        pair.append(model.eval().requires_grad_(False))
    return CLIPTokenizer.from_pretrained(path), *pair


def features(net, test: data.Split, out: Path) -> None:
    """Weights, config and reference statistics (mu, sigma over the whole test set, some feature rows) of both sizes."""
    from safetensors.torch import load_model, save_file, save_model

    path = folder("features", out)
    path.mkdir(parents=True, exist_ok=True)
    save_model(half(net), str(path / "model.safetensors"))
    net = nets.FashionFeatures().half()
    load_model(net, str(path / "model.safetensors"))
    net = net.float().eval()  # the rounded weights: those that users compute with
    for size, rows in REFERENCE_ROWS.items():
        f = encoders.features(net, data.reference(test, size).images)
        d = f.double()
        save_file(
            {"mu": d.mean(0).float(), "sigma": d.T.cov().float(), "rows": f[:rows].half()},
            str(path / f"reference-{size}.safetensors"),
            {"n": str(len(f)), "features": net.id, "size": str(size), "data": "Fashion-MNIST test, coloured, seed 0"},
        )
    (path / "config.json").write_text(
        json.dumps(
            {
                "id": net.id,
                "num_features": net.num_features,
                "things": THINGS,
                "colours": list(COLOURS),
                "backgrounds": list(BACKGROUNDS),
            },
            indent=1,
        )
    )


# ---------------------------------------------------------------- pipelines
def vp_scheduler(**kw):
    """DDIM over 1000 steps, trailing spacing: with few calls the first call is then at the last training step."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        **{"prediction_type": "epsilon", **kw},
    )


def sd_pipeline(unet, out: Path):
    from diffusers import StableDiffusionPipeline

    tok, text, _ = load_text(out)
    return StableDiffusionPipeline(
        vae=load_vae(out),
        text_encoder=text,
        tokenizer=tok,
        unet=unet,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        scheduler=vp_scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )


def flow_pipeline(transformer, out: Path):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    tok, _, text = load_text(out)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=load_vae(out),
        text_encoder=text,
        tokenizer=tok,
        text_encoder_2=text,
        tokenizer_2=tok,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def pixel_pipeline(unet):
    from .pixel import ClassConditionalPipeline

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return ClassConditionalPipeline(unet, vp_scheduler(**betas, prediction_type="v_prediction"))


def _save(pipeline, path: Path) -> None:
    """Every component in float16; the pipeline handed in is not kept. Configs lose the path that diffusers notes; text
    encoders and tokenizers are made readable for transformers 4 too (keys `text_model.*`, vocab.json, merges.txt)."""
    from safetensors.torch import load_file, save_file

    pipeline.to(torch.float16).save_pretrained(path, safe_serialization=True)
    for file in path.glob("text_encoder*/model.safetensors"):
        state = load_file(file)
        save_file(
            {k if k.startswith("text_") else f"text_model.{k}": v for k, v in state.items()}, file, {"format": "pt"}
        )
    for target in path.glob("tokenizer*"):
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(path.parent / FOLDERS["clip"] / name, target / name)
    for file in path.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sd(unet, out: Path) -> None:
    _save(sd_pipeline(half(unet), out), folder("sd", out))


def flow(transformer, out: Path) -> None:
    _save(flow_pipeline(half(transformer), out), folder("flow", out))


def pixel(unet, out: Path) -> None:
    from . import pixel as module

    path = folder("pixel", out)
    _save(pixel_pipeline(half(unet)), path)
    (path / "pipeline.py").write_text(
        "# For DiffusionPipeline.from_pretrained(path, custom_pipeline=path, trust_remote_code=True).\n"
        f"from {module.__name__} import ClassConditionalPipeline  # noqa: F401\n",
        encoding="utf-8",
    )


PIPELINES = {"sd": sd, "flow": flow, "pixel": pixel}


def ship(out: Path, target: Path) -> None:
    """Copy finished folders into the package: without the separate VAE (both pipelines hold it; its receipt stays),
    with the acceptance results, those of the very weights only."""
    from .check import _digest

    shutil.copytree(out / "weights", target, dirs_exist_ok=True)
    for file in (target / "tiny-vae").glob("*"):
        if file.name != "receipt.json":
            file.unlink()
    for stale in target.glob("*/acceptance.json"):
        stale.unlink()
    for file in (out / "check").glob("*.json"):
        if json.loads(file.read_text())["weights"] == _digest(target / file.stem):
            shutil.copy(file, target / file.stem / "acceptance.json")
        else:
            print(f"{file.stem}: check results are of other weights and were not copied")
