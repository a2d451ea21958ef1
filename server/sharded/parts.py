"""The parts of a run whose workers form the sums, or why it cannot be one."""

import numpy as np
from flwr.serverapp import Grid

from fedsim.config import EngineConfig, OptimizerConfig
from fedsim.engine.grid import WaitingGrid
from fedsim.errors import InvalidInput
from fedsim.release import Release, why_whole
from server.sharded.optimizer import ShardedOptimizer
from server.sharded.workers import Members, WorkerGroup


def require_workers_of_ours(grid: Grid) -> None:
    """Refuse workers that cannot meet each other.

    Raises:
        InvalidInput: They are none of our Ray actors.
    """
    if not isinstance(grid, WaitingGrid) or grid.in_process:
        hint = "Only Ray actors of `fedsim train` form sums among themselves."
        raise InvalidInput("engine.sums", "workers", "auto or server with these clients", hint)


def require_apart(release: Release) -> None:
    """Refuse releases that must be made of a whole sum.

    Raises:
        InvalidInput: Says what of the release it is.
    """
    if reason := why_whole(release):
        hint = f"Workers release each its own coordinates, and {reason}."
        raise InvalidInput("engine.sums", "workers", "auto, server or nodes with such noise", hint)


def sharded_optimizer(
    grid: Grid, engine: EngineConfig, parameters: np.ndarray, optimizer: OptimizerConfig, rounds: int
) -> ShardedOptimizer:
    """An optimizer whose coordinates the grid's workers will have; its group's roster says whom to ask.

    Args:
        grid: Where the workers are.
        engine: Its options.
        parameters: Trainable parameters, float32 [P].
        optimizer, rounds: As for ServerOptimizer.

    Raises:
        InvalidInput: The workers are none of our Ray actors.
    """
    require_workers_of_ours(grid)
    assert isinstance(grid, WaitingGrid)
    roster = Members(grid, engine.start_seconds)
    group = WorkerGroup(
        grid,
        roster,
        optimizer,
        rounds,
        len(parameters),
        timeout=engine.timeout_seconds,
        attempts=engine.attempts,
    )
    return ShardedOptimizer(parameters, optimizer, rounds, group)
