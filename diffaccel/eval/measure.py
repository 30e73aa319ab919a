"""What is measured on each finished block of a sweep, kept beside it: features, CLIP embeddings, errors to the teacher.

Blocks are measured by all processes and put together by one, in order, so that numbers do not depend on who did what.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OptionError
from ..parallel.world import World
from . import features as nets
from .cells import TEACHER, Block, Cell, Plan, Store
from .images import Images, open_images
from .pairs import paired
from .stats_file import Stats, known, stats
from .turns import take_turns

Kind = tuple[str, Callable[[dict[str, np.ndarray], Cell, Block], dict[str, Any]]]


@dataclass(frozen=True)
class Meter:
    """The networks of a sweep.

    features, clip: their ids; None: not measured. net, tower: the networks; None where only what is measured already
    can be read.
    """

    features: str | None
    clip: str | None
    net: nets.Features | None
    tower: nets.Features | None
    device: str
    reference: Any = None

    @staticmethod
    def open(reference: Any, features: Any, weights: Any, clip: str | None, device: str) -> Meter:
        """Everything that can be wrong with networks and reference, before the first image is made."""
        net: nets.Features | None = None
        side: Stats | Images | None = None
        if reference is None and (features is not None or weights is not None):
            raise OptionError("features and weights are for FID, which needs a reference")
        if reference is not None:
            name = features if isinstance(features, str) else getattr(features, "id", None)
            found = known(reference, name)
            if found is not None and found.features is None:
                raise OptionError(f"{found.name} does not tell its features: name them with features=... (--features)")
            side = found or open_images(reference)  # a wrong path is told before a network is loaded
            net = nets.get(features if features is not None or found is None else found.features, weights)
            if found is not None and found.features != net.id:
                raise OptionError(f"the reference {found.name} has features {found.features!r}, not {net.id!r}")
        tower = None if clip is None else nets.get(f"clip:{clip}")
        return Meter(net.id if net else None, tower.id if tower else None, net, tower, device, side)

    def measure_all(self, store: Store, plan: Plan, world: World, progress: bool) -> None:
        """Measure what is missing."""

        def work(cell: Cell, block: Block) -> None:
            world.check()
            arrays = store.read(cell, block)
            for kind, measure in self._missing(store, plan, cell, block):
                store.write(cell, block, measure(arrays, cell, block), kind)

        take_turns(
            [(c, b) for c in plan.cells for b in c.blocks(plan.block)],
            lambda cell, block: bool(self._missing(store, plan, cell, block)),
            work,
            lambda cell, block: len(block),
            world,
            name="measure",
            unit="image",
            progress=progress,
        )

    def _missing(self, store: Store, plan: Plan, cell: Cell, block: Block) -> list[Kind]:
        """What is to be measured on a block and is not yet."""
        if not store.done(cell, block):
            return []
        found: list[Kind] = []
        for id, net in ((plan.features, self.net), (plan.clip, self.tower)):
            if id is not None and net is not None:
                found.append((slug(id), partial(_values, net, self.device)))
        teacher = plan.of_role(TEACHER)
        theirs = None if teacher is None or cell == teacher else overlap(store, plan, teacher, block)
        if teacher is not None and theirs is not None and not store.counted(cell, block)["noisy"]:
            found.append((pair_slug(teacher, theirs), partial(_errors, store, teacher, theirs)))
        return [(kind, measure) for kind, measure in found if not store.done(cell, block, kind)]


def _values(net: nets.Features, device: str, arrays: dict[str, np.ndarray], cell: Cell, block: Block) -> dict[str, Any]:
    """Features of the images of a block."""
    return {"values": nets.extract(open_images(arrays["images"]), net, device=device).values.numpy()}


def slug(id: str) -> str:
    """Part of a file's name for the id of a network."""
    return "f-" + hashlib.sha256(id.encode()).hexdigest()[:10]


def pair_slug(teacher: Cell, block: Block) -> str:
    """Part of a file's name for errors to a block of a teacher."""
    return f"e-{hashlib.sha256(teacher.folder.encode()).hexdigest()[:10]}-{len(block)}"


def overlap(store: Store, plan: Plan, teacher: Cell, block: Block) -> Block | None:
    """The teacher's finished block that holds the first images of this one."""
    return next((b for b in teacher.blocks(plan.block) if b.first == block.first and store.done(teacher, b)), None)


def _errors(
    store: Store, teacher: Cell, theirs: Block, arrays: dict[str, np.ndarray], cell: Cell, block: Block
) -> dict[str, Any]:
    """PSNR, SSIM, LPIPS and latent error of each image that the teacher has too; reasons for what is missing."""
    target = store.read(teacher, theirs)
    n = min(len(block), len(theirs))
    states: dict[str, Any] = {}
    if "latents" in arrays and "latents" in target:
        states = {"latents": arrays["latents"][:n], "teacher_latents": target["latents"][:n]}
    found = paired(arrays["images"][:n], target["images"][:n], **states)
    return {**found.columns, "missing": np.array(json.dumps(found.missing))}


# ---------------------------------------------------------------------- the reference
def reference_name(reference: Any, meter: Meter) -> str | None:
    """Where the reference can be read again; what is no file and no name of statistics is kept in the sweep's folder,
    under a name of its content: other images are another reference, wherever they lie."""
    side = meter.reference
    if side is None:
        return None
    if isinstance(side, Stats) and isinstance(reference, (str, Path)):
        return str(Path(reference).resolve()) if Path(reference).exists() else str(reference)
    return f"reference-{hashlib.sha256(f'{side.digest()} {meter.features}'.encode()).hexdigest()[:12]}.npz"


def save_reference(name: str | None, meter: Meter, store: Store) -> None:
    """Measure a reference of images, once."""
    side = meter.reference
    if name is None or not name.startswith("reference-") or (store.root / name).exists():
        return
    made = side if isinstance(side, Stats) else stats(side, features=meter.net, device=meter.device)
    made.save(store.root / name, keep_features=made.values is not None)


def read_reference(plan: Plan, store: Store) -> Stats | None:
    """The reference of a sweep."""
    if plan.reference is None:
        return None
    own = store.root / plan.reference
    return stats(own if own.exists() else plan.reference, features=plan.features)
