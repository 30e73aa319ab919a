"""Exact sharing of a transformer by diffusers' own context parallelism, with our checks around each call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import ContextParallelConfig
from diffusers.hooks import ModelHook

from ..errors import OptionError
from .patch_call import number, register, unregister
from .patch_settings import Settings
from .patch_watch import Watch
from .protocol import World, WorldError, line

NAME = "diffaccel.ulysses"
THEIRS = "cp_"  # diffusers' names of its hooks begin so


def takes(model: torch.nn.Module) -> bool:
    """Whether diffusers can share this model's sequence among devices."""
    return getattr(model, "_cp_plan", None) is not None


class UlyssesHook(ModelHook):
    """Each rank computes a range of tokens; attention exchanges tokens for heads (DeepSpeed-Ulysses, arXiv:2309.14509).

    Args:
        world: of 2 or more launched processes.
        settings: with mode "sync".
        run, facts: see `PatchHook`.

    Attributes:
        calls: of the denoiser in this run.
    """

    def __init__(
        self, world: World, settings: Settings, run: Callable[[], Any], facts: Callable[[], dict[str, Any]]
    ) -> None:
        super().__init__()
        self.world, self.run, self.watch = world, run, Watch(world, settings, facts)
        self.calls, self._run, self._time = 0, None, -float("inf")

    # ------------------------------------------------------------------ on and off
    def attach(self, model: Any) -> None:
        """Share a model.

        Raises:
            OptionError: if its heads cannot be divided among so many ranks.
        """
        heads = int(model.config.num_attention_heads)
        missing = -heads % self.world.size
        if missing and missing >= (heads + missing) // self.world.size:
            raise OptionError(
                f"the {heads} attention heads of {type(model).__name__} cannot be divided among {self.world.size} "
                "ranks (a rank would have padding only): start fewer processes"
            )
        self._config = ContextParallelConfig(ulysses_degree=self.world.size, ulysses_anything=missing > 0)
        if self.world.device.type == "cpu":
            _enable_on_cpu(model, self._config, self.world)
        else:
            model.enable_parallelism(config=self._config)
        self.names = list(inspect.signature(type(model).forward).parameters)[1:]
        register(model, self, NAME)

    def detach(self, model: Any) -> None:
        """Take it off; the model is then what it was."""
        unregister(model, NAME)
        for module in model.modules():
            registry = getattr(module, "_diffusers_hook", None)
            for name in [n for n in reversed(getattr(registry, "_hook_order", ())) if n.startswith(THEIRS)]:
                unregister(module, name)
        _tell(model, None)

    # ------------------------------------------------------------------ one call
    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self.names, args)), **kwargs}
        self.watch.settle()
        run, now = self.run(), number(arguments["timestep"])
        if run is not self._run or now > self._time:
            self.watch.new_run()
            self.calls, self._run = 0, run
        self._time = now
        self.watch.agree(arguments, self.names[0])
        try:
            output = self._shared(args, kwargs)
        except WorldError:
            raise
        except BaseException as error:
            self.world.abort(f"{line(error)} (in diffusers' context parallelism, call {self.calls})")
            raise
        self.calls += 1
        self.watch.mark()
        return output

    def _shared(self, args: Any, kwargs: Any) -> Any:
        try:
            return self.fn_ref.original_forward(*args, **kwargs)
        except AssertionError as error:  # before anything is sent, and on every rank: the sizes are the same
            if self._config.ulysses_anything or "divisible by mesh size" not in str(error):
                raise
            self._config.ulysses_anything = True  # ranges of unequal length, at the price of one more message a layer
            return self.fn_ref.original_forward(*args, **kwargs)


def _enable_on_cpu(model: Any, config: ContextParallelConfig, world: World) -> None:
    """`model.enable_parallelism(config)`, which needs an accelerator (it divides by the number of them)."""
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    whole = ParallelConfig(context_parallel_config=config)
    mesh = init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    whole.setup(world.rank, world.size, world.device, mesh=mesh)
    _tell(model, whole)
    apply_context_parallel(model, config, model._cp_plan)


def _tell(model: Any, config: Any) -> None:
    """Make a configuration known to the model and to its attention; None for alone."""
    model._parallel_config = config
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = config
