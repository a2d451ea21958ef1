"""LocalGrid: clients in this process, one after the other, for tests, debugging and machines without Ray."""

from collections.abc import Iterable

from flwr.app import Message, UserConfig
from flwr.common.constant import ErrorCode

from fedsim.engine.grid import WaitingGrid, error_reply, stamp
from fedsim.engine.resident import ClientAppSource, ResidentClient
from fedsim.errors import InvalidInput


class LocalGrid(WaitingGrid):
    """A Flower Grid whose workers live in this process and answer when they are waited for.

    Args:
        client_app: The ClientApp, a function that makes one, or "package.module:name".
        run_config: The run's flat user configuration.
        workers: Number of node ids. They share the process, so more than one serves only to test the splitting.

    A breakpoint in the client works, and an interrupted client interrupts the run. Time to live is not enforced:
    nothing can stop a client that shares the process.
    """

    in_process = True

    def __init__(self, client_app: ClientAppSource, run_config: UserConfig | None = None, *, workers: int = 1) -> None:
        if workers < 1:
            raise InvalidInput("workers", workers, "at least 1")
        super().__init__()
        self._clients = {
            node: ResidentClient(client_app, run_config or {}, node, workers) for node in range(1, workers + 1)
        }
        self._unanswered: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        """The workers' ids, from 1."""
        return list(self._clients)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep the messages until somebody waits for their replies."""
        ids = []
        for message in messages:
            ids.append(stamp(message))
            self._unanswered[ids[-1]] = message
        return ids

    def wait(self, message_ids: Iterable[str], timeout: float | None = None) -> list[Message]:
        """Answer the first of these messages and return its reply."""
        for message_id in message_ids:
            message = self._unanswered.pop(message_id, None)
            if message is not None:
                return [self._answer(message)]
        return []

    def _answer(self, message: Message) -> Message:
        client = self._clients.get(message.metadata.dst_node_id)
        if client is None:
            return error_reply(message, ErrorCode.NODE_UNAVAILABLE, f"no worker {message.metadata.dst_node_id}")
        return client.answer(message)

    def close(self) -> None:
        """Forget the clients."""
        self._clients.clear()
        self._unanswered.clear()
