"""Runs a file of jobs for several processes (`*_jobs.py`) in a small process of its own, which forks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def outcome(script: Path, work: Path, seconds: float) -> dict:
    """What the script found: the JSON object in its last line.

    Args:
        script: takes a folder as its argument.
        work: that folder.
        seconds: after which it counts as hung.
    """
    done = subprocess.run(
        [sys.executable, str(script), str(work)], capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))
