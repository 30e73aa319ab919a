"""Adding noise to clean samples: img2img, inpainting, training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..core.node import Node
from ..core.path import Path
from ..errors import RunError
from .run import Run


def node_for(run: Run | None, path: Path, timesteps: torch.Tensor) -> list[Node]:
    """The node that each of `timesteps` means.

    While a run is on, the pipeline means the level of the state that it holds (inpainting renoises to the node just
    reached); the counter tells it without reading the tensor, and tells repeated timesteps apart. Before the first
    call of a run that was told where it begins, that node is meant. Otherwise, when the run is over, and for samples
    of several timesteps (read on the CPU only), each value is looked up: among the run's timesteps, else on the path.
    """
    if run is not None and (timesteps.device.type != "cpu" or len(set(timesteps.flatten().tolist())) < 2):
        if run.counter is not None and run.counter < len(run):
            return [run.nodes[run.counter]]
        if run.counter is None and run.begin is not None:
            return [run.nodes[run.begin]]
    known = {} if run is None else dict(zip(run.cpu_timesteps.tolist(), run.nodes, strict=False))
    return [known.get(t) or path.at(t) for t in timesteps.flatten().tolist()]


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor | float:
    if len(values) == 1:
        return values[0]
    work = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.tensor(values, dtype=work, device=like.device).view(-1, *(1,) * (like.ndim - 1))


def in_number(timesteps: Any, samples: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The timesteps as a tensor.

    Raises:
        RunError: if there is neither one for all samples nor one for each, or samples and noise are no tensors.
    """
    if not (isinstance(samples, torch.Tensor) and isinstance(noise, torch.Tensor)):
        raise RunError(f"samples and noise must be tensors, got {type(samples).__name__} and {type(noise).__name__}")
    found = torch.as_tensor(timesteps)
    if found.numel() not in (0, 1, len(samples), len(noise)):  # none: img2img at strength 0
        raise RunError(f"{found.numel()} timesteps for {len(samples)} samples: pass one, or one for each sample")
    return found


def noised(x0: torch.Tensor, noise: torch.Tensor, nodes: Sequence[Node]) -> torch.Tensor:
    """`alpha x0 + sigma noise`, with one node for all samples or one for each; in the dtype of x0."""
    alpha, sigma = _column([n.alpha for n in nodes], x0), _column([n.sigma for n in nodes], x0)
    return (alpha * x0 + sigma * noise.to(x0.device)).to(x0.dtype)


def velocity(x0: torch.Tensor, noise: torch.Tensor, nodes: Sequence[Node]) -> torch.Tensor:
    """The v-prediction target `alpha noise - sigma x0`, in the dtype of x0."""
    alpha, sigma = _column([n.alpha for n in nodes], x0), _column([n.sigma for n in nodes], x0)
    return (alpha * noise.to(x0.device) - sigma * x0).to(x0.dtype)
