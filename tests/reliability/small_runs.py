"""Runs of this folder's tests: in this process, or in a child that may be killed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsim.config import RunConfig

ROUNDS = 10


def trained(config: RunConfig) -> dict[str, Any]:
    """Train, or go on, in this process."""
    from experiments.simulation import simulated_clients
    from server.app import train

    with simulated_clients(config) as grid:
        return train(grid, config)


def in_child(work: Callable[[], Any], log: Path) -> int:
    """Fork a process that does the work and ends with 0, or 1 after an exception; its output goes to a file."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)
