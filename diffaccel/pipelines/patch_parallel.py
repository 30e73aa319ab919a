"""One image on several devices: DistriFusion, PCPP and exact patches on an unmodified pipeline."""

from __future__ import annotations

import atexit
import inspect
import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch

from ..denoiser.contract import hooks_of
from ..drive import fingerprint, plain_config
from ..errors import OptionError
from ..parallel.layers_found import FAMILIES
from ..parallel.patch import PatchHook, Tally
from ..parallel.patch_cost import Costs, costs
from ..parallel.patch_settings import LATE, Settings
from ..parallel.protocol import TIMEOUT, SoloWorld, World, line
from ..parallel.ulysses import UlyssesHook, takes
from ..parallel.world import DistWorld
from .handle import denoisers, refuse_stateful, refuse_wrapped

logger = logging.getLogger(__name__)
ULYSSES = "diffusers' context parallelism (Ulysses)"
COMMAND = "torchrun --nproc-per-node P script.py"


@dataclass(frozen=True)
class PatchReport:
    """What was counted on this rank in the last run.

    Attributes:
        ranks: of the world.
        mode: see `patch_parallel`.
        calls: of the denoiser.
        late: those that used what other ranks had sent in the call before.
        bytes, messages: received, by kind: "attn" keys and values, "conv" rows, "gn" statistics, "out" outputs.
        waited: seconds that this rank stood and waited, by kind. On a GPU the host does not wait: near 0.
    """

    ranks: int
    mode: str
    calls: int
    late: int
    bytes: dict[str, int]
    messages: dict[str, int]
    waited: dict[str, float]

    def __str__(self) -> str:
        lines = [f"{self.mode} on {self.ranks} rank(s): {self.calls} calls, {self.late} of them with late messages"]
        lines += [
            f"  {kind:4} {n / 1e6:9.3f} MB, {self.messages[kind]} messages, {self.waited.get(kind, 0):.3f} s waited"
            for kind, n in self.bytes.items()
        ]
        return "\n".join(lines)


