"""A grid of simulated clients for a configuration."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.serverapp import Grid

from fedsim.config import RunConfig, to_flat
from fedsim.engine.grid import WaitingGrid
from fedsim.resources import open_resources
from fedsim.terminal import say, shown, waiting

CLIENT_APP = "clients.app:app"

LEAST_SHARED_BYTES = 256 << 20
"""Ray itself wants some shared memory, however small the model is."""


@contextmanager
def simulated_clients(config: RunConfig) -> Iterator[Grid]:
    """Ray actors or virtual nodes of this process that hold the configured model and store.

    Model and store are built here first, so that workers find them in the cache rather than each build them.

    Raises:
        InvalidInput: When the model or the data cannot be had as configured.
    """
    with shown() as progress:
        resources = open_resources(config, progress)
        size = resources.loaded.layout.size
    if config.engine.kind == "local":
        from fedsim.engine.local import LocalGrid

        yield LocalGrid(CLIENT_APP, to_flat(config), workers=max(1, config.engine.workers))
        return

    chosen = config if config.engine.workers else with_measured_slices(config, size, resources.row_tokens)
    with waiting(f"Starting {chosen.engine.workers} workers on Ray"):
        grid = ray_grid(chosen, chosen.engine.workers, size)
    try:
        yield grid
    finally:
        grid.close()


def ray_grid(config: RunConfig, workers: int, parameters: int) -> WaitingGrid:
    """Ray actors for a configuration, with shared memory for one broadcast and each worker's reply.

    Args:
        config: What the workers hold.
        workers: How many.
        parameters: Trainable values, float32 (int64 in the replies of exact mode).
    """
    from fedsim.engine.ray_grid import RayGrid

    engine = config.engine
    reply = 8 if engine.exact else 4
    shared = int(1.1 * parameters * (4 + workers * reply))
    return RayGrid(
        CLIENT_APP,
        to_flat(config),
        workers=workers,
        cpus_per_worker=engine.cpus_per_worker,
        gpus_per_worker=engine.gpus_per_worker or _gpu_share(workers),
        address=engine.address,
        object_store_bytes=max(shared, LEAST_SHARED_BYTES),
        timeout=engine.timeout_seconds,
        start_timeout=engine.start_seconds,
    )


def with_measured_slices(config: RunConfig, parameters: int, row_tokens: int) -> RunConfig:
    """The configuration with the number of workers and the micro-batch of highest measured throughput.

    Args:
        config: What is to run.
        parameters: Trainable values.
        row_tokens: Tokens of the longest row.

    Raises:
        InvalidInput: When not even the smallest candidate fits into memory.
    """
    from fedsim.engine.exact import MICRO_BATCH_TOKENS
    from fedsim.engine.slices import fastest, try_slices

    devices = _gpus() or (os.cpu_count() or 1) // config.engine.cpus_per_worker
    workers = [devices, 2 * devices, 4 * devices] if _gpus() else sorted({1, max(1, devices // 2), max(1, devices)})
    given = config.engine.max_tokens or (MICRO_BATCH_TOKENS if config.engine.exact else 0)  # nothing measured decides
    sizes = [given] if given else [row_tokens * rows for rows in (4, 16, 64, 256)]
    best = fastest(try_slices(lambda count: ray_grid(config, count, parameters), workers, sizes))
    say(f"{best.workers} workers, micro-batches of {best.max_tokens} tokens: {best.tokens_per_second:,.0f} tokens/s")
    engine = dataclasses.replace(config.engine, workers=best.workers, max_tokens=best.max_tokens)
    return dataclasses.replace(config, engine=engine)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _gpu_share(workers: int) -> float:
    """An equal share of the machine's GPUs for each worker; 0 where there is none."""
    return min(1.0, _gpus() / workers)
