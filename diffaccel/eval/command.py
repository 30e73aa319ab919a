"""`diffaccel eval fid | kid | cmmd | clip | stats | report`. Imports nothing heavy until a command runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import OptionError
from .score import Score

Commands = argparse._SubParsersAction  # of ArgumentParser
_SOURCE = "folder, zip, .npz or .npy of images, a file of statistics, or tiny-fashion (the embedded reference)"


def add(commands: Commands) -> Commands:
    """Add `eval` and its subcommands; gives what further ones are added to."""
    parser = commands.add_parser("eval", help="FID, KID, CMMD, CLIP score with intervals; quality against model calls")
    metrics = parser.add_subparsers(dest="metric", required=True, metavar="METRIC")
    for name, text in (
        ("fid", "FID, corrected for bias, with its interval"),
        ("kid", "KID, unbiased"),
        ("cmmd", "CMMD"),
    ):
        one = metrics.add_parser(name, help=text)
        one.add_argument("a", metavar="A", help=_SOURCE)
        one.add_argument("b", metavar="B", help="the reference: the same kinds")
        _feature_options(one)
        _reading_options(one)
        one.set_defaults(run=_compare)
        if name == "fid":
            one.add_argument("--paper", action="store_true", help="the plain value, as papers print it")
            one.add_argument("--extrapolate", action="store_true", help="FID_infinity (arXiv:1911.07023)")
        if name == "kid":
            one.add_argument("--subsets", type=int, help="mean over so many random subsets, as torch-fidelity does")
            one.add_argument("--subset-size", type=int, default=1000)
        if name == "cmmd":
            one.add_argument("--estimator", default="unbiased", help="unbiased, or biased as in the published code")
    clip = metrics.add_parser("clip", help="CLIP score and R-precision")
    clip.add_argument("images", metavar="DIR", help="folder, zip, .npz or .npy of images; image i has prompt i mod P")
    clip.add_argument("prompts", metavar="PROMPTS", help=".txt, .csv, .tsv, .json or .jsonl")
    clip.add_argument("--model", help="hub id, folder, or tiny-clip (default openai/clip-vit-base-patch16)")
    clip.add_argument("--variant", default="cosine", help="cosine (100 cos) or hessel")
    _reading_options(clip)
    clip.set_defaults(run=_clip)
    stats = metrics.add_parser("stats", help="write statistics of images, to compare with later")
    stats.add_argument("images", metavar="DIR", help="folder, zip, .npz or .npy of images")
    stats.add_argument("--out", required=True, help="file to write (.npz)")
    stats.add_argument("--keep-features", action="store_true", help="with all features, for KID and intervals")
    _feature_options(stats)
    _reading_options(stats, score=False)
    stats.set_defaults(run=_stats)
    report = metrics.add_parser("report", help="make the report of a sweep again, finished or not")
    report.add_argument("folder", metavar="DIR", help="the --out of a sweep")
    report.add_argument("--device", default="cpu")
    report.set_defaults(run=_report)
    return metrics


def _feature_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features", help="inception-v3:clean|tf|torch|torchmetrics, clip:MODEL, dino:MODEL, tiny-fashion"
    )
    parser.add_argument("--weights", help="file of Inception weights (default $DIFFACCEL_INCEPTION)")


def _reading_options(parser: argparse.ArgumentParser, score: bool = True) -> None:
    parser.add_argument("--alpha", help="what transparent pixels show: white, black, drop (default: an error)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="threads that decode images (default 0)")
    parser.add_argument("--expected", type=int, help="how many images there should be; fewer is a warning")
    parser.add_argument("--unreadable", default="error", help="error, or skip: leave such files out and say so")
    if score:
        parser.add_argument("--json", help="also write the score to this file")


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    names = ("alpha", "unreadable", "batch", "device", "workers", "expected")
    return {"progress": True, **{k: v for k in names if (v := getattr(args, k, None)) is not None}}


def _check_json(path: str | None) -> None:
    """Before the work begins, which can take hours."""
    if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
        raise OptionError(f"--json {path}: a folder, or a file in a folder that does not exist; give a file's name")


def _show(score: Score, path: str | None) -> int:
    print(score)
    if path:
        try:
            Path(path).write_text(json.dumps(score.to_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise OptionError(f"cannot write --json {path}: {error.strerror or error}") from None
    return 0


def _compare(args: argparse.Namespace) -> int:
    from . import fid_score, kernel

    _check_json(args.json)
    options = _reading(args)
    if args.metric == "cmmd":
        options["weights"] = args.weights
        if args.features:
            options["features"] = args.features
        return _show(kernel.cmmd(args.a, args.b, estimator=args.estimator, **options), args.json)
    options.update(features=args.features, weights=args.weights)
    if args.metric == "kid":
        options.update(subsets=args.subsets, subset_size=args.subset_size)
        return _show(kernel.kid(args.a, args.b, **options), args.json)
    options.update(paper=args.paper, extrapolate=args.extrapolate)
    return _show(fid_score.fid(args.a, args.b, **options), args.json)


def _clip(args: argparse.Namespace) -> int:
    from .clip import DEFAULT, clip_score

    _check_json(args.json)
    options = _reading(args)
    score = clip_score(args.images, args.prompts, model=args.model or DEFAULT, variant=args.variant, **options)
    return _show(score, args.json)


def _stats(args: argparse.Namespace) -> int:
    from .stats_file import stats

    options = _reading(args)
    options.update(features=args.features, weights=args.weights, keep_features=args.keep_features)
    made = stats(args.images, args.out, **options)
    print(f"wrote {args.out}: {made.n} images, {made.features}")
    for remark in (*made.notes, *made.warnings):
        print(f"  {remark}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from .report_run import report

    print(report(args.folder, device=args.device))
    return 0