class PatchParallel:
    """A pipeline whose denoiser is shared by the ranks of a world; see `patch_parallel`.

    Attributes:
        pipe: the pipeline, the same object and class as before.
        world: rank, size and device of this process.
        settings: what was chosen.
    """

    def __init__(self, pipe: Any, world: World, settings: Settings) -> None:
        self.pipe, self.world, self.settings = pipe, world, settings
        self.name, self.model = _denoiser(pipe)
        self._hook: PatchHook | UlyssesHook | None = None
        if world.size == 1:
            return
        weights = fingerprint(pipe)
        kind = UlyssesHook if _by_diffusers(self.model, world, settings) else PatchHook
        self._hook = kind(world, settings, lambda: pipe.scheduler.timesteps, lambda: _facts(pipe, weights))
        self._hook.attach(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`pipe(...)`; without a `generator`, all ranks get one with the same seed (of rank 0's global one)."""
        names = inspect.signature(type(self.pipe).__call__).parameters
        if self.world.size > 1 and kwargs.get("generator") is None and "generator" in names:
            seed = str(int(torch.randint(2**31, ()))).encode() if self.world.rank == 0 else None
            found = int(self.world.broadcast("seed", seed, timeout=self.world.timeout))
            kwargs["generator"] = torch.Generator("cpu").manual_seed(found)
        return self.pipe(*args, **kwargs)

    def report(self) -> PatchReport:
        """What this rank has counted in the last run."""
        size, traffic = self.world.size, self.world.traffic
        if isinstance(self._hook, UlyssesHook):
            return PatchReport(size, f"sync ({ULYSSES}, whose bytes are not counted)", self._hook.calls, 0, {}, {}, {})
        tally = self._hook.tally if self._hook else Tally()
        mode = self.settings.mode if self._hook else "one process, nothing shared"
        counted = dict(traffic.bytes), dict(traffic.messages), dict(traffic.seconds)
        return PatchReport(size, mode, tally.calls, tally.late, *counted)

    def costs(self, height: int, width: int, *, batch: int = 2, ranks: int | None = None, text: int = 77) -> Costs:
        """Bytes, messages and memory of one call, before anything runs.

        Args:
            height, width: of the image, in pixels.
            batch: images in one call of the denoiser; guidance of one image makes 2.
            ranks: how many there would be; None: as many as there are.
            text: length of the text.
        """
        scale = self.pipe.vae_scale_factor if hasattr(self.pipe, "vae_scale_factor") else 1
        size = height // scale, width // scale
        return costs(self.model, *size, ranks or self.world.size, self.settings, batch=batch, text=text)

    def explain(
        self,
        height: int,
        width: int,
        *,
        batch: int = 2,
        ranks: int | None = None,
        text: int = 77,
        seconds: float | None = None,
        bandwidth: float = 25e9,
        latency: float = 20e-6,
    ) -> str:
        """What a call will cost, as text; computed from the layers' shapes.

        Args:
            height, width, batch, ranks, text: see `costs`.
            seconds: that one call takes on one device. With it, a model of the time is added.
            bandwidth: bytes a second between two devices (PCIe 4: about 25e9, NVLink of an A100: about 300e9).
            latency: seconds of an empty message.
        """
        ranks = ranks or self.world.size
        if ranks == 1:
            return f"patch_parallel: one process, nothing is shared; start the script with {COMMAND}"
        if isinstance(self._hook, UlyssesHook):
            return f"patch_parallel, mode sync: {ranks} ranks share the tokens by {ULYSSES}, which is exact"
        found = self.costs(height, width, batch=batch, ranks=ranks, text=text)
        patches = len(found.bytes)
        shared = "tokens" if found.ulysses is not None else "rows"
        lines = [
            f"patch_parallel, mode {self.settings.mode}: {ranks} ranks, {ranks // patches} group(s) that split the "
            f"batch, {patches} patch(es) of {shared} each",
            "received by a rank in a call, MB (mean over patches):",
            f"  after the warm-up {_megabytes(found.bytes)}",
            f"  synchronous       {_megabytes(found.sync_bytes)}",
            f"  DistriFusion as published {_megabytes(found.published)}",
            f"exchanges whose end is waited for: {sum(found.waits.values())} "
            f"({', '.join(f'{n} {kind}' for kind, n in found.waits.items())}); messages to a rank: {found.messages}",
            f"memory for late keys and values: {found.memory / 1e6:.1f} MB",
        ]
        if patches == 1:
            lines.append("each rank has a whole image, so the mode makes no difference here (guidance='patches' would)")
        if found.ulysses is not None:
            lines.append(
                f"{ULYSSES} (exact) would receive {found.ulysses / 1e6:.1f} MB"
                + (": mode='sync' uses it on accelerators" if takes(self.model) else "; it does not know this model")
            )
        if seconds is not None:
            late = LATE[self.settings.mode]
            model = found.seconds(seconds, ranks=ranks, bandwidth=bandwidth, latency=latency, late=late)
            lines.append(
                f"a model, not a measurement: {model:.4g} s a call in place of {seconds:.4g} s; at equal time one "
                f"device makes {model / seconds:.0%} of the calls, which is the baseline to compare images with"
            )
        return "\n".join(lines)

    def remove(self) -> None:
        """Take all hooks off; the pipeline is then what it was. Twice is fine."""
        if self._hook is not None:
            self._hook.detach(self.model)
            self._hook = None

    def __enter__(self) -> PatchParallel:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def patch_parallel(
    pipe: Any,
    mode: str = "fresh_halo",
    *,
    ratio: float | None = None,
    warmup: int | None = None,
    extrapolate: bool | None = None,
    gn: str | None = None,
    guidance: str = "auto",
    world: World | None = None,
    timeout: float = TIMEOUT,
) -> PatchParallel:
    """Make each image with all processes that torchrun, accelerate launch or srun started.

    Every rank calls the pipeline with the same arguments and gets the same image. In one process, without other ranks,
    the pipeline is left alone.

        pipe = StableDiffusionXLPipeline.from_pretrained(..., torch_dtype=torch.float16)
        with da.patch_parallel(pipe, mode="fresh_halo") as h:       # torchrun --nproc-per-node 4 script.py
            pipe.to(h.world.device)
            image = h("a lighthouse", generator=torch.Generator("cpu").manual_seed(0)).images[0]

    Args:
        pipe: with a UNet2DConditionModel, UNet2DModel, SD3Transformer2DModel or FluxTransformer2DModel; with "sync" any
            transformer that diffusers has a plan for (Qwen-Image, Wan, FLUX.2, LTX ...).
        mode: "sync" computes what one device computes; on accelerators (and everywhere for models that only diffusers
            knows) by diffusers' context parallelism, unless guidance="split". The others let messages be one call old
            after `warmup` calls, so that they travel while the next call is computed: "fresh_halo" keys and values
            only; "displaced" rows of convolutions and statistics of group normalisation too (DistriFusion,
            arXiv:2402.19481); "partial" as "displaced", and keys and values only of the neighbours' nearest tokens
            (PCPP, arXiv:2412.02962).
        ratio, warmup, extrapolate, gn, guidance: see `parallel.patch_settings.Settings`.
        world: None for the launcher's; `EmulatedWorld(p)` computes what p ranks would, in one process.
        timeout: seconds for which a rank waits for another.

    Raises:
        OptionError: an option that is unknown or without effect, a model that cannot be shared, other hooks.
        WorldError: the ranks do not meet.
    """
    settings = Settings(mode, ratio, warmup, extrapolate, gn, guidance)
    _refuse(pipe)
    return PatchParallel(pipe, world if world is not None else _launched(timeout), settings)


# ---------------------------------------------------------------------- the world of the launcher
_OPENED: list[World] = []  # a process group cannot be joined twice


def _launched(timeout: float) -> World:
    from ..parallel.world import open_world

    if not _OPENED:
        if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1"))) < 2:
            logger.warning("patch_parallel: one process, so nothing is shared; for P devices start it with %s", COMMAND)
            return SoloWorld()
        _OPENED.append(open_world(timeout=timeout))
        atexit.register(_leave)
    return _OPENED[0]


def _leave() -> None:
    """At exit: tell the other ranks what ended this one, if that was an error."""
    error = getattr(sys, "last_value", None)
    if error is not None:
        _OPENED[0].abort(line(error))
    _OPENED[0].close()


# ---------------------------------------------------------------------- the pipeline
def _denoiser(pipe: Any) -> tuple[str, torch.nn.Module]:
    found = denoisers(pipe)
    if len(found) != 1:
        raise OptionError(
            f"{type(pipe).__name__} has {len(found)} denoisers ({', '.join(found)}); patch_parallel takes 1"
        )
    return next(iter(found.items()))


def _by_diffusers(model: Any, world: World, settings: Settings) -> bool:
    """Whether diffusers shares this model: exactly, between launched processes, where it has a plan for it.

    Raises:
        OptionError: for a model that only diffusers knows, where it cannot.
    """
    ours, launched = type(model).__name__ in FAMILIES, isinstance(world, DistWorld)
    able = takes(model) and launched and settings.mode == "sync" and settings.guidance != "split"
    if takes(model) and not ours and not able:
        raise OptionError(
            f"{type(model).__name__} can be shared with mode='sync' only, by {ULYSSES}, between launched processes and "
            f"without guidance='split'; got mode={settings.mode!r}, guidance={settings.guidance!r} in a "
            f"{type(world).__name__}"
        )
    return able and (not ours or world.device.type != "cpu")


def _refuse(pipe: Any) -> None:
    """Raise `OptionError` if something on the pipeline does not go together with patches."""
    refuse_wrapped(pipe)
    name, model = _denoiser(pipe)
    refuse_stateful(pipe, "patch_parallel", "ranks see different parts of the image and would decide differently")
    if any(n.startswith("cp_") for n, _ in hooks_of(model)):
        raise OptionError(
            f"pipe.{name} has diffusers' context parallelism on it, which shares the same devices already"
        )
    if any(hasattr(part, "_hf_hook") for part in model.modules()):
        raise OptionError(f"pipe.{name} is offloaded by accelerate, which patch_parallel does not go together with")


def _facts(pipe: Any, weights: str) -> dict[str, Any]:
    """What decides an image besides the arguments of the denoiser."""
    return {
        "pipeline": type(pipe).__name__,
        "weights": weights,
        "scheduler": {"class": type(pipe.scheduler).__name__, **plain_config(pipe.scheduler)},
        "timesteps": [float(t) for t in pipe.scheduler.timesteps],
        "guidance_scale": getattr(pipe, "_guidance_scale", None),
    }


def _megabytes(by_rank: list[dict[str, int]]) -> str:
    kinds = {kind: sum(d.get(kind, 0) for d in by_rank) / len(by_rank) / 1e6 for d in by_rank for kind in d}
    return f"{sum(kinds.values()):.1f} ({', '.join(f'{kind} {n:.2f}' for kind, n in kinds.items())})"
