"""What our two grids share: Flower's Grid on top of one blocking `wait`."""

import itertools
import secrets
import time
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedsim.engine.sums import Sums, SumsWanted, server_sum

RUN_ID = 1
PAUSE = 0.1
"""Seconds between two looks for workers."""
PATIENCE = 60.0
"""Seconds in which the first worker should have come up."""
_PROCESS, _NUMBERS = secrets.token_hex(8), itertools.count()
"""Of message ids: what no other process has, and what comes once in this one."""


class WaitingGrid(Grid):
    """A Flower Grid that hands over each reply the moment it arrives, without polling.

    Whatever Flower's Grid promises holds. Beyond it, `wait` blocks until at least one reply is there, a message's
    time to live is enforced on the worker (a worker that exceeds it is replaced), and node ids are workers, numbered
    from 1. Use as a context manager, or call `close`.
    """

    lost: dict[int, str]
    """Workers that died and could not be replaced, with the reason."""
    in_process = False
    """Whether workers are in this process, where they compute one after the other and vectors stay on their device."""

    def __init__(self) -> None:
        self.lost = {}
        self._run = Run.create_empty(RUN_ID)
        _identify()

    def set_run(self, run: Run) -> None:
        """Take over the run's id and configuration."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one worker."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    @property
    def process_ids(self) -> dict[int, int]:
        """Process id of each worker that is ready, by node id; none where workers have no processes of their own."""
        return {}

    @property
    def host(self) -> str:
        """The address at which workers reach this process."""
        return "127.0.0.1"

    @abstractmethod
    def wait(self, message_ids: Iterable[str], timeout: float | None = None) -> list[Message]:
        """Replies to some of these messages: those that are there, or the first to come.

        Args:
            message_ids: Ids that `push_messages` returned.
            timeout: Seconds to wait for the first reply; None waits until one comes or a message expires.

        Returns:
            At least one reply, unless the time ran out or no such message is under way. A message that failed, or
            outlived its time to live, is answered with an error reply.
        """

    def sums(self, wanted: SumsWanted, size_bytes: int, patience: float) -> Sums:
        """Where a round's sums are formed.

        Args:
            wanted: Where they shall be.
            size_bytes: Of each of them.
            patience: Seconds that forming them may take once all parts are there.

        Raises:
            InvalidInput: These workers cannot form sums on their nodes.
        """
        return server_sum(wanted)

    @abstractmethod
    def close(self) -> None:
        """Stop the workers and free what they hold. May be called twice."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to these messages that have arrived by now."""
        return self.wait(message_ids, timeout=0)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push messages and wait for all replies, or for `timeout` seconds."""
        waiting = set(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                break
            arrived = self.wait(waiting, timeout=left)
            waiting.difference_update(reply.metadata.reply_to_message_id for reply in arrived)
            replies.extend(arrived)
        return replies

    def __enter__(self) -> "WaitingGrid":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def _identify() -> None:
    """Say who is sending, unless that is known: Flower's Message asks this global, which a SuperLink would set."""
    try:
        _ = TaskIdentity.run_id
    except RuntimeError:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SUPERLINK_NODE_ID, 0


def stamp(message: Message) -> str:
    """Give a message its id, as a SuperLink does when it stores one, and return it."""
    message_id = f"{_PROCESS}{next(_NUMBERS):016x}"
    message.metadata.__dict__["_message_id"] = message_id
    return message_id


def error_reply(message: Message, code: int, reason: str) -> Message:
    """The reply that says that a message could not be answered, and why."""
    return Message(Error(code=code, reason=reason), reply_to=message)


def workers_of(grid: Grid, patience: float = PATIENCE) -> list[int]:
    """Ids of the grid's workers, in order; none where the first has not appeared within so many seconds."""
    end = time.monotonic() + patience
    while True:
        workers = sorted(grid.get_node_ids())
        if workers or time.monotonic() >= end:
            return workers
        time.sleep(PAUSE)
