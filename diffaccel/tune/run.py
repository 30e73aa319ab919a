"""`da.tune`: candidates, successive halving on paired images, and a recipe with what was measured."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import Artifact, Receipt, path_identity
from ..calibrate.engine import Engine
from ..calibrate.fit import fit as fit_tables
from ..calibrate.fit_core import Plan as FitPlan
from ..errors import ArtifactError, OptionError
from ..identity import check_model, model_identity
from ..pipelines.applied import applied
from ..pipelines.handle import refuse_wrapped
from ..pipelines.recipe import Choice, Recipe
from ..prompts import read_prompts
from . import equal_work  # noqa: F401 - it registers candidates, and so do the sources that it stands on
from .bench import Bench, Run, quiet
from .candidates import SOURCES, USUAL, Asked, gather
from .halving import Search, evaluations, halve, rungs
from .receipt import receipt_of

FEWEST = 8  # images that choose, and that judge
FINALISTS = 3  # stock settings that are measured on the held-out images, where the best of them is picked
DEARER = 1.1  # seconds of a choice of equal work, in those of the plain run
# Options of `calibrate.fit` here: its guard and its rivals would judge again what the search and the receipt judge.
FIT: dict[str, Any] = {"samples": 16, "holdout": 8, "rivals": None}


@dataclass(frozen=True)
class Plan:
    """What a tuning does; every field tells stopped tunings apart.

    Args:
        calls: N, model calls an image.
        images: S that choose.
        holdout: H that judge.
        teacher_steps: K.
        sources: of candidates.
        fit: options of `calibrate.fit`; None fits nothing.
        stock: whether diffusers' own schedulers are searched too, for the receipt.
    """

    calls: int
    images: int
    holdout: int
    teacher_steps: int
    sources: tuple[str, ...]
    fit: Mapping[str, Any] | None = field(default_factory=dict)
    stock: bool = True

    def __post_init__(self) -> None:
        for name in ("calls", "images", "holdout", "teacher_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} must be a number of 1 or more, got {value!r}")
        if min(self.images, self.holdout) < FEWEST:
            raise OptionError(
                f"tune needs {FEWEST} images to choose by and {FEWEST} to judge by, or more: got images={self.images}, "
                f"holdout={self.holdout}"
            )
        if self.calls >= self.teacher_steps / 4:
            raise OptionError(
                f"{self.calls} calls against a teacher of {self.teacher_steps} steps: nothing to gain; take "
                "fewer calls or more teacher_steps"
            )
        if not self.sources:
            raise OptionError(f"sources must name one or more of {', '.join(SOURCES)}")

    def cost(self, candidates: int, rivals: int, batch: int) -> dict[str, int]:
        """Model calls of each part, at most (a guidance pair counts once)."""
        teacher, every = self.teacher_steps + 1, self.images + self.holdout
        found = {"teacher": teacher * every + 2 * (self.teacher_steps // 2 + 1)}
        found["search"] = evaluations(rungs(candidates, self.images)) * self.calls
        judged = 2
        if rivals:
            found["stock search"] = evaluations(rungs(rivals, self.images)) * self.calls
            judged += FINALISTS
        found["held-out"] = judged * self.holdout * self.calls
        found["timing"] = 2 * 2 * min(batch, every) * self.calls
        return found


def tune(
    pipe: Any,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    calls: int = 8,
    *,
    images: int = 48,
    holdout: int = 48,
    sources: str | Sequence[str] = USUAL,
    tables: str | os.PathLike[str] | Artifact | Sequence[str | os.PathLike[str] | Artifact] = (),
    fit: bool | Mapping[str, Any] = True,
    stock: bool = True,
    teacher_steps: int = 100,
    guidance: float | None = None,
    batch: int = 16,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **call: Any,
) -> Recipe:
    """Find the best way to run a pipeline at N model calls: `da.accelerate(pipe, da.tune(pipe, prompts, calls=8))`.

    All candidates start from the same noises with the same prompts, and are compared by how near they end to a
    many-step teacher (geometric mean of the images' relative errors). Successive halving: all of them see few images,
    the best see all. The winner is then measured on images that chose nothing, beside the pipeline's present scheduler
    and the best of diffusers' own. The pipeline is left as it was. Run again with the same arguments on the same
    machine, it gives the same recipe (`==`, `sha256`), seconds apart.

    Args:
        pipe: text-to-image or class-conditional.
        prompts: like the ones that it will be used with: a list or a file (classes of class-conditional models).
            images + holdout different ones judge on prompts that chose nothing.
        calls: N; a pair for classifier-free guidance counts once.
        images: S, by which candidates are compared; image i has prompt i (mod their number) and seed + i.
        holdout: H, the next ones, which only judge.
        sources: of candidates, one or more of `tune.SOURCES`. "staged" competes at equal work.
        tables: calibrated artifacts of this checkpoint that compete ("fitted").
        fit: whether "fitted" also fits a table (`calibrate.fit`, on images of its own); a dict is its options.
        stock: whether to search diffusers' own schedulers for the receipt.
        teacher_steps: K; the teacher makes K + 1 calls an image.
        guidance: `guidance_scale` of the pipeline's call; None leaves the pipeline's own.
        batch: images that run together.
        seed: of the first image's noise.
        out: the recipe's file, written at the end; a stopped tuning goes on from `OUT.partial`.
        progress: print the planned cost and show a bar.
        call: further arguments of the pipeline's call (height, width, ...).

    Raises:
        OptionError: no prompts, numbers out of range, unknown sources, a pipeline that cannot be driven or is wrapped.
        ArtifactError: tables of another checkpoint.
    """
    if prompts is None:
        raise OptionError("tune needs prompts: like those that you will use, a list or a file (one a line)")
    refuse_wrapped(pipe)
    if not isinstance(fit, (bool, Mapping)):
        raise OptionError(f"fit must be True, False or options of calibrate.fit (a dict), got {fit!r}")
    sources = (sources,) if isinstance(sources, str) else tuple(sources)
    tables = (tables,) if isinstance(tables, (str, os.PathLike, Artifact)) else tables
    named = read_prompts(Path(prompts) if isinstance(prompts, os.PathLike) else prompts)
    if "fitted" not in sources and tables:
        raise OptionError("tables= would have no effect: 'fitted' is not among the sources")
    fitting = None if fit is False or "fitted" not in sources else FIT | (dict(fit) if isinstance(fit, Mapping) else {})
    plan = Plan(calls, images, holdout, teacher_steps, sources, fitting, stock)
    held = [_table(given, pipe) for given in tables]
    settings = {"kind": "tune", "plan": _json(plan), "model": model_identity(pipe)["weights_sha256"]}
    settings["tables"] = [artifact.sha256 for artifact in held]
    engine = Engine(
        pipe, named, guidance=guidance, call=call, batch=batch, seed=seed, out=out, settings=settings, progress=progress
    )
    tuning = Tuning(Bench(engine, teacher_steps, tells=progress), plan, held, out, progress)
    recipe = tuning.run()
    if out is not None:
        recipe.save(out)
    engine.kept.remove()
    return recipe


class Tuning:
    """One tuning.

    Args:
        bench: of the pipeline.
        plan: what to do.
        tables: artifacts that compete.
        out: of the recipe; a fit's own state lies beside it.
        progress: print the cost and show bars.
    """

    def __init__(
        self,
        bench: Bench,
        plan: Plan,
        tables: Sequence[Artifact],
        out: str | os.PathLike[str] | None,
        progress: bool,
    ) -> None:
        self.bench, self.plan, self.tables, self.progress = bench, plan, list(tables), progress
        self.engine = bench.engine
        self.fit_out = None if out is None else f"{os.fspath(out)}.fit"
        self.fit_calls = 0

    def run(self) -> Recipe:
        """The recipe."""
        plan, engine = self.plan, self.engine
        asked = Asked(engine.pipe, self.bench.reading, plan.calls, self.tables, self._one_image)
        choices = gather([s for s in plan.sources if s != "fitted"], asked)
        rivals = self.bench.stock(plan.calls) if plan.stock else []
        offered = len(choices) + len(self.tables) + (plan.fit is not None)
        if not offered:
            raise OptionError("there is no candidate: 'fitted' needs tables= or fit=True where it is the only source")
        planned = plan.cost(offered, len(rivals), engine.batch)
        fitted = self._fit_cost()
        if self.progress:
            print(_announced(planned, fitted, len(choices), len(rivals)), flush=True)
        if plan.fit is not None:
            asked.tables = [*self.tables, *self._fit(asked)]
        choices += gather(["fitted"], asked) if "fitted" in plan.sources else []
        if not choices:
            why = "; ".join(f"{name}: {text}" for name, text in asked.left_out.items())
            raise OptionError(f"{', '.join(plan.sources)} offer no candidate ({why or 'no reason given'})")
        total = sum(planned.values())
        with engine.working(total, "tune", None), quiet():
            self.bench.learn(plan.images + plan.holdout, total)
            found = halve(len(choices), plan.images, lambda c, a, b: self.bench.choice(choices[c], a, b))
            winner = choices[found.winner]
            if not np.isfinite(found.errors[found.winner]).any():
                raise OptionError(f"no candidate could be run; {winner.name}: {self.bench.failed.get(winner.name)}")
            best = halve(len(rivals), plan.images, partial(self._rival, rivals)) if rivals else None
            return self._recipe(choices, found, rivals, best, asked)

    # ------------------------------------------------------------------ parts
    def _rival(self, rivals: Sequence[tuple[str, Run]], c: int, first: int, stop: int) -> np.ndarray:
        name, make = rivals[c]
        return self.bench.rival(f"stock {name}", self.plan.calls, make, first, stop)

    def _one_image(self, steps: int) -> None:
        self.engine.run(self.engine.batches(0, 1)[0], self.engine.pipe.scheduler, steps)

    def _fit_options(self) -> dict[str, Any]:
        plan, engine = self.plan, self.engine
        first = plan.images + plan.holdout  # images that neither choose nor judge
        shift = first % len(engine.prompts)
        given = {"prompts": engine.prompts[shift:] + engine.prompts[:shift], "seed": engine.seed + first}
        given |= {"calls": plan.calls, "batch": engine.batch, "teacher_steps": plan.teacher_steps}
        return given | {"guidance": engine.guidance} | dict(plan.fit or {}) | engine.own

    def _fit_cost(self) -> int:
        """Model calls of the fit, at most, where its states fit in memory."""
        if self.plan.fit is None:
            return 0
        known = {k: v for k, v in self._fit_options().items() if k in inspect.signature(FitPlan).parameters}
        known |= {"calls": (self.plan.calls,), "rivals": known.get("rivals") or "none"}
        grids = known.get("grids")
        known = {k: v for k, v in known.items() if k != "grids"}
        if grids not in (None, "auto"):
            known["grids"] = (grids,) if isinstance(grids, str) else tuple(grids)
        return FitPlan(**known).cost(self.engine.batch, 0, False)

    def _fit(self, asked: Asked) -> list[Artifact]:
        """The fitted table, of this run or of the stopped one before it; none where its guard refused it."""
        kept = self.engine.kept
        if "fit" in kept.notes:
            arrays = {k.removeprefix("fit/"): v for k, v in kept.arrays.items() if k.startswith("fit/")}
            made = Artifact("fit", arrays, kept.notes["fit"], "fit.safetensors")
        else:
            found = fit_tables(self.engine.pipe, out=self.fit_out, progress=self.progress, **self._fit_options())
            made = Artifact("fit", found.tensors, found.meta, "fit.safetensors")
            kept.arrays |= {f"fit/{k}": v for k, v in made.tensors.items()}
            kept.notes["fit"] = made.meta
            kept.save()
            if self.fit_out is not None:
                Path(self.fit_out).unlink(missing_ok=True)
        self.fit_calls = int(made.meta["cost"]["calls"])
        verdict = str(made.receipt[f"{self.plan.calls} calls"]["verdict"])
        if verdict != "fitted":
            asked.left_out["the fitted table"] = verdict
            return []
        return [made]

    def _recipe(
        self,
        choices: Sequence[Choice],
        found: Search,
        rivals: Sequence[tuple[str, Run]],
        best: Search | None,
        asked: Asked,
    ) -> Recipe:
        plan, bench, engine = self.plan, self.bench, self.engine
        first, stop = plan.images, plan.images + plan.holdout
        winner = choices[found.winner]
        errors = {winner.name: bench.choice(winner, first, stop)}
        try:
            plain: Run | None = (present := bench.plain(plan.calls))
            errors["plain"] = bench.rival("plain", plan.calls, present, first, stop)
        except (ArtifactError, OptionError) as error:
            plain, bench.failed["plain"] = None, str(error)
        finalists = [rivals[c] for c in best.ranked[:FINALISTS]] if best else []
        measured = [(name, bench.rival(f"stock {name}", plan.calls, make, first, stop)) for name, make in finalists]
        seconds = bench.seconds(self._timed(winner, plain))
        receipt = receipt_of(
            plan.calls, choices, found, winner, errors[winner.name], errors.get("plain"), measured,
            plain=type(engine.pipe.scheduler).__name__, rivals=len(rivals),
            left_out=asked.left_out | bench.failed, gap=bench.gap(), teacher=plan.teacher_steps,
        )  # fmt: skip
        receipt["prompts"] = {
            "given": len(engine.prompts),
            "those that judge chose nothing": len(engine.prompts) >= stop,
        }
        scale = engine.scale
        made_on = {
            "pipeline": type(engine.pipe).__name__,
            "model": model_identity(engine.pipe),
            "path": path_identity(bench.reading.path, bench.reading.settings["prediction_type"]),
            "guidance": scale if isinstance(scale, (int, float)) else None,
            "shape": list(bench.shape),
            "call": {k: str(v) for k, v in engine.call.items() if k != "guidance_scale"},
        }
        spent: dict[str, Any] = {
            "model calls": {"fit": self.fit_calls, "everything else": engine.calls},
            "seconds": round(engine.seconds, 1),
            "seconds an image": seconds,
        }
        if winner.work is not None and seconds["tuned"] > DEARER * seconds.get("plain", np.inf):
            spent["warning"] = "the same work, but more seconds than the plain run on this machine"
        return Recipe(winner, made_on, Receipt(receipt), spent)

    def _timed(self, winner: Choice, plain: Run | None) -> dict[str, Any]:
        engine = self.engine

        def tuned(batch: Any) -> None:
            with applied(engine.pipe, winner):
                engine.run(batch, engine.pipe.scheduler, winner.calls)

        def untuned(batch: Any) -> None:
            scheduler, steps, more = plain()  # type: ignore[misc]
            engine.run(batch, scheduler, steps, **more)

        return {"tuned": tuned} | ({} if plain is None else {"plain": untuned})


def _announced(planned: Mapping[str, int], fit: int, candidates: int, rivals: int) -> str:
    total = sum(planned.values()) + fit
    parts = ", ".join(f"{name} {n}" for name, n in [*planned.items(), *([("fit", fit)] if fit else [])])
    return (
        f"tune: {candidates} candidates{' and a fitted table' if fit else ''}, {rivals} stock settings beside; at most "
        f"{total} model calls ({total / 50:.0f} images at 50 calls): {parts}"
    )


def _table(given: Any, pipe: Any) -> Artifact:
    found = given if isinstance(given, Artifact) else Artifact.load(given)
    check_model(found, pipe)
    return found


def _json(plan: Plan) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(plan).items()}
