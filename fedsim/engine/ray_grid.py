"""RayGrid: a Flower Grid over resident Ray actors, on one machine or a cluster."""

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray
from flwr.app import Message, Metadata, UserConfig
from flwr.common.constant import ErrorCode

from fedsim.engine.carried import Folder, carry, require_there
from fedsim.engine.cluster import join_or_start, leave, require_room
from fedsim.engine.environment import HERE, Whereabouts
from fedsim.engine.grid import WaitingGrid, error_reply, stamp
from fedsim.engine.node_sums import PAYS_FROM_BYTES
from fedsim.engine.resident import ClientAppSource
from fedsim.engine.resident_actor import ResidentActor
from fedsim.engine.same_versions import VersionsDiffer, require_same_versions
from fedsim.engine.sums import Sums, SumsWanted
from fedsim.engine.transport import Carried, Transport, bare_message, is_large
from fedsim.errors import Failure, InvalidInput
from fedsim.versions import versions

START_ATTEMPTS = 3
"""How often a worker is started whose node turns out to be gone."""


@dataclass
class _Slot:
    """One worker: its node id, the actor that fills it now, and what that actor has been asked."""

    node: int
    actor: Any
    described: "ray.ObjectRef[dict[str, str]]"
    started: "ray.ObjectRef[int] | None"
    pid: int = 0
    near: bool | None = None
    """Whether segments of this process reach it; None before it was asked."""
    owed: int = 0
    """Messages that it has not answered."""


@dataclass(frozen=True)
class _Sent:
    """A message under way."""

    metadata: Metadata
    slot: _Slot | None
    carried: Carried
    deadline: float

    @property
    def message(self) -> Message:
        """What an error reply is made to, which needs no content: its own is let go of once it is sent."""
        return bare_message(self.metadata)


