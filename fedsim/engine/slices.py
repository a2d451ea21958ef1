"""How many workers share a GPU and how many tokens a micro-batch holds: found by a short measured trial.

Throughput decides; memory only rules out. The server side tries candidates on real workers (`try_slices`) before
training starts; the client answers a trial message with what `timed` measured of its own work. Nothing here knows
what the work or the device is.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict

from fedsim.engine.arrays import scalars
from fedsim.engine.grid import WaitingGrid
from fedsim.engine.ray_grid import WorkersDidNotStart
from fedsim.errors import Failure, InvalidInput

TRIAL = "query.trial"
"""Type of a trial message: register the client's answer with `@app.query("trial")`."""

TIE = 0.03
"""Throughputs closer than this are a tie; fewer workers and smaller micro-batches then win."""

OUT_OF_MEMORY = ("OutOfMemory", "MemoryError", "out of memory", "Died")


@dataclass(frozen=True, kw_only=True)
class TrialRequest:
    """Work for some seconds with micro-batches of at most max_tokens tokens."""

    max_tokens: int
    seconds: float

    def to_record(self) -> RecordDict:
        return RecordDict({"trial": ConfigRecord({"max_tokens": self.max_tokens, "seconds": self.seconds})})

    @classmethod
    def from_record(cls, record: RecordDict) -> "TrialRequest":
        trial = scalars(record, "trial")
        return cls(max_tokens=int(trial["max_tokens"]), seconds=float(trial["seconds"]))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class TrialReply:
    """Tokens worked through, and the seconds that took."""

    tokens: int
    seconds: float

    def to_record(self) -> RecordDict:
        return RecordDict({"trial": ConfigRecord({"tokens": self.tokens, "seconds": self.seconds})})

    @classmethod
    def from_record(cls, record: RecordDict) -> "TrialReply":
        trial = scalars(record, "trial")
        return cls(tokens=int(trial["tokens"]), seconds=float(trial["seconds"]))  # type: ignore[arg-type]


def timed(work: Callable[[int], int], request: TrialRequest) -> TrialReply:
    """The client's half: repeat one micro-batch until the time is up.

    Args:
        work: Does one forward and backward pass of at most that many tokens, waits for the device to finish, and
            returns the number of tokens. Its first call is not counted. May raise an out-of-memory error.
        request: What the server asked for.
    """
    work(request.max_tokens)
    began = time.perf_counter()
    tokens = 0
    while True:
        tokens += work(request.max_tokens)
        seconds = time.perf_counter() - began
        if seconds >= request.seconds:
            return TrialReply(tokens=tokens, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One candidate's outcome.

    Attributes:
        workers: Workers that ran at once.
        max_tokens: Tokens of a micro-batch.
        tokens_per_second: Of all workers together; 0 if it did not fit.
        failure: Why it did not fit, or "".
    """

    workers: int
    max_tokens: int
    tokens_per_second: float
    failure: str = ""


class TrialFailed(Failure):
    """A worker failed in a trial for another reason than memory."""


def try_slices(
    make_grid: Callable[[int], WaitingGrid],
    workers: Iterable[int],
    micro_batches: Iterable[int],
    *,
    seconds: float = 1.0,
    timeout: float = 300.0,
) -> list[Measured]:
    """Measure numbers of workers against micro-batch sizes, from small to large, until more stops paying.

    Larger micro-batches are skipped after one that does not fit. More workers are skipped once a number of workers
    does not fit at all, or is slower than the number before.

    Args:
        make_grid: A grid of so many workers. What it raises (no room, did not start) counts as not fitting.
        workers: Numbers of workers to try.
        micro_batches: Tokens of a micro-batch to try.
        seconds: How long each candidate works.
        timeout: Longest wait for a candidate's answer.

    Returns:
        What was tried, in order.

    Raises:
        TrialFailed: A worker failed for another reason than memory.
    """
    measured: list[Measured] = []
    best_before = 0.0
    sizes = sorted(set(micro_batches))
    for count in sorted(set(workers)):
        rows = _try_workers(make_grid, count, sizes, seconds, timeout)
        measured += rows
        best_here = max(row.tokens_per_second for row in rows)
        if best_here < best_before * (1 + TIE):
            break
        best_before = best_here
    return measured


def _try_workers(
    make_grid: Callable[[int], WaitingGrid], count: int, sizes: Sequence[int], seconds: float, timeout: float
) -> list[Measured]:
    rows: list[Measured] = []
    try:
        with make_grid(count) as grid:
            for max_tokens in sizes:
                rows.append(_try_one(grid, count, max_tokens, seconds, timeout))
                if rows[-1].failure:
                    break
    except (InvalidInput, WorkersDidNotStart) as failure:
        rows.append(Measured(workers=count, max_tokens=sizes[0], tokens_per_second=0.0, failure=str(failure)))
    return rows


def _try_one(grid: WaitingGrid, count: int, max_tokens: int, seconds: float, timeout: float) -> Measured:
    content = TrialRequest(max_tokens=max_tokens, seconds=seconds).to_record()
    messages = [Message(content, node, TRIAL, ttl=timeout) for node in grid.get_node_ids()]
    speed = 0.0
    failure = ""
    for reply in grid.send_and_receive(messages):
        if reply.has_error():
            failure = (reply.error.reason or "no reason given").splitlines()[0]
            if not any(sign in failure for sign in OUT_OF_MEMORY):
                raise TrialFailed(f"a trial of {count} workers and {max_tokens} tokens failed: {reply.error.reason}")
        else:
            speed += _speed_in(reply, count, max_tokens)
    return Measured(workers=count, max_tokens=max_tokens, tokens_per_second=0.0 if failure else speed, failure=failure)


def _speed_in(reply: Message, count: int, max_tokens: int) -> float:
    try:
        answer = TrialReply.from_record(reply.content)
        return answer.tokens / answer.seconds
    except Exception as failure:  # whatever reading it raises
        reason = f"it is no reply ({type(failure).__name__}: {failure})"
        raise TrialFailed(f"a trial of {count} workers and {max_tokens} tokens failed: {reason}") from failure


def fastest(measured: Sequence[Measured]) -> Measured:
    """The candidate of highest throughput; of those within 3 % of it, the one that needs least.

    Raises:
        InvalidInput: None of the candidates fits; says why the smallest did not.
    """
    top = max((row.tokens_per_second for row in measured), default=0.0)
    if top == 0.0:
        smallest = measured[0]
        raise InvalidInput(
            "engine.workers",
            smallest.workers,
            "a number of workers that the device has memory for",
            f"{smallest.workers} workers with micro-batches of {smallest.max_tokens} tokens fail: {smallest.failure}",
        )
    near = [row for row in measured if row.tokens_per_second >= top * (1 - TIE)]
    return min(near, key=lambda row: (row.workers, row.max_tokens))
