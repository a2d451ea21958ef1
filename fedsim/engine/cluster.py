"""The Ray cluster under a RayGrid: start one here or join one, quietly, and check that workers fit."""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from fedsim.engine.address import joined_address
from fedsim.engine.devices import Devices, cores_here
from fedsim.engine.environment import HERE, forget_short_folder, own_import_paths, short_folder
from fedsim.engine.same_versions import VersionsDiffer
from fedsim.errors import Failure, InvalidInput

FREE_AFTER_MILLISECONDS = 5
WORKERS_A_CORE = 4
"""How far a cluster started here may pretend: to try more workers than cores is one thing, fifty on two another."""
LOOKS_EVERY = 0.002
"""Seconds."""
CLIENT_SERVER_FAILED = "Starting Ray client server failed"
"""What the head of a cluster says when the process that it starts for each ray:// connection died at once."""
CLIENT_ATTEMPTS = 3
"""How often such a process is asked for."""
ENDS_WITHIN = 60.0
"""Seconds that a start which nobody wants any more gets to come to its end, so that what it began can be ended too."""


class ClusterDidNotStart(Failure):
    """Ray did not start here, or could not be joined, in the time that it was given."""


def join_or_start(
    address: str | None,
    *,
    workers: int,
    cpus_per_worker: float,
    object_store_bytes: int | None,
    log_to_driver: bool,
    start_seconds: float = 300.0,
    field: str = "engine.workers",
) -> bool:
    """Connect this process to Ray, unless it is connected already.

    Signals are answered meanwhile and afterwards as before, not by Ray; where the answer raises, what was begun ends.

    Args:
        address: See `joined_address`; None starts a cluster on this machine.
        workers: How many processes are to compute at a time.
        cpus_per_worker: Cores that each asks for; a cluster started here pretends to have as many as all ask for, up
            to WORKERS_A_CORE times those it has, so that more workers than cores can be tried.
        object_store_bytes: Shared memory of a cluster started here; None leaves Ray's default.
        log_to_driver: Print what workers print.
        start_seconds: How long it may take.
        field: What `workers` was given as.

    Raises:
        InvalidInput: Nothing answers at the address; or too many workers are asked for; or Ray finds no place for its
            sockets.
        VersionsDiffer: The cluster runs another Ray or Python.
        ClusterDidNotStart: Not in that time.

    Returns:
        Whether the connection was made here, and is therefore to be ended here.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    joined = joined_address(address)
    own: dict[str, Any] = {}
    if joined is None:
        _require_cores(workers, cpus_per_worker, field)
        own = {
            "num_cpus": max(cores_here(), math.ceil(workers * cpus_per_worker)),
            "object_store_memory": object_store_bytes,
            "include_dashboard": False,
            # Ray waits up to a second before it frees what nobody holds any more. Rounds are shorter: the next
            # broadcast would go to memory never touched before, which costs more than the copy itself.
            "_system_config": {"free_objects_period_milliseconds": FREE_AFTER_MILLISECONDS},
        }
        if (folder := short_folder()) is not None:
            own["_temp_dir"] = folder
    else:
        # What Ray's workers are told to run they import before they can be told where the driver's code lies: a clone
        # here would meet another version there, or none.
        own = {"runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(own_import_paths())}}}
    _connect(start_seconds, address=joined or HERE, log_to_driver=log_to_driver, **own)
    return True


class _Connection(threading.Thread):
    """The thread that connects to Ray, and stays until the end.

    In the main thread Ray would answer SIGTERM from there on, in its own way, which ends the program without a word,
    and whatever a signal raises would leave it half started. What Ray starts ends with the thread that started it.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(name="ray", daemon=True)
        self.arguments = arguments
        self.failure: BaseException | None = None
        self.made, self.over = threading.Event(), threading.Event()

    def run(self) -> None:
        for left in reversed(range(CLIENT_ATTEMPTS)):
            if self.over.is_set():  # nobody waits for it any more
                break
            self.failure = None
            try:
                ray.init(logging_level=logging.ERROR, **self.arguments)
            except BaseException as failure:
                self.failure = failure
            if not left or CLIENT_SERVER_FAILED not in str(self.failure):
                break
        self.made.set()
        if self.failure is None:
            self.over.wait()

    def end(self, patience: float = ENDS_WITHIN) -> None:
        """End the connection, once it is made or so many seconds have passed."""
        self.made.wait(patience)
        ray.shutdown()
        self.over.set()
        forget_short_folder()


_connections: list[_Connection] = []
"""The one that this process has, if any."""