class RayGrid(WaitingGrid):
    """A Flower Grid whose nodes are Ray actors that stay alive for the whole run.

    Each actor loads the ClientApp once and keeps what it holds. A round's shared records cross into Ray's object
    store once and are read there without a copy; replies come back the same way. A worker that dies or hangs is
    replaced, and the messages it had are answered with error replies, as Flower does; sending them again is the
    server's part (`server.dispatch`).

    Args:
        client_app: Where to import the ClientApp from, "package.module:name"; or a ClientApp or a function that
            makes one, which must then survive pickling.
        run_config: The run's flat user configuration.
        workers: Number of actors.
        cpus_per_worker: CPU cores reserved for each, and threads that each may use; fractions share a core.
        gpus_per_worker: GPUs reserved for each; 0.25 puts four actors on one GPU.
        address: Address of a running Ray cluster, see `joined_address`; None starts one on this machine.
        object_store_bytes: Shared memory for a cluster started here; None leaves Ray's default.
        timeout: Seconds after which a message counts as failed, if its own time to live is not shorter.
        start_timeout: Seconds that Ray gets to start or to be joined, and as many again that workers get.
        log_to_driver: Print what workers print.
        folders: Where the folders lie that options of run_config name, by option. Nodes of a cluster that lack one at
            that path get it into their cache.

    Raises:
        InvalidInput: Nothing answers at the address; or the cluster has no room for that many workers: says how many
            it has room for.
        ClusterDidNotStart: Ray did not, in that time.
        VersionsDiffer: Some worker's Python or packages differ from the driver's.
        Failure: A folder could not be sent.
        WorkersDidNotStart: A worker failed to start, with its reason.
    """

    def __init__(
        self,
        client_app: ClientAppSource,
        run_config: UserConfig | None = None,
        *,
        workers: int = 2,
        cpus_per_worker: float = 1.0,
        gpus_per_worker: float = 0.0,
        address: str | None = None,
        object_store_bytes: int | None = None,
        timeout: float | None = None,
        start_timeout: float = 300.0,
        log_to_driver: bool = False,
        folders: Mapping[str, Path] = MappingProxyType({}),
        required: Mapping[str, tuple[Path, str]] = MappingProxyType({}),
    ) -> None:
        if workers < 1:
            raise InvalidInput("workers", workers, "at least 1")
        super().__init__()
        self._client: tuple[ClientAppSource, UserConfig, tuple[Folder, ...]]
        self._client = (client_app, dict(run_config or {}), ())
        self._workers = workers
        self._here = Whereabouts.of_this_process()
        self._resources = {"num_cpus": cpus_per_worker, "num_gpus": gpus_per_worker}
        self._timeout = math.inf if timeout is None else timeout
        self._start_timeout = start_timeout
        self._sent: dict[str, _Sent] = {}
        self._transport = Transport()
        self._slots: dict[int, _Slot] = {}
        self._owns_ray = join_or_start(
            address,
            workers=workers,
            cpus_per_worker=cpus_per_worker,
            object_store_bytes=object_store_bytes,
            log_to_driver=log_to_driver,
            start_seconds=start_timeout,
        )
        try:
            require_room(workers, cpus_per_worker, gpus_per_worker)
            if address not in (None, HERE):
                for field, (path, hint) in required.items():
                    require_there(field, path, hint, self._here)
            if folders and address not in (None, HERE):
                named = {field: (str(self._client[1][field]), path) for field, path in folders.items()}
                self._client = (*self._client[:2], carry(named, self._here))
            self._slots = {node: self._fill(node) for node in range(1, workers + 1)}
            self._await_all()
        except BaseException:
            self.close()
            raise

    # Workers ---------------------------------------------------------------------------------------------------

    def _fill(self, node: int) -> _Slot:
        threads = max(1, int(self._resources["num_cpus"]))
        actor: Any = (
            ray.remote(ResidentActor)
            .options(**self._resources, scheduling_strategy="SPREAD", max_restarts=0, max_task_retries=0)
            .remote(threads, self._here)
        )
        described = actor.describe.remote()
        return _Slot(node, actor, described, actor.start.remote(*self._client, node, self._workers))

    def _await_all(self) -> None:
        started = [slot.started for slot in self._slots.values()]
        _, late = ray.wait(started, num_returns=len(started), timeout=self._start_timeout)
        if late:
            told = f"{len(late)} of {len(started)} workers not ready in {self._start_timeout:g} s"
            raise WorkersDidNotStart(f"{told}. Give them longer (--engine.start-seconds), or ask for fewer.")
        for slot in self._slots.values():
            self._admit(slot)

    def _admit(self, slot: _Slot) -> None:
        """Take a worker that has started into service, or raise what kept it from starting."""
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                described = ray.get(slot.described, timeout=self._start_timeout)
                require_same_versions(versions(), described, f"worker {slot.node}")
                assert slot.started is not None
                slot.pid = ray.get(slot.started, timeout=self._start_timeout)
                break
            except ray.exceptions.RayError as failure:
                # Ray may place an actor on a node that is gone before it has noticed that; another try goes elsewhere.
                if "node has died" not in str(failure) or attempt == START_ATTEMPTS:
                    raise WorkersDidNotStart(f"worker {slot.node}: {_reason(failure)}") from failure
                slot = self._slots[slot.node] = self._fill(slot.node)
        slot.started = None

    def get_node_ids(self) -> list[int]:
        """Ids of the workers that are ready; if none is, waits for the first that is being replaced."""
        starting = {slot.started: slot for slot in self._slots.values() if slot.started is not None}
        if starting:
            patience = self._start_timeout if len(starting) == len(self._slots) else 0
            ready, _ = ray.wait(list(starting), num_returns=1, timeout=patience)
            if ready:
                ready, _ = ray.wait(list(starting), num_returns=len(starting), timeout=0)
            for reference in ready:
                slot = starting[reference]
                try:
                    self._admit(slot)
                except (WorkersDidNotStart, VersionsDiffer) as failure:
                    del self._slots[slot.node]
                    self.lost[slot.node] = str(failure)
        return [slot.node for slot in self._slots.values() if slot.started is None]

    @property
    def process_ids(self) -> dict[int, int]:
        """Process id of each worker that is ready, by node id (on the machine that Ray placed it on)."""
        return {slot.node: slot.pid for slot in self._slots.values() if slot.started is None}

    @property
    def host(self) -> str:
        """The address at which workers reach this process."""
        return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    def _replace(self, slot: _Slot | None) -> None:
        """Put a fresh actor in the place of one that died or hangs, unless that was done before."""
        if slot is None or self._slots.get(slot.node) is not slot:
            return
        ray.kill(slot.actor, no_restart=True)
        self._slots[slot.node] = self._fill(slot.node)

    # Sums ------------------------------------------------------------------------------------------------------

    def sums(self, wanted: SumsWanted, size_bytes: int, patience: float) -> Sums:
        """Where the sums of the messages that are pushed from now on are formed; see `WaitingGrid.sums`."""
        on_nodes = wanted == "nodes" or (wanted == "auto" and size_bytes >= PAYS_FROM_BYTES and self._shared)
        return self._transport.sums(on_nodes, size_bytes, patience)

    @property
    def _shared(self) -> bool:
        """Whether there are several nodes, and some node must have several workers."""
        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        return 1 < len(alive) < len(self._slots)

    # Messages --------------------------------------------------------------------------------------------------

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send the messages to their workers, which answer them in order."""
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        message_id = stamp(message)
        slot = self._slots.get(message.metadata.dst_node_id)
        if slot is None:
            return self._refuse(message)
        if slot.near is None:
            slot.near = self._transport.reaches(slot.actor)
        carried = self._transport.send(message, slot.actor, near=slot.near, busy=slot.owed > 0)
        slot.owed += 1
        deadline = time.monotonic() + self._seconds_for(message.metadata)
        self._sent[message_id] = _Sent(message.metadata, slot, carried, deadline)
        return message_id

    def _settled(self, message_id: str) -> _Sent:
        """A message that is not under way any more."""
        sent = self._sent.pop(message_id)
        if sent.slot is not None:
            sent.slot.owed -= 1
        return sent

    def _refuse(self, message: Message) -> str:
        """Answer for a worker that does not exist (any more)."""
        node = message.metadata.dst_node_id
        reason = self.lost.get(node, f"there is no worker {node}")
        reply = ray.put(error_reply(message, ErrorCode.NODE_UNAVAILABLE, reason))
        self._sent[message.metadata.message_id] = _Sent(message.metadata, None, Carried(reply), math.inf)
        return message.metadata.message_id

    def _seconds_for(self, metadata: Metadata) -> float:
        return min(metadata.ttl, self._timeout)

    def wait(self, message_ids: Iterable[str], timeout: float | None = None) -> list[Message]:
        """Replies that are there, or the first to come; see `WaitingGrid.wait`."""
        sent = {self._sent[i].carried.reply: i for i in message_ids if i in self._sent}
        if not sent:
            return []
        patience = min(self._sent[i].deadline for i in sent.values()) - time.monotonic()
        if timeout is not None:
            patience = min(patience, timeout)
        ready, _ = ray.wait(list(sent), num_returns=1, timeout=max(0.0, patience))
        if ready and len(sent) > 1:
            ready, _ = ray.wait(list(sent), num_returns=len(sent), timeout=0)
        replies = [self._receive(self._settled(sent[reference])) for reference in ready]
        return replies or self._expire(sent.values())

    def _receive(self, sent: _Sent) -> Message:
        try:
            reply = self._transport.receive(sent.carried)
            self._let_worker_free(sent, reply)
            return reply
        except ray.exceptions.RayError as failure:
            self._transport.forget(sent.carried)
            self._replace(sent.slot)
            return error_reply(sent.message, ErrorCode.NODE_UNAVAILABLE, _reason(failure))

    def _let_worker_free(self, sent: _Sent, reply: Message) -> None:
        """Before the server makes room for a large sum, give the worker a moment to let go of its own copy.

        Otherwise the two overlap, and the peak is one model higher. Skipped where the worker has more to do.
        """
        if sent.slot is not None and is_large(reply) and not sent.slot.owed:
            ray.wait([sent.slot.actor.rest.remote()], timeout=10.0)

    def _expire(self, message_ids: Iterable[str]) -> list[Message]:
        """Error replies to messages past their time to live; the workers that owe the answers are replaced."""
        now = time.monotonic()
        replies = []
        for message_id in [i for i in message_ids if self._sent[i].deadline <= now]:
            sent = self._settled(message_id)
            self._transport.forget(sent.carried)
            self._replace(sent.slot)
            reason = f"no answer in {self._seconds_for(sent.metadata):g} s"
            replies.append(error_reply(sent.message, ErrorCode.MESSAGE_UNAVAILABLE, reason))
        return replies

    def close(self) -> None:
        """Stop the workers, and the Ray cluster if it was started here."""
        self._sent.clear()
        self._transport.close()
        for slot in self._slots.values():
            ray.kill(slot.actor, no_restart=True)
        self._slots.clear()
        if self._owns_ray:
            self._owns_ray = False
            leave()


class WorkersDidNotStart(Failure):
    """Workers that should have started did not."""


def _reason(failure: ray.exceptions.RayError) -> str:
    """What happened, on one line, without Ray's identifiers and advice."""
    cause = getattr(failure, "cause", None)
    if cause is not None:
        return f"{type(cause).__name__}: {cause}".strip()
    told = re.split(r"\n\n|Some common causes|Worker exit type", str(failure))[0]
    lines = [line for line in told.splitlines() if line and not line.startswith(("\t", " "))]
    return f"{type(failure).__name__}: {' '.join(lines)}".strip()
