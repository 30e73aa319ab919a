"""What a launcher told this process, as the environment variables that torch reads."""

from __future__ import annotations

import re
from collections.abc import Mapping


def slurm_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of torch (RANK, WORLD_SIZE, ...) for a task started by `srun`; empty where there is nothing to do.

    Only a job step counts: a plain python in an `sbatch` script sees SLURM_NTASKS too, but is alone.
    """
    size = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if size < 2 or "RANK" in env or "SLURM_PROCID" not in env:
        return {}
    found = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": _first_number(env.get("SLURM_STEP_TASKS_PER_NODE", str(size))),
    }
    if "MASTER_ADDR" not in env:
        found["MASTER_ADDR"] = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost"))
    if "MASTER_PORT" not in env:  # the same on every task, and different for jobs that share a machine
        found["MASTER_PORT"] = str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000)
    return found


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: "gpu[007-009,12],login" -> "gpu007"."""
    head = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    if head is None:
        return nodes
    return head[1] + (head[2] or "") + head[3]


def _first_number(text: str) -> str:
    found = re.match(r"\d+", text)
    return found[0] if found else "1"