def _connect(seconds: float, **arguments: Any) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)  # before it says that signals are not its own in this thread
    connection = _Connection(**arguments)
    try:
        connection.start()
        if not _in_time(connection, seconds):
            connection.end(patience=0)
            what = "Ray did not start" if arguments["address"] == HERE else f"{arguments['address']} was not joined"
            raise ClusterDidNotStart(f"{what} in {seconds:g} s. Give it longer (--engine.start-seconds).")
        if connection.failure is not None:
            raise connection.failure
    except ConnectionError as failure:
        connection.end()
        if CLIENT_SERVER_FAILED in str(failure):
            said = next(line for line in str(failure).splitlines() if CLIENT_SERVER_FAILED in line).strip()
            what = f"The head at {arguments['address']} could not start a process for this connection"
            raise ClusterDidNotStart(f"{what} in {CLIENT_ATTEMPTS} attempts. ({said})") from failure
        hint = (
            "Ray answers there, but this machine could not join: run the command on a node of the cluster (`ray start "
            f"--address {arguments['address']}` makes this machine one), or give ray://host:10001. ({failure})"
        )
        raise InvalidInput("engine.address", arguments["address"], "a Ray cluster to join", hint) from failure
    except ClusterDidNotStart:
        raise
    except RuntimeError as failure:
        connection.end()
        if "mismatch" in str(failure):
            # Ray names its own and Python's versions on both sides.
            raise VersionsDiffer(str(failure)) from failure
        raise
    except BaseException:
        connection.end()
        raise
    _connections.append(connection)


def _in_time(connection: _Connection, seconds: float) -> bool:
    """Whether the connection is made in so many seconds.

    As it connects Ray puts a handler for SIGTERM in the place of Python's, which prints a stack trace and aborts, and
    tells nobody. So Python's is set anew, over and over.
    """
    deadline = time.monotonic() + seconds
    while not connection.made.wait(LOOKS_EVERY) and time.monotonic() < deadline:
        _answer_as_before()
    _answer_as_before()
    return connection.made.is_set()


def _answer_as_before() -> None:
    if threading.current_thread() is threading.main_thread():
        answer = signal.getsignal(signal.SIGTERM)  # what Python knows of; Ray's is not among it
        if answer is not None:
            signal.signal(signal.SIGTERM, answer)


def leave() -> None:
    """End the connection, and the cluster if it was started by this process."""
    if _connections:
        _connections.pop().end()
    else:
        ray.shutdown()


def _require_cores(workers: int, cpus_per_worker: float, field: str) -> None:
    """Refuse workers that would stand in each other's way, and each want memory for a model of its own."""
    cores = cores_here()
    most = max(1, math.floor(WORKERS_A_CORE * cores / cpus_per_worker + 1e-9)) if cpus_per_worker else workers
    if workers > most:
        allowed = f"at most {most} on the {cores} cores here, {WORKERS_A_CORE} a core"
        if cpus_per_worker != 1:
            allowed = f"at most {most} of {cpus_per_worker:g} cores on the {cores} here, {WORKERS_A_CORE} times over"
        hint = (
            "More would only wait for one another. To try what many do, start Ray with as many pretended cores (`ray "
            f"start --head --num-cpus {math.ceil(workers * cpus_per_worker)}`) and join it (--engine.address auto)."
        )
        raise InvalidInput(field, workers, allowed, hint)


@contextmanager
def devices_of(address: str | None, start_seconds: float) -> Iterator[Devices]:
    """What a cluster has to compute on, which is joined for as long as this lasts; or None, this machine.

    Args:
        address: See `joined_address`.
        start_seconds: How long joining may take.

    Raises:
        As join_or_start.
    """
    if address in (None, HERE):
        yield Devices.here()
        return
    joined = join_or_start(
        address,
        workers=0,
        cpus_per_worker=0,
        object_store_bytes=None,
        log_to_driver=False,
        start_seconds=start_seconds,
    )
    try:
        has = _alive()
        cores, gpus = (int(sum(node.get(kind, 0.0) for node in has)) for kind in ("CPU", "GPU"))
        yield Devices(cores, gpus)
    finally:
        if joined:
            leave()


def _alive() -> list[dict[str, float]]:
    """Resources of each node."""
    found = ray.nodes()  # type: ignore[no-untyped-call]  # Ray leaves it without types
    return [node["Resources"] for node in found if node["Alive"]]


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
    nodes = _alive()
    fits = room_for(nodes, cpus_per_worker, gpus_per_worker)
    if workers > fits:
        each = f"{cpus_per_worker:g} CPU cores" + (f" and {gpus_per_worker:g} GPUs" if gpus_per_worker else "")
        hint = f"The Ray cluster ({len(nodes)} nodes) has room for {fits} workers of {each}."
        raise InvalidInput("engine.workers", workers, f"at most {fits}", hint)
