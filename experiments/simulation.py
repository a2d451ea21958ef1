"""A grid of simulated clients for a configuration."""

from collections.abc import Iterator
from contextlib import contextmanager

from flwr.serverapp import Grid

from fedsim.config import RunConfig, to_flat
from fedsim.data.progress import shown
from fedsim.resources import open_resources

CLIENT_APP = "clients.app:app"


@contextmanager
def simulated_clients(config: RunConfig) -> Iterator[Grid]:
    """Ray actors or virtual nodes of this process that hold the configured model and store.

    Model and store are built here first, so that workers find them in the cache rather than each build them.

    Raises:
        InvalidInput: When the model or the data cannot be had as configured.
    """
    with shown() as progress:
        open_resources(config, progress)
    engine = config.engine
    if engine.kind == "local":
        from fedsim.engine.local import LocalGrid

        yield LocalGrid(CLIENT_APP, to_flat(config), workers=engine.workers)
        return

    from fedsim.engine.ray_grid import RayGrid

    grid = RayGrid(
        CLIENT_APP,
        to_flat(config),
        workers=engine.workers,
        cpus_per_worker=engine.cpus_per_worker,
        gpus_per_worker=engine.gpus_per_worker,
        address=engine.address,
        timeout=engine.timeout_seconds,
    )
    try:
        yield grid
    finally:
        grid.close()
