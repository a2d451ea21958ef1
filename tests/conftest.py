"""Lies here so that pytest puts this folder on the import path: tests of every room share mock_clients.py."""

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# How long an example takes depends on what else the machine does: a test that says so fails where it is busy.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray without an address would join the cluster last started on this machine: a neighbour's, who ends it when it likes.
os.environ.setdefault("RAY_ADDRESS", "local")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Each worker its share of the cores, as has what it starts. Numerical libraries read this when they are first
    # loaded; without it each would have as many threads in every worker as there are cores, waiting for one another.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


def pytest_collection_finish() -> None:
    """What was imported stays: each full collection of garbage would look at all of it again."""
    gc.freeze()


@pytest.fixture
def device() -> Iterator[Any]:
    """A device that is not the host's: a GPU, or what acts as one (second_device.py)."""
    from second_device import any_device  # here, because it loads torch

    with any_device() as device:
        yield device
