"""Cost of the clipped sum against training without privacy and against its rivals: `python -m benchmarks.gradients`.

Needs torch and transformers (peft for LoRA) and nothing else, so that it runs unchanged on a bare GPU machine. Every
way of doing the step runs in one process, in turns, each at the best of several micro-batch sizes; times are medians.
The last line is one JSON object with every ratio by name: "time" and "memory" ratios are ours over the other's (below
1.5 is the aim), "speedup" is the other's time over ours.
"""

import argparse
import ctypes
import gc
import json
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks.gradient_models import SIZES, Size, build
from benchmarks.gradient_rivals import OpacusStep, find_opacus
from benchmarks.gradient_steps import (
    Case,
    Step,
    clipped_step,
    fused_step,
    median_clip,
    padded_batches,
    plain_step,
    ragged_case,
    uniform_case,
    unit_batches,
)
from fedsim.gradients import layer_paths

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Way:
    """One way to do the step, at one micro-batch size."""

    name: str
    step: Step
    times: list[float] = field(default_factory=list)
    memory: float = 0.0

    @property
    def time(self) -> float:
        return statistics.median(self.times) if self.times else float("inf")


def main() -> None:
    options = _options()
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus's own hooks
    device = torch.device(options.device)
    size = SIZES[options.size]
    autocast = torch.bfloat16 if options.autocast == "bf16" else None
    opacus = options.opacus != "off" and find_opacus(install=options.opacus == "auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{options.size} on {name}, torch {torch.__version__}, autocast {options.autocast}, clock {options.clock}")
    if not opacus:
        print("Opacus is not there: its ratios are left out.")
    users = options.users or size.users
    ratios: dict[str, float] = {}
    for case, units, most in (
        ("els", 4 * users, 1), ("uls_4_rows", users, 4), ("uls_1_row", users, 1), ("els_ragged", 4 * users, 1),
        ("uls_ragged", users, 16),
    ):  # fmt: skip
        if case in options.cases.split(","):
            drawn = (ragged_case if "ragged" in case else uniform_case)(size, units, most)
            measured = measure(case, drawn, size, device, autocast, opacus, options)
            ratios.update({f"{options.size}.{case}.{key}": value for key, value in measured.items()})
    print(json.dumps(ratios))


def measure(
    name: str,
    case: Case,
    size: Size,
    device: torch.device,
    autocast: torch.dtype | None,
    opacus: bool,
    options: argparse.Namespace,
) -> dict[str, float]:
    """Times and memory of every way for one case; prints a table and returns the ratios."""
    model = build(size, device, options.checkpointing)
    # A clip that bites for about half of the units, as a tuned one does.
    clip = median_clip(model, case.of_units(4), autocast, None)

    ours = partial(clipped_step, model, case, clip, autocast)
    number = len(case.rows)
    wanted = map(int, options.micro_batches.split(","))
    sizes = [n for n in wanted if n <= number and (n % case.most_rows == 0 or not case.even)]
    ways = [Way("fast", partial(ours, "fast", options.max_tokens)), Way("loop", partial(ours, "reference", None))]
    for n in sizes:
        batches = padded_batches(case, n * size.length, device)
        ways.append(Way(f"non-private/{n}", partial(plain_step, model, batches, number, autocast)))
        ways.append(Way(f"non-private, fused loss/{n}", partial(fused_step, model, batches, number, autocast)))
    if opacus:
        for mode in ("per-sample", "ghost"):
            step = OpacusStep(build(size, device, False, linear_layers=True), mode)
            for n in sizes:
                units = unit_batches(case, n * size.length, device)
                ways.append(Way(f"opacus {mode}/{n}", partial(step, units, clip.norm, autocast)))
    run(ways, device, options.repeats, CLOCKS[options.clock])

    up_to = "" if case.even else "up to "
    what = f"{case.units} units of {up_to}{case.most_rows} rows of {up_to}{size.length} tokens"
    print(f"\n{name}: {what}, {case.tokens} tokens a step")
    for way in ways:
        print(f"  {way.name:32s} {case.tokens / way.time:12,.0f} tokens/s {way.memory / 2**20:10,.0f} MiB")
    for path in sorted(set(layer_paths(model).values())):
        layers = [name for name, value in layer_paths(model).items() if value == path]
        print(f"  {path}: {len(layers)} parameters, {', '.join(layers[:3])}{' …' if len(layers) > 3 else ''}")
    return _ratios(ways, case.tokens)


def run(ways: list[Way], device: torch.device, repeats: int, clock: Callable[[], float]) -> None:
    """Every way once to warm up and measure memory, then in turns; a way that runs out of memory drops out."""
    for way in ways:
        try:
            way.memory = peak_memory(way.step, device)
        except torch.OutOfMemoryError:
            way.step = None  # type: ignore[assignment]
            print(f"  {way.name}: out of memory")
    ways[:] = [way for way in ways if way.step is not None]
    for _ in range(repeats):
        for way in ways:
            _synchronize(device)
            start = clock()
            way.step()
            _synchronize(device)
            way.times.append(clock() - start)


def peak_memory(step: Step, device: torch.device) -> float:
    """Bytes that a step needs at most, the model included on a GPU, beyond what the process had on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return float(torch.cuda.max_memory_allocated(device))
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # else memory that an earlier step freed would hide this one's
    start, peak, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        step()
    finally:
        done.set()
        watcher.join()
    return float(max(0, peak - start))


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ratios(ways: list[Way], tokens: int) -> dict[str, float]:
    """Our time and memory over those of the best of each other way."""

    def best(prefix: str) -> Way | None:
        found = [way for way in ways if way.name == prefix or way.name.startswith(prefix + "/")]
        return min(found, key=lambda way: way.time, default=None)

    fast = best("fast")
    assert fast is not None
    ratios = {"tokens_per_second": tokens / fast.time}
    for name, key in (("non-private", "nonprivate"), ("non-private, fused loss", "nonprivate_fused")):
        other = best(name)
        if other is not None:
            ratios[f"time_over_{key}"] = fast.time / other.time
            if other.memory and fast.memory:
                ratios[f"memory_over_{key}"] = fast.memory / other.memory
    for name, key in (("loop", "loop"), ("opacus per-sample", "opacus_per_sample"), ("opacus ghost", "opacus_ghost")):
        other = best(name)
        if other is not None:
            ratios[f"speedup_over_{key}"] = other.time / fast.time
            if other.memory and fast.memory and key == "loop":
                ratios[f"memory_over_{key}"] = fast.memory / other.memory
    for key, value in ratios.items():
        print(f"  {key:32s} {value:10.2f}")
    return {key: round(value, 4) for key, value in ratios.items()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--autocast", choices=["bf16", "none"], default="bf16" if cuda else "none")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--users", type=int, help="users of the ULS cases; ELS has four times as many examples")
    parser.add_argument("--cases", default="els,uls_4_rows,uls_1_row,els_ragged,uls_ragged")
    parser.add_argument(
        "--micro-batches", default="16,32,64,256" if cuda else "4,8,16,32", help="rows, for the rivals"
    )
    parser.add_argument("--max-tokens", type=int, help="of our micro-batches; chosen by device and model by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a shared machine")
    parser.add_argument("--opacus", choices=["auto", "present", "off"], default="auto", help="auto installs it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
