"""Finding workers and micro-batch by trial, on fake devices whose speed and memory are known."""

import time

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim.engine.local import LocalGrid
from fedsim.engine.slices import Measured, TrialFailed, TrialReply, TrialRequest, fastest, timed, try_slices
from fedsim.errors import InvalidInput


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def device(memory: int, best_workers: int, best_tokens: int, workers: int) -> ClientApp:
    """A device that holds `memory` tokens, is fastest with so many workers, and gains nothing beyond best_tokens."""
    app = ClientApp()

    @app.query("trial")
    def trial(message: Message, context: Context) -> Message:
        request = TrialRequest.from_record(message.content)
        if workers * request.max_tokens > memory:
            raise OutOfMemoryError("device out of memory")
        together = min(workers, best_workers) - 0.1 * max(0, workers - best_workers)
        tokens = int(1e6 * together / workers * min(request.max_tokens, best_tokens))
        return Message(TrialReply(tokens=tokens, seconds=1.0).to_record(), reply_to=message)

    return app


def tried(memory: int, best_workers: int, best_tokens: int, counts: tuple[int, ...] = (1, 2, 4, 8)) -> list[Measured]:
    return try_slices(
        lambda count: LocalGrid(device(memory, best_workers, best_tokens, count), workers=count),
        counts,
        (256, 512, 1024),
    )


@pytest.mark.parametrize(
    ("memory", "best_workers", "best_tokens", "chosen"),
    [
        (10**6, 2, 512, (2, 512)),
        (10**6, 1, 256, (1, 256)),
        (10**6, 8, 1024, (8, 1024)),
        (1500, 8, 1024, (1, 1024)),
        (1100, 8, 256, (4, 256)),
    ],
)
def test_the_fastest_that_fits_is_chosen(
    memory: int, best_workers: int, best_tokens: int, chosen: tuple[int, int]
) -> None:
    best = fastest(tried(memory, best_workers, best_tokens))
    assert (best.workers, best.max_tokens) == chosen


def test_the_trial_stops_where_more_does_not_pay_or_fit() -> None:
    assert max(row.workers for row in tried(10**6, 2, 512)) == 4
    rows = tried(700, 8, 256)
    assert [(row.workers, row.max_tokens) for row in rows if row.failure] == [(1, 1024), (2, 512), (4, 256)]
    assert max(row.workers for row in rows) == 4


def test_nothing_fits_is_an_error_that_says_why() -> None:
    with pytest.raises(InvalidInput, match=r"engine.workers is 1.*256 tokens fail: OutOfMemoryError"):
        fastest(tried(100, 2, 512))


def test_another_failure_than_memory_ends_the_trial() -> None:
    app = ClientApp()

    @app.query("trial")
    def trial(message: Message, context: Context) -> Message:
        raise KeyError("a bug")

    with pytest.raises(TrialFailed, match="a bug"):
        try_slices(lambda count: LocalGrid(app, workers=count), [1], [256])


@pytest.mark.parametrize("seconds", [0.0, None])
def test_an_answer_that_gives_no_speed_ends_the_trial(seconds: float | None) -> None:
    app = ClientApp()

    @app.query("trial")
    def trial(message: Message, context: Context) -> Message:
        said = RecordDict() if seconds is None else TrialReply(tokens=1, seconds=seconds).to_record()
        return Message(said, reply_to=message)

    with pytest.raises(TrialFailed, match=r"1 workers and 256 tokens failed: it is no reply \("):
        try_slices(lambda count: LocalGrid(app, workers=count), [1], [256])


def test_a_grid_that_has_no_room_counts_as_not_fitting() -> None:
    def make_grid(count: int) -> LocalGrid:
        if count > 2:
            raise InvalidInput("engine.workers", count, "at most 2")
        return LocalGrid(device(10**6, 8, 512, count), workers=count)

    rows = try_slices(make_grid, [1, 2, 4, 8], [512])
    assert [row.workers for row in rows] == [1, 2, 4]
    assert fastest(rows).workers == 2


def test_timed_counts_tokens_and_leaves_out_the_first_call() -> None:
    calls = []

    def work(max_tokens: int) -> int:
        calls.append(max_tokens)
        time.sleep(0.05 if len(calls) == 1 else 0.001)
        return max_tokens

    reply = timed(work, TrialRequest(max_tokens=64, seconds=0.02))
    assert reply.tokens == 64 * (len(calls) - 1)
    assert 0.02 <= reply.seconds < 0.05


def test_real_work_on_this_device() -> None:
    app = ClientApp()
    weights = np.ones((64, 64), dtype=np.float32)

    @app.query("trial")
    def trial(message: Message, context: Context) -> Message:
        def work(max_tokens: int) -> int:
            np.ones((max_tokens, 64), dtype=np.float32) @ weights
            return max_tokens

        return Message(timed(work, TrialRequest.from_record(message.content)).to_record(), reply_to=message)

    best = fastest(try_slices(lambda count: LocalGrid(app, workers=count), [1], [8, 512], seconds=0.02))
    assert best.tokens_per_second > 0
