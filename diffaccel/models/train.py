"""Train the embedded models: `python -m diffaccel.models.train PART --data DIR --out DIR [--steps N] [--minutes M]`.

PART is vae, clip, features, sd, flow, pixel, `all` (those six, in an order that works), `check` (the acceptance
measurements) or `ship` (copy the finished folders into the package). Everything is resumable: the state of a part is
`OUT/<part>.pt`, and a second call continues there, with a larger --steps too. Exported models lie in `OUT/weights`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import data, denoise, encoders, export
from .fit import with_steps

PARTS = ("features", "vae", "clip", "pixel", "sd", "flow")


def run(part: str, args: argparse.Namespace) -> None:
    """Train one part and export its folder."""
    out = Path(args.out)
    train, test = data.load(args.data, "train"), data.load(args.data, "test")
    options = {"minutes": args.minutes, "device": args.device}
    budget = with_steps(getattr(denoise if part in ("sd", "flow", "pixel") else encoders, part.upper()), args.steps)
    if part == "vae":
        net, receipt = encoders.train_vae(train, test, out, budget, **options)
        export.vae(net, out)
    elif part == "clip":
        net, tok, receipt = encoders.train_clip(train, test, out, budget, **options)
        export.clip(net, tok, out)
    elif part == "features":
        net, receipt = encoders.train_features(train, test, out, budget, **options)
        export.features(net, test, out)
    else:
        net, receipt = denoise.TRAINERS[part](train, out, budget, **options)
        export.PIPELINES[part](net, out)
    export.receipt(part, {**receipt, "data_sha256": {"train": train.digest, "test": test.digest}}, out)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m diffaccel.models.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("part", choices=[*PARTS, "all", "check", "ship"])
    p.add_argument("--data", default=data.DEBIAN_PATH, help="folder with the four Fashion-MNIST .gz files")
    p.add_argument("--out", required=True, help="folder for states and exported models")
    p.add_argument("--steps", type=int, help="total steps in place of the part's own budget")
    p.add_argument("--minutes", type=float, help="stop (resumably) after this time per part")
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--images", type=int, default=5000, help="check: images per cell")
    p.add_argument("--teacher-images", type=int, help="check: images of the 100-call cell; default: --images")
    p.add_argument("--images-64", type=int, default=500, help="check: images per cell of 64 pixels")
    p.add_argument("--models", nargs="+", default=["tiny-sd", "tiny-flow", "tiny-pixel"], help="check: which models")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        if args.part == "check":
            from .check import check

            check(Path(args.out), args.data, args.models, args.images, args.images_64, args.teacher_images)
        elif args.part == "ship":
            export.ship(Path(args.out), Path(__file__).parent / "weights")
        else:
            for part in PARTS if args.part == "all" else (args.part,):
                run(part, args)
    except (data.DataError, export.MissingPart) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
