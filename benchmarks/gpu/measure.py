"""Time, memory and kernels of a step."""

import gc
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.steps import Step, out_of_memory


@dataclass
class Way:
    """One way to do a step, at one size of micro-batch.

    Attributes:
        name: Which way.
        tokens: Of a micro-batch, padding included.
        step: What is measured.
        seconds: One a repetition.
        peak: Bytes at most above what was there before, the model and its like.
        kernels: Launched by one step; None where they were not counted.
    """

    name: str
    tokens: int
    step: Step
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    kernels: int | None = None

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
            "spread": round(spread, 3),
            "peak_mib": round(self.peak / 2**20),
            "kernels": self.kernels,
        }


def measure(ways: list[Way], device: torch.device, repeats: int = 5) -> list[Way]:
    """Each way once to warm up and once for its memory, then all in turns; a way without enough memory is left out.

    Of a way that was tried at several micro-batches only the quickest of the warm repetition goes on to be measured.
    """
    tried: dict[str, tuple[float, Way]] = {}
    for way in ways:
        start = time.perf_counter()
        if out_of_memory(way.step):
            _tell(f"{way.name} at {way.tokens} tokens: out of memory")
            continue
        way.peak = peak_memory(way.step, device)
        quick = seconds(way.step, device)
        _tell(f"{way.name} at {way.tokens} tokens: {1e3 * quick:.1f} ms, {time.perf_counter() - start:.1f} s in all")
        if way.name not in tried or quick < tried[way.name][0]:
            tried[way.name] = (quick, way)
    best = [way for _, way in tried.values()]
    for _ in range(repeats):
        for way in best:
            way.seconds.append(seconds(way.step, device))
    return best


def _tell(line: str) -> None:
    """Progress, beside the findings."""
    print(line, file=sys.stderr, flush=True)


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
        step()
        return 0
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def kernels_of(step: Step, device: torch.device) -> tuple[int, list[tuple[str, int, float]]]:
    """How many kernels a step launches, and by name their number and milliseconds, the longest first."""
    if device.type != "cuda":
        return 0, []
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize(device)
    number: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            number[event.name] += 1
            spent[event.name] += event.device_time
    table = [(name, number[name], microseconds / 1e3) for name, microseconds in spent.most_common()]
    return sum(number.values()), table
