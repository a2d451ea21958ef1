"""Time, memory and kernels of a step."""

import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.findings import Findings, in_a_line
from benchmarks.gradient_steps import Step

REPEATS = 5
ENOUGH_SECONDS = 8.0
"""A way that has taken so long altogether is not repeated."""


@dataclass
class Way:
    """One way to do a step, at one size of micro-batch.

    Attributes:
        name: Which way.
        tokens: Of a micro-batch, padding included; 0 where the library chooses.
        step: What is measured.
        seconds: One a repetition.
        peak: Bytes at most above what was there before, the model and its like.
    """

    name: str
    tokens: int
    step: Step
    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def median(self) -> float:
        """Seconds a step."""
        return statistics.median(self.seconds)

    def line(self) -> dict[str, object]:
        """What is kept of it."""
        spread = (max(self.seconds) - min(self.seconds)) / self.median
        return {
            "way": self.name,
            "micro_batch": self.tokens,
            "milliseconds": round(1e3 * self.median, 3),
            "steps": len(self.seconds),
            "spread": round(spread, 3),
            "peak_mib": round(self.peak / 2**20),
        }


def measure(ways: Iterable[Way], device: torch.device, findings: Findings, **about: object) -> list[Way]:
    """Each way once to warm up, once for its memory and once for its time, then all in turns.

    A way is told of as soon as it was timed once, and again at the end: what is cut short has told what it knew. Of a
    way that is tried at several micro-batches only the quickest goes on to be measured. One that fails is told of with
    the reason, and the others go on.

    Args:
        about: What the ways are of; goes into each line.
    """
    best: dict[str, Way] = {}
    for way in ways:
        found = {"way": way.name, "micro_batch": way.tokens}
        if findings.time_is_over():
            findings.say(**about, **found, left_out="no time was left")
        elif reason := _tried(way, device):
            findings.say(**about, **found, left_out=reason)
        else:
            findings.say(**about, **way.line())
            if way.name not in best or way.median < best[way.name].median:
                best[way.name] = way
    once = {way.name: way.seconds.pop() for way in best.values()}
    for _ in range(REPEATS):
        for way in best.values():
            if not findings.time_is_over() and sum(way.seconds) + once[way.name] < ENOUGH_SECONDS:
                way.seconds.append(seconds(way.step, device))
    for way in best.values():
        if len(way.seconds) > 1:
            findings.say(**about, **way.line())
    return list(best.values())


def _tried(way: Way, device: torch.device) -> str | None:
    """Why the way cannot be measured, in words; None where it was, once."""
    start = time.perf_counter()
    try:
        way.step()
        way.peak = peak_memory(way.step, device)
        way.seconds = [seconds(way.step, device)]
        reason = None
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:
        reason = in_a_line(error)
    if reason:  # here what the step held is free again
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    took = time.perf_counter() - start
    what = reason or f"{1e3 * way.seconds[0]:.1f} ms"
    print(f"{way.name} at {way.tokens} tokens: {what}; {took:.1f} s in all", file=sys.stderr, flush=True)
    return reason


def seconds(step: Step, device: torch.device) -> float:
    """Of one step, by the device's own clock where it has one."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def peak_memory(step: Step, device: torch.device) -> int:
    """Bytes at most beyond those held before; 0 on a CPU, where `benchmarks.gradients` measures it."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def kernels_of(step: Step, device: torch.device) -> list[tuple[str, int, float]]:
    """The kernels of a step by name, their number and milliseconds, the longest first; none on a CPU."""
    if device.type != "cuda":
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize(device)
    number: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            number[event.name] += 1
            spent[event.name] += event.device_time
    return [(name, number[name], microseconds / 1e3) for name, microseconds in spent.most_common()]
