"""Rounds of ever more workers that cost nothing: what the driver itself does for each of them, beside the bare sum."""

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from flwr.app import Message

from fedsim.clip import Clip
from fedsim.engine.grid import WaitingGrid, stamp
from fedsim.engine.messages import TrainReply, TrainRequest
from fedsim.engine.totals import Expected
from fedsim.gradient_paths import GradientPaths
from server.dispatch import Dispatcher

STATISTICS = {f"statistic {number}": 1.0 for number in range(9)} | {"seconds": 1.0}
"""As many as a worker tells."""
PATHS = GradientPaths.of({f"layers.{number}.{kind}": kind for number in range(12) for kind in "qkvo"}, set()).to_json()
"""What each worker says of a model's gradients, here of four kinds of layers."""
CLIP = Clip(norm=1.0)


class PromptGrid(WaitingGrid):
    """Workers that answer at once, without a process of their own, and tell all that a worker tells.

    Args:
        totals: What each of them answers, [P].
    """

    def __init__(self, totals: Sequence[np.ndarray]) -> None:
        super().__init__()
        self._totals = totals
        self._replies: dict[str, Message] = {}
        self.seconds = 0.0
        """What answering took since it was set to 0, which is the workers' part."""

    def get_node_ids(self) -> list[int]:
        return list(range(1, len(self._totals) + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        message_id = stamp(message)
        began = time.process_time()
        request = TrainRequest.from_record(message.content)
        reply = TrainReply(
            round=request.round,
            units=request.units,
            total=self._totals[message.metadata.dst_node_id - 1],
            statistics=STATISTICS,
            norms=np.ones(len(request.units), dtype=np.float32),
            paths=PATHS,
        )
        self._replies[message_id] = Message(reply.to_record(), reply_to=message)
        self.seconds += time.process_time() - began
        return message_id

    def wait(self, message_ids: Iterable[str], timeout: float | None = None) -> list[Message]:
        """All that are there."""
        return [self._replies.pop(one) for one in list(message_ids) if one in self._replies]

    def close(self) -> None:
        self._replies.clear()


def table(many: Sequence[int], sizes: Sequence[int], cohort: int, rounds: int) -> list[dict[str, float]]:
    """Processor milliseconds that a round takes the driver, by number of workers and values of a sum.

    Beside each the part that is arithmetic on the sums: of them bare, added up by numpy, and with the check that each
    must pass. The last row of a size tells by how much the rest grew from the fewest workers to the most.

    Returns:
        Medians over rounds, without the workers' own part.
    """
    print(f"Rounds of {cohort:,} units of simulated workers, processor ms of the driver:", flush=True)
    rows = []
    for size in sizes:
        for workers in many:
            totals = [np.full(size, 1e-9, dtype=np.float32) for _ in range(workers)]
            whole = _round_milliseconds(totals, cohort, 4 * rounds)
            bare = _milliseconds(lambda totals=totals: _bare(totals), 4 * rounds)  # type: ignore[misc]
            checked = _milliseconds(lambda totals=totals: _checked(totals, cohort), 4 * rounds)  # type: ignore[misc]
            row = {"workers": workers, "values": size, "whole": whole, "bare_sum": bare, "checked_sum": checked}
            rows.append(row)
            print(
                f"  {workers:>3} workers, {size:>9,} values: {whole:7.2f};"
                f" of it the bare sum {bare:7.2f}, with checks {checked:7.2f}",
                flush=True,
            )
        most, fewest = rows[-1], rows[-len(many)]
        grown, of_bare, of_checked = (most[name] - fewest[name] for name in ("whole", "bare_sum", "checked_sum"))
        print(
            f"  from {many[0]} to {many[-1]} workers: {grown:.2f} more,"
            f" beyond the bare sum {grown - of_bare:.2f}, beyond the checked one {grown - of_checked:.2f}"
        )
    return rows


def _round_milliseconds(totals: Sequence[np.ndarray], cohort: int, rounds: int) -> float:
    grid = PromptGrid(totals)
    dispatcher = Dispatcher(grid)
    flat, seconds = np.zeros(len(totals[0]), dtype=np.float32), []
    for round in range(rounds + 2):
        units = np.arange(cohort) + round * cohort
        grid.seconds, began = 0.0, time.process_time()
        request = TrainRequest(round=round, units=units, clip=CLIP, parameters=flat, plan="x" * 2000)
        dispatcher.gather(request, np.ones(cohort), next_units=units + cohort, next_costs=np.ones(cohort))
        seconds.append(time.process_time() - began - grid.seconds)
    return 1e3 * float(np.median(seconds[2:]))


def _milliseconds(call: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times + 2):
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
    return 1e3 * float(np.median(seconds[2:]))


def _bare(totals: Sequence[np.ndarray]) -> np.ndarray:
    total: np.ndarray = totals[0].copy()
    for other in totals[1:]:
        total += other
    return total


def _checked(totals: Sequence[np.ndarray], cohort: int) -> np.ndarray:
    expected = Expected(size=len(totals[0]), units=cohort, bound=CLIP.bound)
    total: np.ndarray = totals[0].copy()
    for place, other in enumerate(totals):
        expected.check(other)
        if place:
            total += other
    return total
