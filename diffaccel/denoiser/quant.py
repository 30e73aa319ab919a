"""The linear layers of a denoiser in int8 or fp8, by torchao, and the way back."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..artifact import Artifact
from ..errors import ArtifactError, OptionError, RunError, one_of
from ..identity import both_sides, differing, model_identity
from .quant_refusals import refuse, short
from .quant_scale import MOST, MOST_REDUCED, Scales

MODES = {
    "w8a8": "int8 weights a channel, int8 activations a token",
    "w8": "int8 weights a channel; saves memory, no time on the CPU",
    "fp8": "fp8 weights a channel, fp8 activations a token; CUDA 8.9 or newer",
}
BACKENDS = ("torchao",)
MULTIPLE = 16  # of both sizes of a layer, as the int8 and fp8 matrix products need
# Small layers whose output scales or shifts everything after them: embedders of time and text, modulation.
DELICATE = re.compile(r"(norm|ada_?ln|.*emb|time_|.*modulation|.*_mod$|mod$)", re.IGNORECASE)


@dataclass(frozen=True)
class Quant:
    """How a denoiser is quantised.

    Args:
        mode: "w8a8", "w8" or "fp8", see `MODES`.
        skip: patterns (`fnmatch`) of layers that stay as they are beside the default ones.
        min_features: layers with fewer inputs stay: there int8 costs accuracy and gains nothing.
        keep_float: keep the float weights (on the CPU) so that `undo` is exact; False frees them, for good.
        backend: "torchao".

    Raises:
        OptionError: an unknown mode or backend, `min_features` below 1.
    """

    mode: str = "w8a8"
    skip: tuple[str, ...] = ()
    min_features: int = 256
    keep_float: bool = True
    backend: str = "torchao"

    def __post_init__(self) -> None:
        one_of("quantisation", self.mode, MODES)
        one_of("backend of quantisation", self.backend, BACKENDS)
        width = self.min_features
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise OptionError(f"min_features is a width, got {width!r}")
        skip = (self.skip,) if isinstance(self.skip, str) else self.skip
        if not isinstance(skip, (tuple, list)) or not all(isinstance(pattern, str) for pattern in skip):
            raise OptionError(f"skip is a pattern of layer names, or several, got {self.skip!r}")
        object.__setattr__(self, "skip", tuple(skip))

    @classmethod
    def of(cls, value: Quant | str | None) -> Quant | None:
        """The settings that an option `quant=` means.

        Raises:
            OptionError: anything else than `Quant`, a mode or None.
        """
        if value is not None and not isinstance(value, (Quant, str)):
            raise OptionError(f"quant={value!r} is no quantisation; give one of {', '.join(MODES)}, or Quant(...)")
        return cls(value) if isinstance(value, str) else value


@dataclass
class Quantised:
    """A denoiser whose layers were quantised; `undo()` gives it its own weights back.

    Args:
        module: the denoiser.
        quant: the settings.
        identity: of the checkpoint, read before (`identity.model_identity`).
        layers: names of the quantised layers.
        skipped: reason -> names of the linear layers that stay.
        reduced: half of int8's range is used: without VNNI the CPU's int8 products would overflow, in silence.
        run_of: an object that is another one for each run; the largest scale is that of the last one.
    """

    module: torch.nn.Module
    quant: Quant
    identity: dict[str, Any]
    layers: list[str]
    skipped: dict[str, list[str]]
    reduced: bool = False
    run_of: Callable[[], Any] | None = None
    _weights: dict[str, torch.nn.Parameter] = field(default_factory=dict, repr=False)
    _float: tuple[torch.nn.Module, str, torch.dtype] | None = field(default=None, repr=False)
    _guard: Any = field(default=None, repr=False)
    _modules: dict[str, Any] = field(default_factory=dict, repr=False)  # an adapter may take their place in the model
    _scales: Scales | None = field(default=None, repr=False)
    _run: Any = field(default=None, repr=False)

    def __str__(self) -> str:
        stay = "; ".join(f"{len(names)} {reason}" for reason, names in self.skipped.items())
        return f"{self.quant.mode}: {len(self.layers)} linear layers, left in float: {stay or 'none'}"

    @property
    def recipe(self) -> dict[str, Any]:
        """What another session needs to make the same model again (JSON); see `quantise`."""
        import torchao

        return {
            "mode": self.quant.mode,
            "backend": self.quant.backend,
            "torchao": torchao.__version__,
            "layers": self.layers,
            "reduced": self.reduced,
        }

    @property
    def scale(self) -> tuple[float, str] | None:
        """The largest scale of an activation in the last run (the step between two of its values), and its layer.

        None where activations are not quantised; 0 before the first run.
        """
        return None if self._scales is None else self._scales.largest()

    def save(self, path: str | os.PathLike[str]) -> Artifact:
        """Write the recipe, an artifact of kind "quant"; `quantise(module, path)` follows it."""
        made = Artifact("quant", {}, {"quant": self.recipe, "model": self.identity}, os.path.basename(path))
        made.save(path)
        return made

    def check(self) -> None:
        """Raise if the model was converted or given an adapter since.

        Raises:
            RunError: saying what to do.
        """
        if self._float is not None:
            owner, name, dtype = self._float
            now = getattr(owner, name).dtype
            if now is not dtype:
                raise RunError(
                    f"the denoiser was quantised in {short(dtype)} and converted to {short(now)} afterwards, which "
                    f"its {len(self.layers)} quantised layers do not follow. Take the quantisation off, convert with "
                    "pipe.to(dtype), and quantise again"
                )
        if getattr(self.module, "_hf_peft_config_loaded", False):
            raise RunError(
                "an adapter (LoRA) was loaded on a quantised denoiser. Take the quantisation off, load the adapter, "
                "call pipe.fuse_lora() and pipe.unload_lora_weights(), and quantise again"
            )

    def check_undoable(self) -> None:
        """Raise if the float weights cannot come back as things are.

        Raises:
            RunError: with `keep_float=False`, and under offloading that keeps the layers' weights elsewhere.
        """
        if self._guard is None:
            return
        if not self.quant.keep_float:
            raise RunError("the float weights were freed (keep_float=False); load the pipeline again")
        if any(layer.weight.is_meta for layer in self._modules.values()):
            raise RunError(
                "the denoiser was offloaded after it was quantised, and its weights lie elsewhere; take the offloading "
                "off first (pipe.remove_all_hooks())"
            )

    def undo(self) -> None:
        """Give the module its own weights back, the same objects, or raise as `check_undoable`. Twice is fine."""
        self.check_undoable()
        if self._guard is None:
            return
        self._guard.remove()
        self._guard = None
        if self._scales is not None:
            self._scales.remove()
            self._scales = None
        for name, weight in self._weights.items():
            layer = self._modules[name]
            weight.data = weight.data.to(layer.weight.device)
            layer.weight = weight
            layer.__dict__.pop("extra_repr", None)  # torchao's
        self._weights.clear()

    def _before(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.check()
        now = None if self.run_of is None else self.run_of()
        if self._scales is not None and now is not self._run:
            self._run = now
            self._scales.forget()


def quantise(module: torch.nn.Module, quant: Quant | Artifact | str | os.PathLike[str]) -> Quantised:
    """Quantise a denoiser in place. Before hooks, offloading and `compile`; after `.to(dtype)` and fused adapters.

    By default every `nn.Linear` in the blocks with `min_features` inputs or more and sizes in multiples of 16;
    embedders, modulation and the last projection stay.

    Args:
        module: the denoiser.
        quant: settings, or a mode, or the artifact of a recipe (or its file), which names the layers.

    Raises:
        OptionError: no layer fits, a pattern of `skip` without effect, a model that is quantised already, has unfused
            adapters, lies on the meta device, or is one that this mode would slow down or cannot run.
        ArtifactError: a recipe of another checkpoint, or of another torchao.
    """
    recipe: Artifact | None = None
    if isinstance(quant, Artifact) or (isinstance(quant, (str, os.PathLike)) and str(quant) not in MODES):
        recipe = _recipe_of(quant)
        quant = Quant(recipe.meta["quant"]["mode"])
    quant = Quant.of(quant) or Quant()  # type: ignore[arg-type]
    refuse(module, quant.mode)
    identity = model_identity(module)
    layers, skipped = _chosen(module, quant) if recipe is None else _listed(module, recipe, identity)
    modules = {name: module.get_submodule(name) for name in layers}
    weights = {name: part.weight for name, part in modules.items()}
    reduced = _reduced(quant.mode, next(module.parameters()).device)
    if recipe is not None and recipe.meta["quant"]["reduced"] != reduced:
        raise ArtifactError(
            f"{recipe.file} was made {'without' if reduced else 'with'} int8 products that overflow (a CPU without "
            f"VNNI), here it is {'with' if reduced else 'without'} them: the answers would differ. Quantise anew"
        )
    done = Quantised(module, quant, identity, layers, skipped, reduced)
    _apply(module, quant.mode, set(layers), reduced)
    if quant.keep_float:
        for weight in weights.values():
            weight.data = weight.data.cpu()
        done._weights = weights  # type: ignore[assignment]
    done._float = _witness(module)
    done._modules = modules
    if quant.mode in MOST:
        done._scales = Scales(modules, MOST_REDUCED if reduced else MOST[quant.mode])
    done._guard = module.register_forward_pre_hook(done._before)
    return done


# ---------------------------------------------------------------------- which layers
def _linears(module: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {name: part for name, part in module.named_modules() if type(part) is torch.nn.Linear}


def _chosen(module: torch.nn.Module, quant: Quant) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the layers to quantise, and reason -> names of those that stay."""
    chosen: list[str] = []
    skipped: dict[str, list[str]] = {}
    linears = _linears(module)
    for pattern in quant.skip:
        if not fnmatch.filter(linears, pattern):
            raise OptionError(f"quant: skip={pattern!r} matches none of the {len(linears)} linear layers")
    for name, layer in linears.items():
        reason = _reason(name, layer, quant)
        (skipped.setdefault(reason, []) if reason else chosen).append(name)
    if not chosen:
        found = "; ".join(f"{len(names)} {reason}, as {names[0]}" for reason, names in skipped.items())
        raise OptionError(
            f"no layer of this {type(module).__name__} can be quantised: {found or 'it has no nn.Linear'}. A narrow "
            "model needs Quant(mode, min_features=...)"
        )
    return chosen, skipped


