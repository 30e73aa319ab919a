"""Writes the model card from the receipts beside the weights: `python -m diffaccel.models.card --docs docs`.

Every number in it was measured by `diffaccel.models.train`; what was not measured is named as missing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from .. import models
from . import data, denoise, encoders
from .words import BACKGROUNDS, COLOURS, TEMPLATES, THINGS

PARTS = ("tiny-fashion", "tiny-vae", "tiny-clip", "tiny-sd", "tiny-flow", "tiny-pixel")

HEAD = """\
# The embedded models

<!-- written by `python -m diffaccel.models.card` from the receipts beside the weights; do not edit -->

Tiny pipelines that were really trained ({shipped}) come with the package, so that schedulers, hooks and metrics can be
tried and tested without a download. They are small instruments, not image generators for use.

| name | class | what it is for |
|---|---|---|
| `tiny-sd` | `StableDiffusionPipeline`: VP, epsilon, classifier-free guidance | code for Stable Diffusion |
| `tiny-flow` | `StableDiffusion3Pipeline`: flow matching, classifier-free guidance | code for flow models |
| `tiny-pixel` | `ClassConditionalPipeline` (`diffaccel.models.pixel`): VP, v, pixels, no guidance | solvers |
| `tiny-clip` | `CLIPModel` and `CLIPProcessor` | CLIP score; its text half conditions both pipelines |
| `tiny-fashion` | a small CNN, 128 features; reference statistics for 32 and 64 pixels | FID on this data only |

```python
from diffaccel import models
pipe = models.load("tiny-sd")                       # float32 on the CPU; torch_dtype=, device= as you like
images = pipe(models.prompts(4, seed=0), num_inference_steps=20, guidance_scale=4.0).images
flow = models.load("tiny-flow")
images = flow(models.prompts(4), num_inference_steps=20, guidance_scale=4.0, max_sequence_length=1).images
```

The folders are ordinary ones (`models.path(name)`):

- `DiffusionPipeline.from_pretrained(path)` reads `tiny-sd`;
- `tiny-flow` needs `text_encoder_3=None, tokenizer_3=None` (diffusers does not reload an SD3 folder without T5 by
  itself; `models.load` passes them). SD3 appends `max_sequence_length` zero tokens in place of T5;
  `max_sequence_length=1` is several times faster than the default 256, and the model was trained with 1, 16 and 256.
  The number of zero tokens changes the image a little: keep one value in a comparison;
- `tiny-pixel`: `DiffusionPipeline.from_pretrained(path, custom_pipeline=str(path), trust_remote_code=True)`. Its labels
  (`models.labels(n)`) are `diffaccel.models.words.meaning(thing, colour, background)`.

Images are 32x32. The two latent pipelines were trained on 64 pixels too (three steps of 32 to one of 64; the size is
told by the shape of the latent alone): `height=64, width=64`.

## Data and licence

[Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) (Zalando SE, MIT licence): 60,000 training and 10,000
test images of 28x28 grey pixels. It is not in the package. `--data` takes a folder with the four published files,
such as that of the Debian package `dataset-fashion-mnist` ({debian}).
Every image is coloured by rule when it is drawn: g in [0, 1] is padded to 32 (or enlarged to 56 in 64), mask
m = min(5 g, 1), pixel = (1 - m) background + m (0.35 + 0.65 g) colour. {n_colours} colours ({colours}), {n_back}
backgrounds ({backgrounds}), {n_things} things ({things}); captions by {n_templates} patterns:
{templates}. The weights are published under the licence of this package.

Reference statistics: all 10,000 test images, colours and backgrounds drawn once by seed 0.
**FID below is FID (tiny-fashion features, not Inception)**: it is comparable with itself only.
FID to the data also sees the error of the model itself, and what guidance does to the images, which few calls follow
less: where 5 calls come out nearer to the data than 20 (rows a, b), that is no merit of theirs. Rows "converged"
measure against the model's own images of 100 calls, of other seeds, and see the solver alone.

