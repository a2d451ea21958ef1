"""What the device does at most, and whether the clip holds on it."""

import copy
import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.measure import seconds
from benchmarks.gradient_models import Size, build
from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, ClippedSum, clipped_sum
from fedsim.rows import TokenRows

SHAPES = (
    Size(kind="gpt2", width=64, layers=2, heads=4, vocabulary=509, length=64),
    Size(kind="gpt2", width=192, layers=2, heads=4, vocabulary=128, length=256),
    Size(kind="llama-lora", width=64, layers=2, heads=4, vocabulary=512, length=64, intermediate=160, rank=4),
    Size(
        kind="llama-lora", width=128, layers=1, heads=4, vocabulary=512, length=128, intermediate=256, rank=16,
        base=torch.bfloat16,
    ),
)  # fmt: skip
"""Between them: tied and untied heads, gradients held and not, Gram norms and direct ones, adapters on either base."""
TOLD_EVERY = 20
"""Checks: a cell that is cut short keeps those that it had time for."""


def ceilings(device: torch.device, findings: Findings) -> None:
    """A copy, counting bytes read and written, and a product of bfloat16."""
    cuda = device.type == "cuda"
    values = torch.randn(2**30 if cuda else 2**22, device=device)
    target = torch.empty_like(values)
    copy_seconds = min(seconds(partial(target.copy_, values), device) for _ in range(10))
    del target
    n = 8192 if cuda else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = sorted(seconds(lambda: a @ b, device) for _ in range(20))[10]
    findings.say(
        copy_gb_per_second=round(8 * len(values) / copy_seconds / 1e9),
        bfloat16_tflops=round(2 * n**3 / product / 1e12, 3),
        product_size=n,
    )


def clips(device: torch.device, findings: Findings, number: int) -> None:
    """The clip checks, as many as the time allows, summed up every now and then."""
    lines: list[dict[str, object]] = []
    for line in clip_checks(device, number):
        lines.append(line)
        if len(lines) == number or findings.time_is_over():
            break
        if len(lines) % TOLD_EVERY == 0:
            findings.say(**_summed_up(lines, number))
    findings.say(**_summed_up(lines, number))


def _summed_up(lines: list[dict[str, object]], asked: int) -> dict[str, object]:
    failed = [line for line in lines if not line["held"]]
    errors = [float(line["against_float64"]) for line in lines if "against_float64" in line]  # type: ignore[arg-type]
    return {
        "checks": len(lines),
        "asked": asked,
        "failed": failed[:5],
        "number_failed": len(failed),
        "largest_reach": float(np.max([line["reach"] for line in lines])),  # nan where one is
        "against_float64": len(errors),
        "largest_float32_error": float(np.max(errors)) if errors else None,
    }


def clip_checks(device: torch.device, number: int) -> Iterator[dict[str, object]]:
    """`number` checks on random ragged units, half of them each in float32 and in bfloat16.

    In float32 the sum is compared with that of float64 on the CPU. In either, copies of one unit are added up: their
    sum, its norm taken in float64, must reach no further than so many clip norms, and fall short of it by no more than
    the margin and, in bfloat16, the rounding of the factor. Every twentieth takes a compiled pass.
    """
    models = [build(size, device, False) for size in SHAPES]
    for i in range(number):
        kind, half = i // 2 % len(SHAPES), bool(i % 2)
        size, model = SHAPES[kind], models[kind]
        rng = np.random.default_rng(1000 + i)
        autocast = torch.bfloat16 if half else None
        rows, ids = _units(size, rng, int(rng.integers(2, 9)))
        share = float(rng.uniform(0.05, 0.9))
        norms = _sum(model, rows, ids, Clip(norm=1e9), autocast).norms
        clip = Clip(norm=float(norms.quantile(share)) * (1 + 1e-3))
        compiled = i % 20 == 9 and device.type == "cuda"
        line: dict[str, object] = {"check": i, "shape": f"{size.kind} {size.width}", "bfloat16": half}
        if not half and size.base == torch.float32:
            line["against_float64"] = _against_float64(model, rows, ids, clip)
        line |= _copies(model, rows, ids, Clip(norm=float(norms.max()) * share), autocast, compiled)
        line["held"] = line["reach"] <= 1 and line["reach"] > 1 - 2**-7 and line.get("against_float64", 0) < 1e-5  # type: ignore[operator]
        yield line


def _units(size: Size, rng: np.random.Generator, units: int) -> tuple[TokenRows, np.ndarray]:
    counts = rng.integers(1, 6, units)
    lengths = rng.integers(2, size.length + 1, counts.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    few = int(rng.choice([2, size.vocabulary]))  # tokens said over and over cancel and add up most
    return TokenRows(tokens=rng.integers(0, few, offsets[-1]), offsets=offsets), np.repeat(np.arange(units), counts)


def _sum(
    model: torch.nn.Module,
    rows: TokenRows,
    ids: np.ndarray,
    clip: Clip,
    autocast: torch.dtype | None,
    method: str = "fast",
    compiled: bool = False,
) -> ClippedSum:
    return clipped_sum(
        model, rows, ids, clip, objective=CausalLanguageModel(), method=method, autocast=autocast, compiled=compiled  # type: ignore[arg-type]
    )  # fmt: skip


def _against_float64(model: torch.nn.Module, rows: TokenRows, ids: np.ndarray, clip: Clip) -> float:
    """‖sum − reference‖ / ‖reference‖."""
    ours = _sum(model, rows, ids, clip, None).total.cpu().double()
    exact = _sum(copy.deepcopy(model).double().cpu(), rows, ids, clip, None, "reference").total
    return float((ours - exact).norm() / exact.norm())


def _copies(
    model: torch.nn.Module,
    rows: TokenRows,
    ids: np.ndarray,
    clip: Clip,
    autocast: torch.dtype | None,
    compiled: bool = False,
) -> dict[str, object]:
    """How far copies of the unit of largest norm reach, in clip norms a copy."""
    norms = _sum(model, rows, ids, clip, autocast, compiled=compiled).norms
    unit = np.flatnonzero(ids == int(norms.argmax()))
    copies = 3
    repeated = rows.take(np.tile(unit, copies))
    whose = np.repeat(np.arange(copies), len(unit))
    together = _sum(model, repeated, whose, clip, autocast, compiled=compiled)
    clipped = bool((together.norms > clip.norm).all())
    reach = float(together.total.double().norm()) / (copies * clip.norm)
    return {"reach": reach if clipped and math.isfinite(reach) else float("nan")}