def _reason(name: str, layer: torch.nn.Linear, quant: Quant) -> str:
    """Why a layer stays in float, or ""."""
    parts = name.split(".")
    if any(fnmatch.fnmatch(name, pattern) for pattern in quant.skip):
        return "by skip="
    if not any(part.isdigit() for part in parts):
        return "outside the blocks"
    if any(DELICATE.match(part) for part in parts):
        return "embedding or modulation"
    if layer.in_features < quant.min_features:
        return f"with fewer than {quant.min_features} inputs"
    if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
        return f"of sizes that {MULTIPLE} does not divide"
    return ""


def _listed(
    module: torch.nn.Module, recipe: Artifact, identity: Mapping[str, Any]
) -> tuple[list[str], dict[str, list[str]]]:
    """As `_chosen`, by a recipe."""
    import torchao

    made, told = recipe.meta["model"], recipe.meta["quant"]
    part = differing(made, identity)
    if part:
        raise ArtifactError(
            f"{recipe.file} belongs to another model: {part} differs.\n{both_sides(made, identity, part)}"
        )
    if told["torchao"] != torchao.__version__:
        raise ArtifactError(
            f"{recipe.file} was made with torchao {told['torchao']}, here is {torchao.__version__}, whose rounding may "
            "differ; install that one, or quantise anew"
        )
    listed = set(told["layers"])
    rest = [name for name in _linears(module) if name not in listed]
    return list(told["layers"]), {"by the recipe": rest} if rest else {}


