"""Rounds of ever more workers that cost nothing: what the driver itself does for each of them."""

import time
from collections.abc import Iterable, Sequence

import numpy as np
from flwr.app import Message

from fedsim.clip import Clip
from fedsim.engine.grid import WaitingGrid, stamp
from fedsim.engine.messages import TrainReply, TrainRequest
from server.dispatch import Dispatcher

SIZE = 1000
"""Values of a sum: so few that adding them costs next to nothing."""


class PromptGrid(WaitingGrid):
    """Workers that answer at once, without a process of their own.

    Args:
        workers: How many.
    """

    def __init__(self, workers: int) -> None:
        super().__init__()
        self._workers = workers
        self._replies: dict[str, Message] = {}
        self._total = np.zeros(SIZE, dtype=np.float32)
        self.seconds = 0.0
        """What answering took since it was set to 0, which is the workers' part."""

    def get_node_ids(self) -> list[int]:
        return list(range(1, self._workers + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        began = time.process_time()
        ids = []
        for message in messages:
            ids.append(stamp(message))
            request = TrainRequest.from_record(message.content)
            reply = TrainReply(
                round=request.round, units=request.units, total=self._total, statistics={"seconds": 1.0}
            )
            self._replies[ids[-1]] = Message(reply.to_record(), reply_to=message)
        self.seconds += time.process_time() - began
        return ids

    def wait(self, message_ids: Iterable[str], timeout: float | None = None) -> list[Message]:
        """All that are there."""
        return [self._replies.pop(one) for one in list(message_ids) if one in self._replies]

    def close(self) -> None:
        self._replies.clear()


def table(many: Sequence[int], cohort: int, rounds: int) -> list[dict[str, float]]:
    """Processor milliseconds that a round takes the driver, by number of workers: median, without their own part."""
    print(f"Rounds of {cohort:,} units of simulated workers, processor time of the driver:", flush=True)
    rows = []
    for workers in many:
        grid = PromptGrid(workers)
        dispatcher = Dispatcher(grid)
        flat, seconds = np.zeros(SIZE, dtype=np.float32), []
        for round in range(4 * rounds + 2):
            units = np.arange(cohort) + round * cohort
            grid.seconds, began = 0.0, time.process_time()
            request = TrainRequest(round=round, units=units, clip=Clip(norm=1.0), parameters=flat, plan="x" * 2000)
            dispatcher.gather(request, np.ones(cohort), next_units=units + cohort, next_costs=np.ones(cohort))
            seconds.append(time.process_time() - began - grid.seconds)
        rows.append({"workers": workers, "milliseconds": 1e3 * float(np.median(seconds[2:]))})
        print(f"  {workers:>3} workers: {rows[-1]['milliseconds']:6.2f} ms", flush=True)
    return rows
