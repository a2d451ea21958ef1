"""The cells of the benchmark, each run in a process of its own: `python -m benchmarks.gpu.cells NAME`.

Every finding is a line of JSON on standard output as soon as it is known, so that a cell that is cut short keeps what
it had.
"""

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import round as whole
from benchmarks.gpu.checks import clip_checks
from benchmarks.gpu.measure import Way, kernels_of, measure, seconds
from benchmarks.gpu.steps import (
    Case,
    clipped_step,
    fused_step,
    median_clip,
    padded_batches,
    plain_step,
    ragged_case,
    uniform_case,
)
from benchmarks.gradient_models import SIZES, Size, build

MODELS = ("350m", "1.1b-lora", "7b-lora", "124m")
ROUNDS = "rounds-"
"""What a cell's name begins with that measures whole rounds of the model named after it."""
CELLS = ("ceilings", "clips", "350m", ROUNDS + "350m", *MODELS[1:])
"""In order of worth."""
SMALL_AND_LARGE = {False: (8192, 32768), True: (2048, 8192)}
"""Tokens of the micro-batches that are tried, for models of up to a billion parameters and for wider ones."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cell")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checks", type=int, default=200)
    parser.add_argument("--ways", default="all")
    parser.add_argument("--cases", default="all")
    parser.add_argument("--tables", type=Path, help="folder for tables of kernels")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.cell == "ceilings":
        ceilings(device)
    elif options.cell == "clips":
        clips(device, options.checks)
    elif options.cell.startswith(ROUNDS):
        rounds(options.cell.removeprefix(ROUNDS), device)
    else:
        steps(options.cell, device, options)


def say(**line: object) -> None:
    """One finding."""
    print(json.dumps(line), flush=True)


def ceilings(device: torch.device) -> None:
    """What the device does at most: a copy, counting bytes read and written, and a product of bfloat16."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    values = torch.randn(2**30 if cuda else 2**22, device=device)
    target = torch.empty_like(values)
    copy = min(seconds(partial(target.copy_, values), device) for _ in range(10))
    del target
    n = 8192 if cuda else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = sorted(seconds(lambda: a @ b, device) for _ in range(20))[10]
    say(
        device=name,
        torch=torch.__version__,
        copy_gb_per_second=round(8 * len(values) / copy / 1e9),
        bfloat16_tflops=round(2 * n**3 / product / 1e12, 3),
    )


def clips(device: torch.device, number: int) -> None:
    """The clip checks, summed up."""
    lines = list(clip_checks(device, number))
    failed = [line for line in lines if not line["held"]]
    say(
        checks=len(lines),
        failed=failed[:5],
        number_failed=len(failed),
        largest_reach=float(np.max([line["reach"] for line in lines])),  # nan where one is
        largest_float32_error=max(float(line.get("against_float64", 0)) for line in lines),  # type: ignore[arg-type]
    )


def rounds(name: str, device: torch.device) -> None:
    """Rounds end to end, by phase: one worker in this process, 256 users with a row each in expectation."""
    arguments = ["--size", name, "--engine", "direct", "--rows", "1", "--rounds", "6", "--warm-up", "3"]
    if device.type == "cuda":
        arguments += ["--users", "256", "--precision", "bfloat16"]
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    words, line = whole.rounds(whole.options_of(arguments))
    say(in_words=words, **line)


def steps(name: str, device: torch.device, options: argparse.Namespace) -> None:
    """Every case of one model, every way of doing it."""
    size = SIZES[name]
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    autocast = torch.bfloat16 if device.type == "cuda" else None
    start = time.perf_counter()
    model = build(size, device, False)
    say(model=name, build_seconds=round(time.perf_counter() - start, 1))
    cases = {
        "64x4": uniform_case(size, size.users, 4),
        "64x1": uniform_case(size, size.users, 1),
        "256x1": uniform_case(size, 4 * size.users, 1),
        "ragged": ragged_case(size, size.users),
    }
    compiled = None if options.no_compile or device.type != "cuda" else torch.compile(model, dynamic=False)
    for key, case in cases.items():
        if options.cases != "all" and key not in options.cases.split(","):
            continue
        ways = ways_of(model, compiled if key != "ragged" else None, size, case, device, autocast)
        if options.ways != "all":
            ways = [way for way in ways if way.name in options.ways.split(";")]
        for way in measure(ways, device):
            if way.name in ("ours", "non-private"):
                way.kernels, table = kernels_of(way.step, device)
                if options.tables:
                    write_table(options.tables / f"{name}-{key}-{way.name}.txt", table)
            say(model=name, case=key, tokens=case.tokens, **way.line())


def ways_of(
    model: torch.nn.Module,
    compiled: torch.nn.Module | None,
    size: Size,
    case: Case,
    device: torch.device,
    autocast: torch.dtype | None,
) -> list[Way]:
    """All ways of doing a case's step, at several micro-batches."""
    rows = len(case.rows)
    small, large = SMALL_AND_LARGE[size.width > 2048]
    clip = median_clip(model, case, autocast, small)
    ours = partial(clipped_step, model, case, clip, autocast)
    ways = [Way("loop", 0, partial(ours, "reference", None)), Way("ours, size chosen", 0, partial(ours, "fast", None))]
    for tokens in {min(n, len(case.rows) * size.length): None for n in (large, small)}:
        batches = padded_batches(case, tokens, device)
        if tokens <= small:
            ways.append(Way("ours", tokens, partial(ours, "fast", tokens)))
            ways.append(Way("ours, not compiled", tokens, partial(ours, "fast", tokens, False)))
        ways.append(Way("non-private", tokens, partial(plain_step, model, batches, rows, autocast)))
        ways.append(Way("non-private, fused loss", tokens, partial(fused_step, model, batches, rows, autocast)))
        if compiled is not None and tokens <= small:
            ways.append(Way("non-private, compiled", tokens, partial(plain_step, compiled, batches, rows, autocast)))
    return ways


def write_table(path: Path, table: list[tuple[str, int, float]]) -> None:
    """Kernels by name, the longest first: milliseconds, launches, name; the sum of all above them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{sum(ms for *_, ms in table):10.3f} ms {sum(n for _, n, _ in table):6d}  all kernels"]
    lines += [f"{milliseconds:10.3f} ms {number:6d}  {name[:150]}" for name, number, milliseconds in table[:25]]
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
