"""Named schedulers: `TableScheduler` with its sampler chosen."""

from __future__ import annotations

from .registration import public
from .table_scheduler import TableScheduler


@public
class UniPCScheduler(TableScheduler):
    """UniPC (arXiv:2302.04867): options `order`, `variant`, `space`, `corrector`, `lower_order_final`."""

    sampler_name = "unipc"


@public
class DPMSolverV3Scheduler(TableScheduler):
    """DPM-Solver-v3 (arXiv:2310.13268) with the statistics of `diffaccel calibrate ems`: `artifact=FILE`.

    Options `order`, `corrector`, `pseudo`, `lower_order_final`, `corrector_range`, `snap`, `quadrature`; without an
    artifact `statistics="none"` must be said.
    """

    sampler_name = "dpm_v3"


@public
class DCSolverScheduler(TableScheduler):
    """DC-Solver (arXiv:2409.03755): UniPC with the ratios of `diffaccel calibrate dc`: `artifact=FILE`.

    The artifact brings its sampler options and grid. Options `cpr`, `guidance`, `dc_order` and those of UniPC; without
    an artifact `ratios="none"` or a list must be said.
    """

    sampler_name = "dc"


@public
class GHVBScheduler(TableScheduler):
    """Generalised heavy-ball momentum (arXiv:2307.11118): options `order`, `kind`, `weights`."""

    sampler_name = "ghvb"


@public
class CPSScheduler(TableScheduler):
    """Coefficients-preserving stochastic sampling (arXiv:2509.05952): option `eta`."""

    sampler_name = "cps"


@public
class FittedScheduler(TableScheduler):
    """A table of the checkpoint, made by `diffaccel calibrate fit`, `search` or `align`: `artifact=FILE`.

    The artifact decides the nodes too.
    """

    sampler_name = "fitted"


@public
class RestartScheduler(TableScheduler):
    """Any sampler with Restart (arXiv:2306.14878), within the number of calls: the options of `diffaccel.restart`.

    `grid` is the scheduler's; a segment's own grid is an option of `rewrite=[diffaccel.restart(..., grid=...)]`.
    """

    rewriter_name = "restart"


@public
class EpsilonScalingScheduler(TableScheduler):
    """Any sampler on scaled noise predictions (arXiv:2308.15321): the options of `diffaccel.epsilon_scale`."""

    rewriter_name = "epsilon_scale"


@public
class TimeShiftScheduler(TableScheduler):
    """A first-order or Adams-Bashforth sampler ("ddim" if none is named) with Time-Shift (arXiv:2305.15583).

    The options are those of `diffaccel.time_shift`.
    """

    policy_name = "time_shift"
    sampler_default = "ddim"
