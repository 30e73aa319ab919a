"""`FSamplerScheduler`: predicted answers in place of model calls, compiled into the table."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..core.pattern import Pattern, parse
from ..errors import OptionError
from ..samplers.skip import skip as skipping
from .registration import public
from .table_scheduler import TableScheduler

OPTIONS = ("skip", "quantity", "coordinate", "protect_first", "protect_last", "streak_rule")
DEFAULTS = {"quantity": "x0", "coordinate": "lam", "protect_first": 2, "protect_last": 2}
# what the authors' nodes are set to: the advanced one, and the simple one
OFFICIAL: dict[Any, dict[str, Any]] = {
    False: {},
    True: {"quantity": "residual", "coordinate": "index"},
    "simple": {"quantity": "x0", "coordinate": "sigma", "protect_first": 2, "protect_last": 3},
}


@public
class FSamplerScheduler(TableScheduler):
    """DDIM (= Euler) with FSampler's static patterns; `num_inference_steps` is the number of model calls.

    Options of `from_config` beside those of `TableScheduler`: `skip` ("h2/s2", other patterns, explicit nodes),
    `quantity` ("x0"), `coordinate` ("lam"), `protect_first` (2), `protect_last` (2), `streak_rule`, and
    `official` (True or "simple": the settings of the authors' two nodes). See `diffaccel.skip`. For another sampler:
    `TableScheduler.from_config(config, sampler="dpmpp", rewrite=diffaccel.skip("h2/s3"))`.
    """

    sampler_name = "ddim"

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        given = {k: kwargs.pop(k) for k in (*OPTIONS, "official") if k in kwargs}
        if given and isinstance(config, Mapping):
            held = list(config.get("rewrite") or [])
            before = {} if "official" in given else next((_options(p) for p in held if p["name"] == "skip"), {})
            others = kwargs.get("rewrite") or [part for part in held if part["name"] != "skip"]
            others = others if isinstance(others, (list, tuple)) else [others]
            kwargs["rewrite"] = [_part(**{**before, **given}), *others]
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def _check(self) -> None:
        listed = list(self.config.rewrite or [])
        if not any(part["name"] == "skip" for part in listed):
            self.register_to_config(rewrite=[_part().to_config(), *listed])
        super()._check()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """As `TableScheduler.set_timesteps`, but `sigmas` and `timesteps` list the nodes, called and skipped."""
        super().set_timesteps(num_inference_steps, device, sigmas, timesteps, mu)
        if self.nodes == self.num_inference_steps and not getattr(self, "_said", False):
            self._said = True
            what = f"{self.nodes} model calls are too few for a skip ({self._pattern().name})"
            warnings.warn(f"{what}: this run is plain {self.sampler_name}", stacklevel=2)

    @property
    def nodes(self) -> int:
        """Nodes of this thread's run, called and skipped."""
        return len(self._runs.need().grid) - 1

    def calls_for_nodes(self, nodes: int) -> int:
        """Model calls on so many nodes, which is what the authors' tool counts as steps."""
        return nodes - len(self._pattern().skipped(nodes))

    def _pattern(self) -> Pattern:
        options = next(part for part in self.config.rewrite if part["name"] == "skip")
        first, last = options.get("protect", (2, 2))
        return parse(options.get("pattern", "h2/s2"), (first, last), streak_rule=options.get("streak_rule", False))


def _options(part: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a preset whose config holds this part."""
    found = {k: part[k] for k in ("quantity", "coordinate", "streak_rule") if k in part}
    first, last = part.get("protect", (2, 2))
    return {**found, "skip": part.get("pattern", "h2/s2"), "protect_first": first, "protect_last": last}


def _part(skip: Any = "h2/s2", streak_rule: bool = False, official: bool | str = False, **given: Any) -> Any:
    if official not in OFFICIAL:
        raise OptionError(f"official must be True, False or 'simple', got {official!r}")
    fixed = OFFICIAL[official]
    both = sorted(set(fixed) & set(given))
    if both:
        raise OptionError(f"official={official!r} means {both[0]}={fixed[both[0]]!r}; leave one of the two out")
    chosen = {**DEFAULTS, **fixed, **given}
    protect = (chosen.pop("protect_first"), chosen.pop("protect_last"))
    return skipping(skip, protect=protect, streak_rule=streak_rule, **chosen)
