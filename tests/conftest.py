"""Settings for every test: no hub, one thread a worker, the folder of reference data."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch or diffusers is imported: a test never asks the network, and results do not depend on the cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    """Every test starts from the same global seed, whatever ran before it in this worker."""
    torch.manual_seed(0)
    yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in files called test_golden_* carry the marker `golden`."""
    for item in items:
        if item.path.name.startswith("test_golden_"):
            item.add_marker(pytest.mark.golden)
