"""The ServerApp as Flower calls it."""

from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fedsim.errors import InvalidInput
from server import app


def test_a_cluster_is_not_flowers_to_join() -> None:
    context = Context(1, 1, {}, RecordDict(), {"engine.address": "10.0.0.1:6379"})
    grid: Any = None
    with pytest.raises(InvalidInput, match=r"engine.address is '10.*left out under `flwr run`.*fedsim train"):
        app.main(grid, context)