def _recipe_of(source: Artifact | str | os.PathLike[str]) -> Artifact:
    if isinstance(source, str) and not os.path.exists(source):
        one_of("quantisation (no file of that name either)", source, MODES)
    found = source if isinstance(source, Artifact) else Artifact.load(source)
    if not {"mode", "layers"} <= set(found.meta.get("quant") or ()):
        raise ArtifactError(f"{found.file} (kind {found.kind!r}) holds no recipe of a quantisation")
    return found


# ---------------------------------------------------------------------- torchao
def _reduced(mode: str, device: torch.device) -> bool:
    """Whether int8 products overflow on this processor unless half of the range is left out."""
    try:
        from torchao.utils import should_reduce_range
    except ImportError as error:
        raise OptionError(
            f"quant={mode!r} needs torchao 0.18 or newer: pip install 'diffaccel[quant]' ({error})"
        ) from None
    return mode == "w8a8" and bool(should_reduce_range(device))


def _apply(module: torch.nn.Module, mode: str, layers: set[str], reduced: bool) -> None:
    from torchao import quantization as ao

    if mode == "fp8":
        config: Any = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    else:
        int8 = ao.Int8DynamicActivationInt8WeightConfig
        config = int8(reduce_range=reduced) if mode == "w8a8" else ao.Int8WeightOnlyConfig()
    ao.quantize_(module, config, filter_fn=lambda part, name: name in layers)


def _witness(module: torch.nn.Module) -> tuple[torch.nn.Module, str, torch.dtype] | None:
    """A float parameter, which follows `.to(dtype)` where quantised weights do not: (owner, name, dtype)."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if type(parameter) is torch.nn.Parameter and parameter.is_floating_point():
                return part, name, parameter.dtype
    return None
