"""A scheduler that shows what a pipeline computes, and steers where it computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..core.path import Nodes
from ..samplers.registry import get
from ..schedulers import TableScheduler
from ..schedulers.compat import CHOICES
from ..schedulers.plan import run_on

See = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config without its choice of the run."""
    return {k: v for k, v in config.items() if k not in CHOICES}


class OnNodes(TableScheduler):
    """A `TableScheduler` that runs on `given` nodes, where there are, whatever the pipeline asks for.

    `own_noise`: whether the pipeline makes its start noise; False where it is handed the state itself.
    """

    given: Nodes | None = None
    own_noise = True

    @property
    def init_noise_sigma(self) -> float:
        """As for the sampler; 1 where the pipeline is handed the state itself."""
        return super().init_noise_sigma if self.own_noise else 1.0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,
        timesteps: Any = None,
        mu: float | None = None,
    ) -> None:
        """Begin a run: on the given nodes, where there are, else as the pipeline asks."""
        if self.given is None:
            return super().set_timesteps(num_inference_steps, device, sigmas, timesteps, mu)
        sampler, options = self._sampler()
        self._runs.set(run_on(self.given, sampler, options, len(self.given) - 1, device))


class Captured(OnNodes):
    """Shows each call.

    Build with `Captured.of`. `see(i, sample, output, state)` is told call i, the state that the model saw, its output
    and the next state, as the pipeline handed them over. Not to be saved with a pipeline.
    """

    _see: See | None = None

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        sampler: str,
        options: Mapping[str, Any] | None = None,
        *,
        see: See | None = None,
        nodes: Nodes | None = None,
        own_noise: bool = True,
        **settings: Any,
    ) -> Captured:
        """See the class.

        Args:
            config: of the pipeline's scheduler.
            sampler, options: as in `TableScheduler`; an option may be calibrated data itself.
            see: told of each call.
            nodes: N + 1 nodes to run on; None: the scheduler's grid.
            own_noise: whether the pipeline makes its start noise; False where it is handed the state itself.
            settings: further arguments of `from_config` (grid, grid_options, final_sigmas_type).
        """
        given, takes = dict(options or {}), get(sampler).calibrated
        data = {}
        if takes is not None:
            name = takes.option
            data = {name: given.pop(name, get(sampler).defaults[name])}
            settings[name] = get(sampler).defaults[name]
        made: Captured = cls.from_config(model_config(config), sampler=sampler, **given, **settings)
        made._filled, made.given, made._see, made.own_noise = data, nodes, see, own_noise
        return made

    @property
    def nodes(self) -> Nodes:
        """The nodes of the last run."""
        return self._runs.need().grid

    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        """As `TableScheduler.step`."""
        done = super().step(model_output, timestep, sample, *args, **kwargs)
        if self._see is not None:
            state = done[0] if isinstance(done, tuple) else done.prev_sample
            self._see(int(self.step_index or 0) - 1, sample, model_output, state)
        return done
