"""Fractions of a device: the clipped sum by one process and by several on the same device."""

import multiprocessing
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

import torch

from benchmarks.gpu.findings import Findings, in_a_line
from benchmarks.gradient_models import Size, build
from benchmarks.gradient_steps import Case, clipped_step, median_clip, uniform_case

COUNTS = (1, 2, 4)
MEASURED_SECONDS = 5.0
LARGEST = 8192
"""Tokens of a micro-batch of the one process that has the device to itself."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What each of several processes does.

    Attributes:
        size: The model.
        device: Where all of them are.
        number: Which of them it is.
        count: How many they are.
        max_tokens: Of a micro-batch.
        compiled: As of `clipped_sum`.
        seconds: For which it repeats its step.
    """

    size: Size
    device: str
    number: int
    count: int
    max_tokens: int
    compiled: bool | None
    seconds: float

    def step(self) -> tuple[Callable[[], object], int]:
        """The clipped sum of this process's share of the users, and its tokens."""
        device = torch.device(self.device)
        model = build(self.size, device, False)
        autocast = torch.bfloat16 if device.type == "cuda" else None
        whole = uniform_case(self.size, self.size.users, 4)
        rows = (whole.unit_ids % self.count == self.number).nonzero()[0]
        case = Case(rows=whole.rows.take(rows), unit_ids=whole.unit_ids[rows] // self.count)
        clip = median_clip(model, case, autocast, self.max_tokens)
        return lambda: clipped_step(model, case, clip, autocast, "fast", self.max_tokens, self.compiled), case.tokens


def slices(size: Size, device: torch.device, findings: Findings, counts: tuple[int, ...] = COUNTS) -> None:
    """One process and several, at the micro-batch of one and at that which takes as much memory altogether.

    First as the passes are without compilation, which each process would pay for, then as they come.
    """
    ways: dict[str, bool | None] = {"not compiled": False}
    if device.type == "cuda":
        ways["as it comes"] = None
    for way, compiled in ways.items():
        for count in counts:
            for tokens in sorted({LARGEST, LARGEST // count}):
                part = f"{way} {count} {tokens}"
                if findings.is_complete(part) or findings.time_is_over():
                    continue
                about = {"processes": count, "micro_batch": tokens, "slice_way": way}
                asked = [
                    Slice(
                        size=size, device=str(device), number=number, count=count, max_tokens=tokens,
                        compiled=compiled, seconds=MEASURED_SECONDS if device.type == "cuda" else 0.2,
                    )
                    for number in range(count)
                ]  # fmt: skip
                findings.say(**about, **together(asked, findings.left()))
                findings.complete(part)


def together(asked: list[Slice], seconds: float, work: Callable[..., None] | None = None) -> dict[str, object]:
    """What the processes did together: tokens a second, or why there is no such figure.

    Args:
        asked: One a process; they begin to be measured when all have warmed up.
        seconds: To wait for them.
        work: What a process does, `_work` by default.
    """
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(len(asked)), context.Queue()
    processes = [context.Process(target=work or _work, args=(one, barrier, answers), daemon=True) for one in asked]
    for process in processes:
        process.start()
    end, found = time.monotonic() + seconds, []
    try:
        while len(found) < len(asked):
            reason, answer = _next(answers, processes, end)
            if reason:
                return {"left_out": reason}
            found.append(answer)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return {
        "tokens_per_second": round(sum(one["tokens"] / one["seconds"] for one in found)),
        "peak_mib": round(sum(one["peak"] for one in found) / 2**20),
        "steps": min(one["steps"] for one in found),
    }


def _next(answers: Any, processes: list[Any], end: float) -> tuple[str | None, dict[str, Any]]:
    """The next answer, or in words why none comes."""
    while time.monotonic() < end:
        dead = [process.exitcode for process in processes if process.exitcode not in (None, 0)]
        try:
            answer: dict[str, Any] = answers.get(timeout=0.2)
        except queue.Empty:
            if dead:
                return f"a process ended with exit code {dead[0]}", {}
            continue
        return answer.get("failed"), answer
    return "no time was left", {}


def _work(asked: Slice, barrier: Barrier, answers: Any) -> None:
    """One process: warm up, wait for the others, repeat the step."""
    try:
        step, tokens = asked.step()
        for _ in range(2):
            step()
        _wait(asked.device)
        barrier.wait()
        began, steps = time.monotonic(), 0
        while steps < 2 or time.monotonic() - began < asked.seconds:
            step()
            _wait(asked.device)
            steps += 1
        took = time.monotonic() - began
    except torch.OutOfMemoryError:
        answers.put({"failed": "out of memory"})
    except Exception as error:
        answers.put({"failed": in_a_line(error)})
    else:
        peak = torch.cuda.max_memory_allocated() if asked.device.startswith("cuda") else 0
        answers.put({"tokens": steps * tokens, "seconds": took, "steps": steps, "peak": peak})


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
