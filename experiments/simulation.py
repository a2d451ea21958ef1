"""A grid of simulated clients for a configuration."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.serverapp import Grid

from fedsim.config import RunConfig, to_flat
from fedsim.data.config import DataConfig
from fedsim.engine.devices import Devices
from fedsim.engine.grid import WaitingGrid
from fedsim.gradients.sharded.blocks import blocks_of
from fedsim.models.sources import BASE, find_source
from fedsim.resources import Resources, open_resources
from fedsim.terminal import say, shown, waiting

CLIENT_APP = "clients.app:app"

FEW = 2
"""Workers where nobody says how many, and no GPU does."""

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
    if config.engine.devices_per_worker > 1:
        blocks_of(resources.loaded.model, resources.loaded.objective)  # else each worker would refuse the model
    if config.engine.kind == "local":
        from fedsim.engine.local import LocalGrid

        workers = FEW if config.engine.workers is None else max(1, config.engine.workers)
        yield LocalGrid(CLIENT_APP, to_flat(config), workers=workers)
        return

    from fedsim.engine.cluster import devices_of

    config = as_opened(config, resources)
    with devices_of(config.engine.address, config.engine.start_seconds) as devices:
        if config.engine.workers == 0:
            config = with_measured_slices(config, size, resources.row_tokens, devices)
        workers = config.engine.workers or _default_workers(config, devices)
        with waiting(f"Starting {workers} workers on Ray"):
            grid = ray_grid(config, workers, size, devices)
        try:
            yield grid
        finally:
            grid.close()


def as_opened(config: RunConfig, resources: Resources) -> RunConfig:
    """The configuration for workers on Ray: they open the store and the model that were built or found here, by
    absolute paths, and need neither the text nor the working directory that these came from.

    Args:
        config: A run's.
        resources: What it names, opened.
    """
    data = DataConfig(source="store", path=str(resources.store.path.resolve()))
    path = resources.loaded.source.adapters or resources.loaded.source.base
    if Path(path).is_dir():
        path = str(Path(path).resolve())
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, path=path))


def ray_grid(config: RunConfig, workers: int, parameters: int, devices: Devices) -> WaitingGrid:
    """Ray actors for a configuration, with shared memory for one broadcast and each worker's reply.

    Args:
        config: What the workers hold, as opened.
        workers: How many.
        parameters: Trainable values, float32 (int64 in the replies of exact mode).
        devices: What there is to compute on.
    """
    from fedsim.engine.ray_grid import RayGrid

    engine = config.engine
    reply = 8 if engine.exact else 4
    # Where workers have the state, all of it comes and goes at times: parameters, two moments and an average.
    vectors = 4 * (4 + 4) if engine.sums == "workers" else 4 + workers * reply
    shared = int(1.1 * parameters * vectors)
    return RayGrid(
        CLIENT_APP,
        to_flat(config),
        workers=workers,
        cpus_per_worker=engine.cpus_per_worker * engine.devices_per_worker,
        gpus_per_worker=engine.gpus_per_worker or gpu_share(workers, devices.gpus, engine.devices_per_worker),
        address=engine.address,
        object_store_bytes=max(shared, LEAST_SHARED_BYTES),
        timeout=engine.timeout_seconds,
        start_timeout=engine.start_seconds,
        folders={
            field: Path(path)
            for field, path in (("data.path", config.data.path), ("model.path", config.model.path))
            if path is not None and Path(path).is_absolute()
        },
        required=required_beside(config.model.path),
    )


def required_beside(path: str) -> dict[str, tuple[Path, str]]:
    """What nodes need beside the model's folder: the base of adapters, where it is a folder elsewhere. It is not sent.

    Args:
        path: Of the model, as opened.
    """
    source = find_source(path) if Path(path).is_dir() else None
    if source is None or source.adapters is None or source.carried or not Path(source.base).is_dir():
        return {}
    hint = (
        "copy this base of the adapters to the same path (rsync), lay it on a folder that all nodes share, or put it "
        f"into {Path(source.adapters) / BASE}, which is sent with them."
    )
    return {"model.path": (Path(source.base), hint)}


def with_measured_slices(config: RunConfig, parameters: int, row_tokens: int, devices: Devices) -> RunConfig:
    """The configuration with the number of workers and the micro-batch of highest measured throughput.

    Args:
        config: What is to run.
        parameters: Trainable values.
        row_tokens: Tokens of the longest row.
        devices: What there is to compute on.

    Raises:
        InvalidInput: When not even the smallest candidate fits into memory.
    """
    from fedsim.engine.exact import MICRO_BATCH_TOKENS
    from fedsim.engine.slices import fastest, try_slices

    one, gpus = devices.gpus or devices.cores // config.engine.cpus_per_worker, devices.gpus
    workers = [one, 2 * one, 4 * one] if gpus else sorted({1, max(1, one // 2), max(1, one)})
    given = config.engine.max_tokens or (MICRO_BATCH_TOKENS if config.engine.exact else 0)  # nothing measured decides
    sizes = [given] if given else [row_tokens * rows for rows in (4, 16, 64, 256)]
    best = fastest(try_slices(lambda count: ray_grid(config, count, parameters, devices), workers, sizes))
    say(f"{best.workers} workers, micro-batches of {best.max_tokens} tokens: {best.tokens_per_second:,.0f} tokens/s")
    engine = dataclasses.replace(config.engine, workers=best.workers, max_tokens=best.max_tokens)
    return dataclasses.replace(config, engine=engine)


def _default_workers(config: RunConfig, devices: Devices) -> int:
    """One a GPU, or as many as their share of it leaves room for; few where there is no GPU."""
    share = config.engine.gpus_per_worker or float(config.engine.devices_per_worker)
    room = math.floor(devices.gpus / share) if share >= 1 else devices.gpus * math.floor(1 / share + 1e-9)
    return room or FEW


def gpu_share(workers: int, gpus: int, devices_per_worker: int = 1) -> float:
    """GPUs of each worker: one for each of its devices; where there are fewer, an equal share for all on one; 0 where
    there is none."""
    if devices_per_worker > 1:
        return float(devices_per_worker) if gpus else 0.0
    return 1.0 / max(1, math.ceil(workers / gpus)) if gpus else 0.0
