"""Slices of a device in the GPU benchmark: processes that work at the same time, and those that fail."""

import json
import multiprocessing
import queue
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import slices
from benchmarks.gpu.cells import CELLS, size_of
from benchmarks.gpu.findings import Findings
from benchmarks.gradient_models import SIZES, Size


def test_slices_of_a_device_work_at_the_same_time(capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes, each with half of the users, and what both did in a second together."""
    known = [
        {"cell": "slices-350m", "started": True, "device": "CPU", "torch": "2"},
        {"cell": "slices-350m", "complete": f"not compiled 2 {slices.LARGEST}"},
    ]
    slices.slices(
        size_of(CELLS["slices-350m"], True)[1],
        torch.device("cpu"),
        Findings("slices-350m", "CPU", 1e9, known),
        counts=(2,),
    )
    line, complete = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["processes"] == 2
    assert line["steps"] >= 2
    assert line["tokens_per_second"] > 0
    assert complete["complete"] == f"not compiled 2 {slices.LARGEST // 2}"


def slice_of(size: Size, number: int = 0, count: int = 1) -> slices.Slice:
    return slices.Slice(size=size, device="cpu", number=number, count=count, max_tokens=64, compiled=False, seconds=0)


def test_slices_share_out_the_users() -> None:
    size = size_of(CELLS["1.1b-lora"], True)[1]
    assert size.users == 4
    shares = [slice_of(size, number, 4).step()[1] for number in range(4)]
    assert shares == [4 * size.length] * 4  # the four rows of one user each


def test_a_slice_is_measured_from_when_all_have_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    monkeypatch.setattr(slices.Slice, "step", lambda asked: (lambda: steps.append("step"), 10))
    answers: queue.Queue[dict[str, Any]] = queue.Queue()
    barrier = SimpleNamespace(wait=lambda: steps.append("wait"))
    slices._work(slice_of(SIZES["tiny"]), barrier, answers)  # type: ignore[arg-type]
    assert steps == ["step", "step", "wait", "step", "step"]
    answer = answers.get_nowait()
    assert (answer["tokens"], answer["steps"]) == (20, 2)


def leave(*_: object) -> None:
    sys.exit(1)


def say_nothing(*_: object) -> None:
    return


@pytest.mark.parametrize(
    ("work", "seconds", "reason"),
    [(leave, 60, "a process ended with exit code 1"), (say_nothing, 1, "no time was left")],
)
def test_a_slice_that_does_not_answer_is_left_out(work: Any, seconds: float, reason: str) -> None:
    assert slices.together([slice_of(SIZES["tiny"])], seconds, work=work) == {"left_out": reason}


@pytest.mark.parametrize(
    ("error", "told"), [(torch.OutOfMemoryError(), "out of memory"), (ValueError("no\nway"), "ValueError: no")]
)
def test_a_slice_that_fails_says_why(error: Exception, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    answers: queue.Queue[dict[str, Any]] = queue.Queue()
    monkeypatch.setattr(slices, "build", fail)
    slices._work(slice_of(SIZES["tiny"]), multiprocessing.get_context("spawn").Barrier(1), answers)
    assert slices._next(answers, [], time.monotonic() + 1)[0] == told
