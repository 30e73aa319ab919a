"""Gaussian teleportation: the first part of a run in closed form, for the price of a matrix product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.hooks import ModelHook
from diffusers.utils.torch_utils import randn_tensor

from ..artifact import Artifact, check_path
from ..core.gauss import GaussLaw
from ..core.grid import nodes as grid_nodes
from ..core.node import Node
from ..core.path import Nodes, Path
from ..errors import ArtifactError, OptionError, RunError
from ..identity import check_model, denoiser_of
from ..schedulers import TableScheduler
from ..schedulers.from_config import path_of
from ..schedulers.plan import run_on
from ..schedulers.settings import grid_of
from .handle import Handle

NEAR = 0.98  # a node of the grid closer to the level of arrival than this is left out


@dataclass(frozen=True)
class TeleportReport:
    """What the last run did.

    Args:
        calls: model calls.
        level: sigma/alpha where the model took over.
        replaced: calls that the same grid would have made above it.
    """

    calls: int
    level: float
    replaced: int

    def __str__(self) -> str:
        return f"teleport: {self.calls} model calls from sigma/alpha = {self.level:.4g}; replaced {self.replaced}"


class LateScheduler(TableScheduler):
    """A `TableScheduler` whose runs begin at a level below the first. Only for a pipeline inside `teleport`."""

    level: float = math.inf
    armed: bool = False
    replaced: int = 0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        timesteps: Any = None,
        mu: float | None = None,
    ) -> None:
        """Begin a run of `num_inference_steps` calls from the level; the grid's own nodes lie below it."""
        if not self.armed:
            raise RunError("this pipeline is wrapped by teleport: call the handle, h(prompt, ...), not the pipeline")
        calls = num_inference_steps if num_inference_steps is not None else len(sigmas if sigmas is not None else [])
        if timesteps is not None or not calls:
            raise OptionError("a teleported run takes num_inference_steps, no timesteps of your own")
        sampler, options = self._sampler(calls)
        dynamic = self.config.path == "flow" and self.config.use_dynamic_shifting
        path = path_of(self.config, mu=mu if dynamic else None)
        nodes, self.replaced = late_nodes(path, self.level, sampler.intervals_of(calls, **options), self.config)
        self._runs.set(run_on(nodes, sampler, options, calls, device))


def late_nodes(path: Path, level: float, intervals: int, settings: Any) -> tuple[Nodes, int]:
    """The nodes of the settings' grid below a level, after the level itself: `intervals` in all.

    Returns:
        the nodes, and how many nodes of that grid lie above.
    """
    grid, options, final = grid_of(settings)
    for n in range(intervals, 50 * intervals + 100):
        whole = grid_nodes(path, n, grid, final=final, **options)
        below = [node for node in whole if node.level < NEAR * level]
        if len(below) >= intervals:
            return Nodes([path.at_level(level), *below[-intervals:]], path), len(whole) - len(below)
    raise OptionError(f"no grid of {grid!r} has {intervals} nodes below sigma/alpha = {level:g}")


