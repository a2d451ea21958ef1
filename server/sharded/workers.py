"""The workers that hold a run's parameters and state: formed, asked, and formed anew where one is gone."""

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict

from fedsim.config import OptimizerConfig
from fedsim.engine.arrays import array_record
from fedsim.engine.collective import Meeting, Rendezvous
from fedsim.engine.grid import PATIENCE, WaitingGrid
from fedsim.engine.kept import KeptParameters
from fedsim.engine.shard_messages import (
    COMMIT,
    TAKE,
    TELL,
    CommitRequest,
    Committed,
    TakeRequest,
    TellRequest,
    Told,
)
from fedsim.errors import Failure
from server.packing import Roster

log = logging.getLogger(__name__)


class StateLost(Failure):
    """A worker is gone and so is the one that kept a copy of its state: what is left is the last checkpoint."""


class GroupBroken(Failure):
    """The workers cannot do together what they were asked for; those that are left hold what they held before."""


class Members(Roster):
    """The workers that hold the run's parameters, while they are the processes that took them; before that, all."""

    def __init__(self, grid: WaitingGrid, patience: float = PATIENCE) -> None:
        super().__init__(grid, patience)
        self.processes: dict[int, int] = {}

    def workers(self, wanted: bool = True) -> list[int]:
        present = super().workers(wanted)
        assert isinstance(self.grid, WaitingGrid)
        own, now = self.processes, self.grid.process_ids
        return [worker for worker in present if not own or own.get(worker) == now.get(worker)]

    def candidates(self) -> dict[int, int]:
        """All workers that are ready, members or not, with their processes."""
        assert isinstance(self.grid, WaitingGrid)
        ready = super().workers()
        return {worker: self.grid.process_ids.get(worker, 0) for worker in ready}


