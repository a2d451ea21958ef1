"""The same where workers form the sums among themselves: a step without noise, and each with the parameters."""

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.clientapp import ClientApp

from benchmarks.engine.roundtrip import PeakMemory
from clients.answers import app_of
from fedsim.clip import Clip
from fedsim.config import OptimizerConfig
from fedsim.engine.ray_grid import RayGrid
from fedsim.engine.work import Done, Work
from fedsim.release import CoordinateNoise
from server.dispatch import Dispatcher
from server.sharded import Members, ShardedOptimizer, WorkerGroup

SGD = OptimizerConfig(name="sgd")


class Nothing:
    """A worker that computes nothing: a sum of the model's size, made anew (which counts as its computation)."""

    def train(self, request: Work) -> Done:
        began = time.perf_counter()
        total = np.full(request.parameters.shape, 1e-9, dtype=np.float32)
        seconds = time.perf_counter() - began
        return Done(round=request.round, units=request.units, total=total, statistics={"seconds": seconds})


def keeping_app() -> ClientApp:
    """A ClientApp of such a worker, which keeps its sums."""

    def worker(config: Mapping[str, Any]) -> Any:
        return Nothing()

    return app_of(worker)


class Rounds:
    """Rounds of one size.

    Args:
        grid: Workers of keeping_app.
        size: Values of a sum.
    """

    def __init__(self, grid: RayGrid, size: int) -> None:
        self._roster = Members(grid)
        self._group = WorkerGroup(grid, self._roster, SGD, 1, size)
        self._optimizer = ShardedOptimizer(np.zeros(size, dtype=np.float32), SGD, 1, self._group)
        self._optimizer.regroup()
        self._dispatcher = Dispatcher(grid, roster=self._roster)
        self._noise = CoordinateNoise(normals=(), key=bytes(32), resolution=0.0, normaliser=1.0).to_values()
        self._units = np.arange(8 * len(grid.get_node_ids()))

    def run(self, round: int) -> tuple[float, float]:
        """Seconds beyond the busiest worker's own sum, and of this thread's processor."""
        began, worked = time.perf_counter(), time.thread_time()
        vector = self._optimizer.vector
        request = Work(round=round, units=self._units, clip=Clip(norm=1.0), parameters=vector)
        gathered = self._dispatcher.gather(request, np.ones(len(self._units)))
        if gathered.failures:
            raise RuntimeError(gathered.failures[0])
        self._group.commit(gathered.total.names, gathered.total.dtype, self._noise)
        self._optimizer.stepped()
        return time.perf_counter() - began - gathered.compute_seconds, time.thread_time() - worked


def measure(grid: RayGrid, size_bytes: int, rounds: int, watched_from: int) -> dict[str, float]:
    """As `benchmarks.sums.measured.measure`; memory counts parameters that are held, too."""
    small = Rounds(grid, 10_000)
    for round in range(2):
        small.run(round)
    processes = [os.getpid(), *grid.process_ids.values()]
    memory = PeakMemory(processes) if size_bytes >= watched_from else None
    before = 0 if memory is None else memory.peak
    made = Rounds(grid, size_bytes // 4)
    made.run(2)
    made.run(3)
    if memory is not None:
        memory.stop()
    seconds, own = np.median([made.run(4 + round) for round in range(rounds)], axis=0)
    return {
        "seconds": float(seconds),
        "driver_cpu_seconds": float(own),
        "ingress_bytes": 0.0,  # what comes is named, and has no values
        "memory_sums": 0.0 if memory is None else (memory.peak - before) / size_bytes,
    }