class Teleport(Handle):
    """See `teleport`."""

    def __init__(self, pipe: Any, scheduler: LateScheduler, law: GaussLaw, shape: tuple[int, ...], start: Node) -> None:
        # The hook does nothing but tell other wrappers that the pipeline is wrapped.
        super().__init__(pipe, "teleport", scheduler, {denoiser_of(pipe): ModelHook()})
        self.law, self.shape, self.start = law, shape, start

    def __call__(self, *args: Any, latents: Any = None, generator: Any = None, **kwargs: Any) -> Any:
        """`pipe(...)` from teleported noise.

        Args:
            latents: standard normal noise (B, *shape); None: drawn from `generator`.
            generator: as for the pipeline.
            args, kwargs: of the pipeline.
        """
        if self._original is None:
            raise RunError("this wrapper was removed")
        scheduler = self._scheduler
        if latents is None:
            latents = randn_tensor(
                (self._batch(args, kwargs), *self.shape),
                generator=generator,
                device=self._device(),
                dtype=denoiser_of(self.pipe).dtype,
            )
        if tuple(latents.shape[1:]) != self.shape:
            raise ArtifactError(
                f"teleport was calibrated for samples of shape {self.shape}, these are {tuple(latents.shape[1:])}; use "
                "the size that it was calibrated for, or calibrate again"
            )
        scheduler.armed = True
        try:
            moved = self._moved(latents)
            return self.pipe(*args, latents=moved, generator=generator, **kwargs)
        finally:
            scheduler.armed = False

    def _moved(self, noise: torch.Tensor) -> torch.Tensor:
        """The state at the level of arrival, divided by what the pipeline will multiply it with."""
        end = self.start_path.at_level(self._scheduler.level)
        begin = noise.flatten(1).double() * _multiplied(self._scheduler, self.start)
        x = self.law.flow(begin, self.start, end).view_as(noise)
        return (x / _multiplied(self._scheduler, end)).to(noise)

    @property
    def start_path(self) -> Path:
        """The path of the scheduler."""
        return path_of(self._scheduler.config)

    def _batch(self, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
        given = kwargs.get("prompt", kwargs.get("class_labels", args[0] if args else None))
        if given is None:
            raise OptionError("teleport needs a prompt (or class labels) or latents to know how many images are wanted")
        many = len(given) if isinstance(given, (list, tuple)) else 1
        return many * int(kwargs.get("num_images_per_prompt") or 1)

    def _device(self) -> torch.device:
        return torch.device(getattr(self.pipe, "_execution_device", None) or self.pipe.device)

    def report(self) -> TeleportReport | None:
        """What the last run did; None before it."""
        calls = self._scheduler.num_inference_steps
        return None if calls is None else TeleportReport(calls, self._scheduler.level, self._scheduler.replaced)


def _multiplied(scheduler: TableScheduler, node: Node) -> float:
    """What a pipeline multiplies latents with: `init_noise_sigma` of a run that begins at `node`."""
    return float((node.sigma**2 + 1) ** 0.5) if scheduler.config.path == "edm" else 1.0


def teleport(
    pipe: Any,
    artifact: Artifact | str,
    *,
    skip_to: float | None = None,
    sampler: str | None = None,
    strict: bool = True,
) -> Teleport:
    """Replace all model calls above a noise level by the exact flow of Gaussian data (arXiv:2412.09726).

    `with da.teleport(pipe, "gauss.safetensors") as h: h(prompt, num_inference_steps=8)` makes 8 model calls, all of
    them below the level.

    Args:
        pipe: the pipeline that the artifact was made on.
        artifact: of `diffaccel calibrate gauss`.
        skip_to: level (sigma/alpha) where the model takes over; None: the artifact's own advice.
        sampler: None: the one of the pipeline's scheduler if it is ours, else "dpmpp".
        strict: other weights are an error, not a warning.

    Raises:
        ArtifactError: an artifact of another kind, checkpoint or path, or one that advises no skip.
        OptionError: a level outside the path, or a pipeline that is wrapped already.
    """
    found = Artifact.load(artifact, "gauss") if not isinstance(artifact, Artifact) else artifact
    if found.kind != "gauss":
        raise ArtifactError(f"teleport needs an artifact of kind 'gauss', {found.file} is {found.kind!r}")
    check_model(found, pipe, strict=strict)
    level = found.meta["options"]["skip_to"] if skip_to is None else skip_to
    if level is None:
        raise ArtifactError(
            f"{found.file} advises no skip: none was within the tolerance of its calibration. Pass skip_to=LEVEL to "
            f"use one all the same; errors by level: {found.meta['receipt']['median relative error by level']}"
        )
    own = pipe.scheduler.config
    options = {"sampler": sampler} if sampler or not isinstance(pipe.scheduler, TableScheduler) else {}
    scheduler = LateScheduler.from_config(own, **options)
    check_path(found, path_of(scheduler.config), scheduler.config.prediction_type)
    path = path_of(scheduler.config)
    if not isinstance(level, (int, float)) or not path.last.level < level < path.first.level:
        raise OptionError(f"skip_to must lie between {path.last.level:g} and {path.first.level:g}, got {level!r}")
    scheduler.level = float(level)
    tensors = {k: np.asarray(v, np.float64) for k, v in found.tensors.items()}
    axes = tensors["axes"].reshape(len(tensors["axes"]), -1)
    law = GaussLaw(tensors["mean"].reshape(-1), axes, tensors["variances"], float(tensors["rest"][0]))
    return Teleport(pipe, scheduler, law, tuple(found.meta["shape"]), path.first)
