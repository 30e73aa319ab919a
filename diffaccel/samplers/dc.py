"""DC-Solver: each prediction is replaced by one interpolated at a nearby time, before later steps use it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..core.extrapolation import lagrange
from ..core.linear import carry
from ..core.node import Node
from ..core.path import Nodes
from ..errors import ArtifactError, OptionError
from . import ddim, dpmpp  # noqa: F401  # registered before their compensated forms
from .registry import REGISTRY, Calibrated, Sampler, add, get
from .unipc import pair, unipc

HIGHEST = 3
SAME_LAM = 1e-6
PAPER = "arXiv:2409.03755, Eq. 8 to 10 (dynamic compensation)"


@dataclass(frozen=True, eq=False)
class Found:
    """Ratios of one run, as they were searched.

    Args:
        lam: (N + 1,) half log-SNR of the nodes.
        rho: (N,) ratios.
        guidance: scale that they were searched at; None without guidance.
    """

    lam: tuple[float, ...]
    rho: tuple[float, ...]
    guidance: float | None = None


@dataclass(frozen=True, eq=False)
class Ratios:
    """Ratios of several runs of one checkpoint, and the polynomial between them.

    Args:
        runs: one for each number of calls and guidance scale.
        options: of the sampler that they were searched with; a run with others is refused.
        cpr: (4, 3, 3) coefficients (`cpr_ratio`), or None.
        box: {"calls": (low, high), "guidance": (low, high)} of the runs that `cpr` was fitted to.
        where: the artifact's name, for messages.
    """

    runs: tuple[Found, ...]
    options: Mapping[str, Any]
    cpr: np.ndarray | None = None
    box: Mapping[str, Sequence[float]] | None = None
    where: str = "ratios"

    def __str__(self) -> str:
        return f"{self.where} ({', '.join(str(len(r.rho)) for r in self.runs)} calls)"

    @classmethod
    def of(cls, artifact: Any) -> Ratios:
        """From an artifact of kind "dc"."""
        meta, tensors = artifact.meta, artifact.tensors
        runs = tuple(
            Found(tuple(tensors[f"lam_{j}"].tolist()), tuple(tensors[f"ratios_{j}"].tolist()), run["guidance"])
            for j, run in enumerate(meta["runs"])
        )
        return cls(runs, meta["options"], tensors.get("cpr"), meta.get("box"), artifact.file)

    def on(self, nodes: Nodes, guidance: float | None) -> tuple[float, ...]:
        """The ratios for a run on `nodes`, which may be the tail of one that was searched.

        Raises:
            ArtifactError: if no run was searched on these nodes, with both sides.
        """
        lam = [node.lam for node in nodes]
        runs = [r for r in self.runs if guidance is None or r.guidance == guidance]
        fits = [r for r in runs if len(r.lam) >= len(lam) and _close(r.lam[len(r.lam) - len(lam) :], lam)]
        nearest = min((len(r.lam) for r in fits), default=0)
        fits = [r for r in fits if len(r.lam) == nearest]
        if len({r.guidance for r in fits}) > 1:
            known = ", ".join(f"{r.guidance:g}" for r in fits if r.guidance is not None)
            raise ArtifactError(f"{self.where} has ratios for several guidance scales; pass guidance= one of {known}")
        if fits:
            return fits[0].rho[nearest - len(lam) :]
        more = (
            "" if self.cpr is None else " For other numbers of calls, cpr=True takes them from the fitted polynomial."
        )
        made = "; ".join(f"{len(r.rho)} calls at guidance {r.guidance}, {_range(r.lam)}" for r in self.runs)
        raise ArtifactError(
            f"{self.where} holds no ratios for this run: they belong to the number of calls, the grid and the guidance."
            f"\n  artifact: {made}\n  this run: {len(lam) - 1} calls, guidance {guidance}, {_range(lam)}{more}"
        )

    def by_polynomial(self, calls: int, guidance: float | None) -> tuple[float, ...]:
        """The ratios of `cpr` for a run of `calls`.

        Raises:
            ArtifactError: without a polynomial, or outside the box that it was fitted in.
        """
        if self.cpr is None or self.box is None:
            raise ArtifactError(f"{self.where} has no polynomial: it was searched for too few numbers of calls")
        low, high = self.box["guidance"]
        scale = low if guidance is None and low == high else guidance
        if scale is None:
            raise ArtifactError(f"cpr=True needs guidance=, between {low:g} and {high:g}")
        fewest, most = self.box["calls"]
        if not (fewest <= calls <= most and low <= scale <= high):
            raise ArtifactError(
                f"{self.where}: the polynomial was fitted for {fewest:g} to {most:g} calls and guidance {low:g} to "
                f"{high:g}; {calls} calls at guidance {scale:g} lie outside, where it means nothing"
            )
        return tuple(cpr_ratio(self.cpr, i, calls, scale) for i in range(1, calls + 1))


def cpr_ratio(coef: np.ndarray, i: int, calls: int, guidance: float) -> float:
    """Cascade polynomial regression: the ratio of step i = 1..calls; 1 for the first two.

    `A[k][a] = C[k][a] . (n^2, n, 1)`, `p[k] = A[k] . (g^2, g, 1)`, `rho = sum_k p[k] y^k`; `y = i/calls`,
    `g = guidance/12`, `n = calls/50`.

    Args:
        coef: C, (4, 3, 3) or its 36 numbers in that order.
    """
    if i < 3:
        return 1.0
    y, g, n = i / calls, guidance / 12, calls / 50
    p = np.reshape(coef, (4, 3, 3)) @ [n * n, n, 1.0] @ [g * g, g, 1.0]
    return float(p @ [1.0, y, y**2, y**3])


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    with np.errstate(invalid="ignore"):
        return bool(np.all((np.asarray(a) == np.asarray(b)) | (np.abs(np.subtract(a, b)) < SAME_LAM)))


def _range(lam: Sequence[float]) -> str:
    return "lam " + " ".join(f"{v:.3f}" for v in lam)


# ---------------------------------------------------------------------- the replacement
class Compensation:
    """`m_i <- sum_j l_j(tau) m_{i-j}` at `tau = t_{i-1} + rho_i (t_i - t_{i-1})`, over the K + 1 newest predictions.

    t is what the model is fed. Ratios of 1, and those without K earlier predictions, change nothing.
    """

    def __init__(self, rho: Mapping[int, float], k: int) -> None:
        self.rho, self.k = rho, k
        self.past: list[tuple[float, Any]] = []  # (t, replaced prediction), newest first

    def __call__(self, node: Node, p: Any) -> Any:
        rho = self.rho.get(id(node), 1.0)
        if rho != 1.0 and len(self.past) >= self.k:
            labels = [node.t, *(t for t, _ in self.past)]
            weights = lagrange(labels, labels[1] + rho * (labels[0] - labels[1]))
            total = weights[0] * p
            for w, (_, m) in zip(weights[1:], self.past, strict=True):
                total = total + w * m
            p = carry(total)
        self.past = [(node.t, p), *self.past][: self.k]
        return p


def _compensation(
    name: str, nodes: Nodes, *, own: Mapping[str, Any], dc_order: Any, ratios: Any, cpr: bool, guidance: float | None
) -> Compensation | None:
    """The replacement of a run, or None where every ratio is 1; `own` are the parent's options."""
    k = dc_order
    if isinstance(k, bool) or k not in range(1, HIGHEST + 1):
        raise OptionError(f"sampler {name!r}: dc_order must be an integer from 1 to {HIGHEST}, got {k!r}")
    calls = len(nodes) - 1
    if not isinstance(ratios, Ratios) and (cpr or guidance is not None):
        raise OptionError(f"sampler {name!r}: cpr= and guidance= have no effect without an artifact")
    if isinstance(ratios, Ratios):
        _same_options(name, ratios, {**own, "dc_order": k})
        rho = ratios.by_polynomial(calls, guidance) if cpr else ratios.on(nodes, guidance)
    elif ratios == "none":
        return None
    else:
        rho = tuple(_listed(name, ratios, calls))
    by_node = {id(node): r for node, r in zip(nodes[k:-1], rho[k:], strict=True)}
    return Compensation(by_node, k)


