"""Drop-in schedulers for diffusers pipelines: one table-driven `step()`, and presets of it."""

from .presets import (
    CPSScheduler,
    DCSolverScheduler,
    DPMSolverV3Scheduler,
    FittedScheduler,
    GHVBScheduler,
    UniPCScheduler,
)
from .table_scheduler import TableScheduler, TableSchedulerOutput

__all__ = [
    "CPSScheduler",
    "DCSolverScheduler",
    "DPMSolverV3Scheduler",
    "FittedScheduler",
    "GHVBScheduler",
    "TableScheduler",
    "TableSchedulerOutput",
    "UniPCScheduler",
]
