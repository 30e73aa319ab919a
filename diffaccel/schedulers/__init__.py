"""Drop-in schedulers for diffusers pipelines: one table-driven `step()`, and presets of it."""

from .fsampler import FSamplerScheduler
from .presets import (
    CPSScheduler,
    DCSolverScheduler,
    DPMSolverV3Scheduler,
    EpsilonScalingScheduler,
    FittedScheduler,
    GHVBScheduler,
    RestartScheduler,
    TimeShiftScheduler,
    UniPCScheduler,
)
from .staged import StagedScheduler
from .table_scheduler import TableScheduler, TableSchedulerOutput

__all__ = [
    "CPSScheduler",
    "DCSolverScheduler",
    "DPMSolverV3Scheduler",
    "EpsilonScalingScheduler",
    "FSamplerScheduler",
    "FittedScheduler",
    "GHVBScheduler",
    "RestartScheduler",
    "StagedScheduler",
    "TableScheduler",
    "TableSchedulerOutput",
    "TimeShiftScheduler",
    "UniPCScheduler",
]
