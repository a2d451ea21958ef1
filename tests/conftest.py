"""Lies here so that pytest puts this folder on the import path: tests of every room share mock_clients.py."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture
def device() -> Iterator[Any]:
    """A device that is not the host's: a GPU, or what acts as one (second_device.py)."""
    from second_device import any_device  # here, because it loads torch

    with any_device() as device:
        yield device
