"""The Ray cluster under a RayGrid: start one here or join one, quietly, and check that workers fit."""

import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from fedsim.engine.same_versions import VersionsDiffer
from fedsim.errors import InvalidInput

FREE_AFTER_MILLISECONDS = 5


def join_or_start(address: str | None, *, cpus: float, object_store_bytes: int | None, log_to_driver: bool) -> bool:
    """Connect this process to Ray, unless it is connected already.

    Args:
        address: A running cluster's address, or None to start one on this machine.
        cpus: Cores that the workers ask for; a cluster started here pretends to have at least that many, so that
            more workers than cores can be tried.
        object_store_bytes: Shared memory of a cluster started here; None leaves Ray's default.
        log_to_driver: Print what workers print.

    Raises:
        InvalidInput: Nothing answers at the address; or Ray cannot keep its sockets in the temporary folder.
        VersionsDiffer: The cluster runs another Ray or Python.

    Returns:
        Whether the connection was made here, and is therefore to be ended here.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    own: dict[str, Any] = {}
    if address is None:
        _require_temporary_folder()
        cores = max(os.cpu_count() or 1, math.ceil(cpus))
        own = {
            "num_cpus": cores,
            "object_store_memory": object_store_bytes,
            "include_dashboard": False,
            # Ray waits up to a second before it frees what nobody holds any more. Rounds are shorter: the next
            # broadcast would go to memory never touched before, which costs more than the copy itself.
            "_system_config": {"free_objects_period_milliseconds": FREE_AFTER_MILLISECONDS},
        }
    try:
        with _sigterm_as_before():
            ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=log_to_driver, **own)
    except ConnectionError as failure:
        hint = f"Start one with `ray start --head`. ({failure})"
        raise InvalidInput("engine.address", address, "the address of a running Ray cluster", hint) from failure
    except RuntimeError as failure:
        if "mismatch" in str(failure):
            # Ray names its own and Python's versions on both sides.
            raise VersionsDiffer(str(failure)) from failure
        raise
    return True


def _require_temporary_folder() -> None:
    """Refuse a temporary folder whose name Ray fails to encode, which it does with a traceback."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        if place := os.environ.get(name):
            if not place.isascii():
                hint = "Ray keeps its sockets there: set it to another folder, or take --engine.kind local."
                raise InvalidInput(name, place, "a folder whose name has ASCII letters alone", hint)
            return


@contextmanager
def _sigterm_as_before() -> Iterator[None]:
    """Ray answers SIGTERM in its own way from when it is connected, which ends the program without a word: within this
    and after it, it is answered as before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    asked = False
    try:
        yield
    except SystemExit as ending:
        asked = ending.code == signal.SIGTERM
        if not asked:
            raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked:
        ray.shutdown()
        os.kill(os.getpid(), signal.SIGTERM)


def leave() -> None:
    """End the connection, and the cluster if it was started by this process."""
    ray.shutdown()


def room_for(resources: list[dict[str, float]], cpus_per_worker: float, gpus_per_worker: float) -> int:
    """How many workers the nodes have room for.

    Args:
        resources: Each node's resources; "CPU" and "GPU" count.
        cpus_per_worker: Cores for each worker, at least 0.
        gpus_per_worker: GPUs for each worker, at least 0; a fraction of one GPU, or whole GPUs.

    Returns:
        The sum over nodes. A worker with a fraction of a GPU stays on one GPU, so 0.6 allows one worker a GPU.
    """
    total = 0
    for node in resources:
        limits = []
        if cpus_per_worker > 0:
            limits.append(math.floor(node.get("CPU", 0.0) / cpus_per_worker + 1e-9))
        if 0 < gpus_per_worker < 1:
            limits.append(int(node.get("GPU", 0.0)) * math.floor(1.0 / gpus_per_worker + 1e-9))
        elif gpus_per_worker >= 1:
            limits.append(math.floor(node.get("GPU", 0.0) / gpus_per_worker + 1e-9))
        total += min(limits, default=10**6)
    return total


def require_room(workers: int, cpus_per_worker: float, gpus_per_worker: float) -> None:
    """Refuse more workers than the cluster has room for, before any is started.

    Raises:
        InvalidInput: Names how many fit.
    """
    found = ray.nodes()  # type: ignore[no-untyped-call]  # Ray leaves it without types
    nodes = [node["Resources"] for node in found if node["Alive"]]
    fits = room_for(nodes, cpus_per_worker, gpus_per_worker)
    if workers > fits:
        each = f"{cpus_per_worker:g} CPU cores" + (f" and {gpus_per_worker:g} GPUs" if gpus_per_worker else "")
        hint = f"The Ray cluster ({len(nodes)} nodes) has room for {fits} workers of {each}."
        raise InvalidInput("engine.workers", workers, f"at most {fits}", hint)
