"""Runs whose workers form the sums, noise them and take the steps, each its own coordinates."""

from server.sharded.optimizer import ShardedOptimizer
from server.sharded.parts import require_apart, require_workers_of_ours, sharded_optimizer
from server.sharded.round import ShardedRound
from server.sharded.workers import Members, StateLost, WorkerGroup

__all__ = [
    "Members",
    "ShardedOptimizer",
    "ShardedRound",
    "StateLost",
    "WorkerGroup",
    "require_apart",
    "require_workers_of_ours",
    "sharded_optimizer",
]
