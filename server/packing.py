"""Who can be asked, and which worker computes which units: the longest first, by predicted seconds."""

import heapq
import logging
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from flwr.serverapp import Grid

from fedsim.engine.grid import PATIENCE, workers_of

log = logging.getLogger(__name__)

SMOOTHING = 0.3
"""Weight of the newest round in a worker's learned speed."""


class Roster:
    """The workers of a run that can be asked: those of the grid, without those that hold other data or another model.

    Args:
        grid: Where they are.
        patience: Seconds to wait for the first worker to appear.

    Attributes:
        training: Whether a round was asked for: from then on a worker that differs is left out, and before it ends the
            run, while nothing is charged.
    """

    def __init__(self, grid: Grid, patience: float = PATIENCE) -> None:
        self.grid = grid
        self.patience = patience
        self.training = False
        self._differing: dict[int, str] = {}

    def workers(self, wanted: bool = True) -> list[int]:
        """Their ids in order, waiting for the first to appear where some are wanted."""
        present = workers_of(self.grid, self.patience if wanted else 0.0)
        return [worker for worker in present if worker not in self._differing]

    def leave_out(self, worker: int, reason: str) -> None:
        """Never again ask a worker that refused because it holds something else."""
        if worker not in self._differing:
            self._differing[worker] = f"worker {worker} refuses: {reason}"
            log.warning("%s. The run goes on without it", self._differing[worker])

    @property
    def left_out(self) -> list[str]:
        """Who was left out for good, and why."""
        return list(self._differing.values())


class Speeds:
    """Seconds per unit of cost of each worker, learned from the rounds so far.

    A worker that has not been seen counts as the average of those that have.
    """

    def __init__(self) -> None:
        self._seconds_per_cost: dict[int, float] = {}

    def learn(self, worker: int, cost: float, seconds: float) -> None:
        """Take in that a worker needed so many seconds for units of that predicted cost."""
        if cost <= 0 or not seconds > 0:
            return
        known = self._seconds_per_cost.get(worker)
        seen = seconds / cost
        self._seconds_per_cost[worker] = seen if known is None else (1 - SMOOTHING) * known + SMOOTHING * seen

    def of(self, workers: Sequence[int]) -> np.ndarray:
        """Seconds per unit of cost of these workers, float64 [workers], all positive."""
        known = self._seconds_per_cost
        typical = float(np.mean(list(known.values()))) if known else 1.0
        return np.array([known.get(worker, typical) for worker in workers])


def pack(costs: np.ndarray, seconds_per_cost: np.ndarray, busy_until: np.ndarray | None = None) -> list[np.ndarray]:
    """Split units over workers so that all finish at about the same time.

    Longest processing time first: the units in descending order of cost, each to the worker that is free first
    (Graham 1969: with equal speeds, at most 4/3 of the best possible finishing time).

    Args:
        costs: float [units], at least 0: predicted cost of each unit.
        seconds_per_cost: float [workers], positive.
        busy_until: float [workers], seconds that each still needs for what it has; None means that all are free.

    Returns:
        For each worker, positions into `costs` in ascending order, int64. Together each position once.
    """
    waits = np.zeros(len(seconds_per_cost)) if busy_until is None else busy_until
    free_at = [(wait, worker) for worker, wait in enumerate(waits.tolist())]
    heapq.heapify(free_at)
    owner = np.empty(len(costs), dtype=np.int64)
    speeds = seconds_per_cost.tolist()
    order = np.argsort(-costs, kind="stable")
    for position, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        free, worker = free_at[0]
        owner[position] = worker
        heapq.heapreplace(free_at, (free + cost * speeds[worker], worker))
    by_owner = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=len(speeds))).tolist()
    return [by_owner[start:end] for start, end in pairwise([0, *ends])]


def chunks(positions: np.ndarray, size: int | None) -> list[np.ndarray]:
    """One worker's units, cut into messages of at most `size` units; None keeps them together."""
    if len(positions) == 0:
        return []
    if size is None:
        return [positions]
    return [positions[start : start + size] for start in range(0, len(positions), size)]