def _same_options(name: str, ratios: Ratios, here: Mapping[str, Any]) -> None:
    made = {**ratios.options}
    told = {"sampler": name, **here}
    differ = [key for key in {**made, **told} if _plain(made.get(key)) != _plain(told.get(key))]
    if differ:
        raise ArtifactError(
            f"{ratios.where} was searched for another sampler: "
            + "; ".join(f"{key} is {made.get(key)!r} there and {told.get(key)!r} here" for key in differ)
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _listed(name: str, ratios: Any, calls: int) -> list[float]:
    try:
        listed = [float(r) for r in ratios]
    except (TypeError, ValueError):
        raise OptionError(f"sampler {name!r}: ratios must be 'none' or a list of numbers, got {ratios!r}") from None
    if len(listed) != calls or not np.all(np.isfinite(listed)):
        raise OptionError(
            f"sampler {name!r}: a run of {calls} calls needs {calls} finite ratios, got {len(listed)}: {listed}. A run "
            "that begins later (img2img) needs an artifact, which knows the node of each ratio."
        )
    return listed


# ---------------------------------------------------------------------- the rewriter
OPTIONS = {"dc_order": 2, "ratios": "none", "cpr": False, "guidance": None}


def compensate(parent: str | Sampler, name: str) -> Sampler:
    """A sampler whose predictions are replaced as in `Compensation`.

    UniPC's corrector at node i uses `P_i` itself; everything after it, the predictor included, uses the replaced one.
    Other loops have their predictions replaced as they come.

    Its options are those of the parent, and
        dc_order: K, 1 to 3: the interpolation uses K + 1 predictions; the first K nodes of a run have ratio 1.
        ratios: "none", one number a call, or (from an artifact) `Ratios`. They belong to the number of calls, the
            grid, the parent's options and the guidance.
        cpr: take the ratios from the artifact's polynomial: for numbers of calls that were not searched. A run that
            begins later (img2img) counts as one of its remaining calls.
        guidance: the scale of this run, where the artifact has several, or for `cpr`.

    Args:
        parent: registered name or sampler.
        name: of the result, which is not registered.

    Raises:
        OptionError: for samplers that spend several calls on an interval, or draw noise.
    """
    made = get(parent)
    if made.intervals is not None or made.counts_calls or made.stochastic or made.edits:
        raise OptionError(f"compensation needs one call an interval and no noise; {made.name!r} is another kind")

    def loop(x: Any, nodes: Nodes, predict: Any, noise: Any, **options: Any) -> Any:
        own = {k: v for k, v in options.items() if k not in OPTIONS}
        extra = {k: options.get(k, v) for k, v in OPTIONS.items()}
        settle = _compensation(name, nodes, own=own, **extra)
        if made.loop is unipc:
            return pair(x, nodes, predict, settle, **own)
        return made.loop(x, nodes, _settled(predict, settle, made.space_of(own)), noise, **own)

    keyword = inspect.Parameter.KEYWORD_ONLY
    positional = [
        inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("x", "nodes", "predict", "noise")
    ]
    named = [inspect.Parameter(k, keyword, default=v) for k, v in {**made.defaults, **OPTIONS}.items()]
    loop.__signature__ = inspect.Signature([*positional, *named])  # type: ignore[attr-defined]
    loop.__doc__ = f"`{made.name}` with dynamic compensation; see `diffaccel.samplers.dc.compensate`."
    command = f"diffaccel calibrate dc MODEL --sampler {made.name} --calls 5 8 10 --out dc.safetensors"
    without = f"or pass ratios='none': then it is {made.name!r}."
    calibrated = Calibrated("dc", "ratios", Ratios.of, command, without)
    return replace(made, name=name, loop=loop, paper=PAPER, variants=(), calibrated=calibrated)


def _settled(predict: Any, settle: Callable[[Node, Any], Any] | None, space: Any) -> Any:
    """`predict` with each prediction in `space` replaced (at alpha = 0 noise-space loops ask for another)."""

    def call(x: Any, node: Node, **how: Any) -> Any:
        p = predict(x, node, **how)
        return p if settle is None or how.get("space", space) != space else settle(node, p)

    return call


PARENTS = {"unipc": "dc", "dpmpp": "dc_dpmpp", "ddim": "dc_ddim"}
for _parent, _name in PARENTS.items():
    add(compensate(REGISTRY[_parent], _name))