class WorkerGroup:
    """Workers that hold one version of a run's parameters, and each the optimizer's state of its own coordinates.

    Args:
        grid: Where they are.
        roster: Which of them are members; kept up to date here.
        optimizer: The optimizer's options.
        rounds: Rounds of the whole run.
        size: Trainable parameters, P.
        timeout: Seconds that a message may take; workers wait for each other for half of them.
        attempts: How often a group is formed before that fails.
    """

    def __init__(
        self,
        grid: WaitingGrid,
        roster: Members,
        optimizer: OptimizerConfig,
        rounds: int,
        size: int,
        *,
        timeout: float = 600.0,
        attempts: int = 3,
    ) -> None:
        self.grid, self.roster = grid, roster
        self.attempts = attempts
        self.held: KeptParameters | None = None
        self._optimizer, self._rounds, self._size = optimizer, rounds, size
        self._timeout = timeout
        self._order: list[int] = []
        self._rendezvous: Rendezvous | None = None

    @property
    def whole(self) -> bool:
        """Whether the group is formed, and of all workers that are ready."""
        return self.held is not None and self.roster.processes == self.roster.candidates()

    def form(self, state: Mapping[str, np.ndarray], version: int, parts: Sequence[str] = ()) -> set[str]:
        """Have all workers that are ready take a state.

        Args:
            state: PARAMETERS and the optimizer's arrays, whole.
            version: Steps that it has taken.
            parts: Of sums that some of them keep, those to keep.

        Returns:
            The parts that are still there.

        Raises:
            GroupBroken: Not even after some attempts did all of them come.
        """
        record = array_record(**state)
        for _ in range(self.attempts):
            self.roster.processes, self.held = {}, None
            members = self.roster.candidates()
            self._order = sorted(members)
            kept = KeptParameters(group=uuid.uuid4().hex, version=version, size=self._size)
            self._close()
            self._rendezvous = Rendezvous(self.grid.host, self._timeout)
            requests = {
                worker: TakeRequest(
                    kept=kept,
                    meeting=self._meeting(kept.group, rank),
                    optimizer=asdict(self._optimizer),
                    rounds=self._rounds,
                    parts=tuple(parts),
                    state=record,
                ).to_record()
                for rank, worker in enumerate(self._order)
            }
            replies, failures = self._asked(TAKE, requests, Told.from_record)
            if not failures:
                self.held, self.roster.processes = kept, members
                return {part for told in replies.values() for part in told.parts}
            self._close()  # those who still wait for the others give up
            log.warning("the workers did not come together: %s", "; ".join(failures.values()))
        raise GroupBroken(f"the workers did not come together: {'; '.join(failures.values())}")

    def commit(self, parts: Sequence[str], dtype: str, noise: Mapping[str, Any]) -> list[Committed]:
        """One step of all workers together: what each of them has ready. It stands once `stepped` is called.

        Raises:
            GroupBroken: Nothing stands.
            Failure: They do not have the same.
        """
        assert self.held is not None
        if sorted(self.roster.workers()) != self._order:
            raise GroupBroken("a worker is gone")
        content = CommitRequest(kept=self.held, parts=tuple(parts), dtype=dtype, noise=noise).to_record()
        replies, failures = self._asked(COMMIT, dict.fromkeys(self._order, content), Committed.from_record)
        if failures:
            raise GroupBroken("; ".join(failures.values()))
        if sorted(part for one in replies.values() for part in one.parts) != sorted(parts):
            raise Failure("the workers' sum does not consist of each of its parts once")
        if len({one.checksum for one in replies.values()}) != 1:
            raise Failure("the workers do not have the same parameters after a step")
        return list(replies.values())

    def stepped(self) -> None:
        """Let what the last commit made stand: later messages name it."""
        assert self.held is not None
        self.held = KeptParameters(group=self.held.group, version=self.held.version + 1, size=self.held.size)

    def tell(self, names: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Arrays of the state, whole: those of a worker that is gone from the one that has its copies.

        Args:
            names: PARAMETERS, or arrays of the optimizer's state; none for all.

        Raises:
            StateLost: Nobody has some coordinates any more.
        """
        assert self.held is not None
        while True:
            alive = set(self.roster.workers())
            count = len(self._order)
            gone = [rank for rank, worker in enumerate(self._order) if worker not in alive]
            if any((rank + 1) % count == rank or self._order[(rank + 1) % count] not in alive for rank in gone):
                raise StateLost(
                    f"{len(gone)} of {count} workers are gone, and copies of what they held with them: go on from the "
                    "last checkpoint (--resume)"
                )
            requests = {
                worker: TellRequest(kept=self.held, names=tuple(names), before=(rank - 1) % count in gone).to_record()
                for rank, worker in enumerate(self._order)
                if rank not in gone
            }
            told, failures = self._asked(TELL, requests, Told.from_record)
            if not failures:
                return self._put_together(told, gone)
            if alive <= set(self.roster.workers()):  # nobody died: asking again would change nothing
                raise Failure(f"the workers do not tell what they hold: {'; '.join(failures.values())}")

    def _put_together(self, told: Mapping[int, Told], gone: Sequence[int]) -> dict[str, np.ndarray]:
        following = [*self._order[1:], self._order[0]]
        parts = [
            told[following[rank]].before if rank in gone else told[worker].own
            for rank, worker in enumerate(self._order)
        ]
        any_own = next(iter(told.values())).own
        return {
            name: np.concatenate([part[name] for part in parts]) if value.ndim else np.array(value)
            for name, value in any_own.items()
        }

    def _meeting(self, name: str, rank: int) -> Meeting:
        assert self._rendezvous is not None
        return Meeting(
            host=self._rendezvous.host,
            port=self._rendezvous.port,
            name=name,
            rank=rank,
            owners=len(self._order),
            seconds=self._timeout / 2,  # so that those who wait for one that hangs answer before they count as late
        )

    def _asked(
        self, kind: str, requests: Mapping[int, RecordDict], read: Callable[[RecordDict], Any]
    ) -> tuple[dict[int, Any], dict[int, str]]:
        """What each worker answers, and of those that do not, why."""
        group = uuid.uuid4().hex  # the same for all of them: what they share is moved once
        messages = [
            Message(content, worker, kind, ttl=self._timeout, group_id=group) for worker, content in requests.items()
        ]
        replies: dict[int, Any] = {}
        failures = {worker: f"worker {worker}: no answer" for worker in requests}
        for reply in self.grid.send_and_receive(messages):
            worker = reply.metadata.src_node_id
            if reply.has_error():
                reason = (reply.error.reason or "no reason given").splitlines()[0]
                failures[worker] = f"worker {worker}: {reason}"
            else:
                try:
                    replies[worker] = read(reply.content)
                except Exception as failure:  # whatever reading it raises, as of training replies
                    failures[worker] = f"worker {worker}: it is no reply ({type(failure).__name__}: {failure})"
                else:
                    del failures[worker]
        return replies, failures

    def _close(self) -> None:
        if self._rendezvous is not None:
            self._rendezvous.close()
            self._rendezvous = None
