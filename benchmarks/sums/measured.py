"""The same measured: workers that compute nothing, on a cluster of several Ray nodes on this machine."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import ray
from ray.cluster_utils import Cluster

from benchmarks.engine.roundtrip import PeakMemory, raylets
from fedsim.clip import Clip
from fedsim.engine.messages import TrainRequest
from fedsim.engine.ray_grid import RayGrid
from fedsim.engine.sums import ServerSum, SumsWanted
from server.dispatch import Dispatcher

WATCHED_FROM_BYTES = 16 << 20
"""Memory of smaller sums is lost in that of everything else."""


@contextmanager
def cluster_of(nodes: int, cpus: int, store_bytes: int) -> Iterator[str]:
    """The address of so many Ray nodes on this machine, which end with the block."""
    node = {"num_cpus": cpus, "object_store_memory": store_bytes}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            made.add_node(**node)
        made.wait_for_nodes()
        yield made.address
    finally:
        ray.shutdown()
        made.shutdown()


class Ingress:
    """Counts the bytes of the vectors that come into this process to be added."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> "Ingress":
        self._put = ServerSum.put

        def counted(own: ServerSum, total: np.ndarray) -> None:
            self.bytes += total.nbytes
            self._put(own, total)

        ServerSum.put = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: object) -> None:
        ServerSum.put = self._put  # type: ignore[method-assign]


def as_if_apart(grid: RayGrid) -> None:
    """Let workers on other Ray nodes than this process's be as if on other machines: without segments of it."""
    here = ray.get_runtime_context().get_node_id()
    for slot in grid._slots.values():
        there = ray.get(slot.actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))
        slot.near = there == here


def processes(grid: RayGrid, others: set[int]) -> list[int]:
    """This process, the stores, the workers and the summing actors."""
    actors = list(grid._transport._summing._actors.values())
    summing = ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in actors])
    return [os.getpid(), *(set(raylets()) - others), *grid.process_ids.values(), *summing]


def measure(
    grid: RayGrid,
    sums: SumsWanted,
    size_bytes: int,
    rounds: int,
    others: set[int] = frozenset(),  # type: ignore[assignment]
) -> dict[str, float]:
    """Rounds of one form.

    Args:
        grid: The workers.
        sums: The form.
        size_bytes: Of a sum.
        rounds: How many count; two before them do not.
        others: Raylets that are not of this cluster.

    Returns:
        Medians over rounds of seconds beyond the busiest worker's own, and of this thread's processor seconds; bytes
        of sums that came into this process a round; and by how many sums memory of driver, stores, workers and
        summing actors together was above that of rounds with small sums.
    """
    dispatcher = Dispatcher(grid, sums=sums)
    units = np.arange(8 * len(grid.get_node_ids()))

    def run(flat: np.ndarray, round: int) -> tuple[float, float]:
        began, worked = time.perf_counter(), time.thread_time()
        request = TrainRequest(round=round, units=units, clip=Clip(norm=1.0), parameters=flat)
        gathered = dispatcher.gather(request, np.ones(len(units)))
        if gathered.failures:
            raise RuntimeError(gathered.failures[0])
        return time.perf_counter() - began - gathered.compute_seconds, time.thread_time() - worked

    for round in range(2):
        run(np.zeros(40_000, dtype=np.float32), round)  # just so large that it does not travel inside messages
    memory = PeakMemory(processes(grid, others)) if size_bytes >= WATCHED_FROM_BYTES else None
    before = 0 if memory is None else memory.peak
    flat = np.zeros(size_bytes // 4, dtype=np.float32)
    run(flat, 2)
    run(flat, 3)
    if memory is not None:
        memory.stop()  # it would slow what is timed
    with Ingress() as ingress:
        seconds, own = np.median([run(flat, 4 + round) for round in range(rounds)], axis=0)
    return {
        "seconds": float(seconds),
        "driver_cpu_seconds": float(own),
        "ingress_bytes": ingress.bytes / rounds,
        "memory_sums": 0.0 if memory is None else (memory.peak - before) / size_bytes,
    }
