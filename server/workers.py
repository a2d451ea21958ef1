"""Who can be asked: the workers of any Flower Grid."""

import time

from flwr.serverapp import Grid

PAUSE = 0.1
"""Seconds between two looks."""
PATIENCE = 60.0
"""Seconds in which the first worker should have come up."""


def workers_of(grid: Grid, patience: float = PATIENCE) -> list[int]:
    """Ids of the grid's workers, in order; none where the first has not appeared within so many seconds."""
    end = time.monotonic() + patience
    while True:
        workers = sorted(grid.get_node_ids())
        if workers or time.monotonic() >= end:
            return workers
        time.sleep(PAUSE)