## Train them again

```
python -m diffaccel.models.train all --data DIR --out OUT          # or one of: vae clip features sd flow pixel
python -m diffaccel.models.train sd --data DIR --out OUT --steps {more}     # continue: train longer
python -m diffaccel.models.train check --data DIR --out OUT --images 5000
python -m diffaccel.models.train ship --out OUT && python -m diffaccel.models.card --docs docs
```

Budgets are in steps and random numbers depend on (seed, step), so a rerun gives the same model on the same machine and
a resumed run is the uninterrupted one.
"""


def _table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join("" if c is None else str(c) for c in row) + " |" for row in lines) + "\n"


def head() -> str:
    return HEAD.format(
        shipped=", ".join(f"`{name}`" for name in models.names()),
        debian=f"`{data.DEBIAN_PATH}`",
        n_colours=len(COLOURS),
        colours=", ".join(COLOURS),
        n_back=len(BACKGROUNDS),
        backgrounds=", ".join(BACKGROUNDS),
        n_things=len(THINGS),
        things=", ".join(THINGS),
        n_templates=len(TEMPLATES),
        templates="; ".join(f"`{t}`" for t in TEMPLATES),
        more=2 * denoise.SD.steps,
    )


def training(receipts: dict[str, dict]) -> str:
    """Table of budgets and times, checks of the parts, loss curves."""
    rows = []
    for name, r in receipts.items():
        b = r["budgets"][-1]
        budget = f"{b['lr']:g}, {b['batch']}, {b['seed']}"
        done = f"{r['steps']}" + ("" if r["complete"] else f" of {b['steps']} (schedule not finished)")
        rows.append(
            [
                f"`{name}`",
                f"{r['parameters'] / 1e6:.2f} M",
                done,
                budget,
                f"{r['seconds'] / 60:.0f}",
                r["seconds_per_step"],
            ]
        )
    text = (
        "## Training\n\nAdamW (0.9, 0.99), clip norm 1, warm-up, second half linear to 2 %, averaged weights (EMA).\n"
    )
    text += "Float32. Times are wall-clock with one torch thread on a CPU that other work shared.\n\n"
    text += _table(["model", "parameters", "steps", "rate, batch, seed", "minutes", "s/step"], rows)
    for name, r in receipts.items():
        if len(r["budgets"]) > 1:
            spans = ", then ".join(str(b["steps"]) for b in r["budgets"])
            text += f"\nThe budget of `{name}` was changed while it trained (steps: {spans}), so its\n"
            text += "learning rate fell otherwise than that of the last budget alone: a rerun gives\n"
            text += "a model of the same kind, not the same numbers.\n"
    text += "\nVersions: " + ", ".join(f"{k} {v}" for k, v in next(iter(receipts.values()))["versions"].items()) + ".\n"
    text += (
        f"\nKL weight of the VAE {encoders.KL_WEIGHT:g}; latent mean 0 and deviation 1 are folded into `quant_conv`.\n"
    )
    text += f"The loss of `tiny-sd` has the term of the channel means from step {denoise.SD_MEAN_FROM} on.\n"
    text += "\n### Checks of the parts (test split)\n\n"
    for name, r in receipts.items():
        for key in [k for k in r if k.startswith("check")]:
            size = f", {key[6:]} pixels" if key[6:] else ""
            items = [f"{k.replace('_', ' ')} {v}" for k, v in r[key].items() if not isinstance(v, list)]
            items += [f"{k.replace('_', ' ')} {min(v)} to {max(v)}" for k, v in r[key].items() if isinstance(v, list)]
            text += f"- `{name}`{size}: " + ", ".join(items) + "\n"
    text += "\n### Loss (mean of 100 steps)\n\n"
    for name, r in receipts.items():
        curve = r["loss_curve"]
        picked = [curve[i] for i in sorted({*range(0, len(curve), max(1, len(curve) // 9)), len(curve) - 1})]
        text += f"- `{name}`: " + ", ".join(f"{v:.4g} ({s})" for s, v in picked) + "\n"
    text += "\n(in brackets: the step; the whole curve is in `receipt.json` beside the weights)\n"
    return text


def acceptance(name: str, result: dict, docs: Path, grids: Path) -> str:
    """One model's section: criteria, table, grid."""
    text = f"## `{name}`\n\n"
    for size in (32, 64):
        part = result.get(f"size_{size}")
        if not part:
            continue
        floors, rows = part["floors"], part["rows"]
        n = next(iter(rows.values()))["n"]
        guidance = "" if name == "tiny-pixel" else f", guidance {result['guidance']:g}"
        text += f"### {size} pixels: {n} images a cell{guidance}\n\n"
        columns = ("fid", "fid_se", "fid_jackknife", "clip_score", "thing", "colour", "background")
        table = [
            [label, *(r[c] for c in columns), next((v for k, v in r.items() if k.startswith("psnr")), None)]
            for label, r in ((k.replace("_", " "), v) for k, v in {**floors, **rows}.items())
        ]
        text += _table(
            [
                "scheduler-calls-guidance-size",
                "FID",
                "SE",
                "FID without bias",
                "CLIP score",
                "thing right",
                "colour right",
                "background right",
                "PSNR",
            ],
            table,
        )
        psnr = next((k for r in rows.values() for k in r if k.startswith("psnr")), "psnr_to_20_calls_db")
        text += f"\nPSNR: to the last row ({psnr.split('_')[2]} calls); in the row of the VAE, to the image.\n\n"
        checks = part.get("criteria") or {"b_5_against_20_calls": part["b_5_against_20_calls"]}
        for key, c in checks.items():
            verdict = {True: "**met**", False: "**not met**", None: "for information"}[c.get("passed")]
            values = ", ".join(
                f"{k.replace('_', ' ')} {v}" for k, v in c.items() if k not in ("passed", "wanted") and v is not None
            )
            text += (
                f"- {key.replace('_', ' ')}: {verdict}"
                + (f" (wanted: {c['wanted']})" if "wanted" in c else "")
                + f": {values}\n"
            )
        image = grids / f"{name}{'-64' if size == 64 else ''}.png"
        if not image.is_file():
            raise SystemExit(f"no grid of images {image}: `python -m diffaccel.models.train check` makes it")
        (docs / "img").mkdir(parents=True, exist_ok=True)
        if image.resolve() != (docs / "img" / image.name).resolve():
            shutil.copy(image, docs / "img" / image.name)
        text += f"\n![{name}, {size} pixels](img/{image.name})\n\n"
        text += "Columns: 3, 5, 8, 20, 100 calls. Rows: " + "; ".join(result["grid_prompts"]) + ".\n\n"
    return text


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m diffaccel.models.card", description=__doc__)
    p.add_argument("--docs", required=True, type=Path, help="folder of the documentation; writes models.md and img/")
    p.add_argument(
        "--grids", type=Path, help="folder with the grids of `train check` (OUT/check); default: those in img/"
    )
    args = p.parse_args(argv)
    receipts = {name: models.receipt(name) for name in PARTS if (models._WEIGHTS / name).is_dir()}
    text = head() + "\n" + training(receipts)
    for name in models.PIPELINES:
        if name not in models.names():
            text += f"\n## `{name}`\n\n**Not shipped**: no weights of it are good enough yet. `models.load` says so;\n"
            text += "the commands above train it.\n"
            continue
        file = models.path(name) / "acceptance.json"
        if file.is_file():
            text += "\n" + acceptance(
                name, json.loads(file.read_text(encoding="utf-8")), args.docs, args.grids or args.docs / "img"
            )
        else:
            text += f"\n## `{name}`\n\nThe acceptance measurements of these weights have not been made.\n"
    args.docs.mkdir(parents=True, exist_ok=True)
    (args.docs / "models.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
