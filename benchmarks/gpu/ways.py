"""The steps of one model: every case, in every way, at several micro-batches."""

import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.findings import Absent, Findings, in_a_line
from benchmarks.gpu.measure import Way, kernels_of, measure
from benchmarks.gradient_models import Size, build
from benchmarks.gradient_rivals import OpacusStep, find_opacus
from benchmarks.gradient_steps import (
    Case,
    alike_batches,
    clipped_step,
    fused_step,
    median_clip,
    padded_batches,
    plain_step,
    ragged_case,
    uniform_case,
    unit_batches,
)
from fedsim.clip import Clip

SMALL_AND_LARGE = {False: (8192, 32768), True: (2048, 8192)}
"""Tokens of the micro-batches that are tried, for models of up to a billion parameters and for wider ones."""
OF_OPACUS = {False: (1024, 4096), True: (512, 2048)}
"""The same for Opacus, which holds gradients of every row or the activations of two passes."""
PROFILED = ("ours", "non-private")


def cases_of(size: Size) -> dict[str, Case]:
    """By name, in order of worth: units x rows of each; ragged ones have up to so many, of all lengths."""
    users = size.users
    return {
        f"{users}x4": uniform_case(size, users, 4),
        f"ragged-{users}x16": ragged_case(size, users, 16),
        f"{4 * users}x1": uniform_case(size, 4 * users, 1),
        f"{users}x1": uniform_case(size, users, 1),
        f"ragged-{4 * users}x1": ragged_case(size, 4 * users, 1),
        f"ragged-{users}x1": ragged_case(size, users, 1),
    }


@dataclass
class Setting:
    """What all steps of a model have in common.

    Attributes:
        size: Its shape.
        device: Where it is.
        checkpointing: Whether activations are computed again in the backward pass.
        compiling: Whether the step without privacy is compiled too.
    """

    size: Size
    device: torch.device
    checkpointing: bool = False
    compiling: bool = True

    @cached_property
    def model(self) -> torch.nn.Module:
        """Built when first asked for."""
        return build(self.size, self.device, self.checkpointing)

    @cached_property
    def compiled(self) -> torch.nn.Module:
        """The same model, which an ordinary step runs compiled."""
        compiled: torch.nn.Module = torch.compile(self.model, dynamic=False)
        return compiled

    @property
    def autocast(self) -> torch.dtype | None:
        """bfloat16 on a GPU."""
        return torch.bfloat16 if self.device.type == "cuda" else None

    @property
    def micro_batches(self) -> tuple[int, int]:
        """Small and large, in tokens."""
        return SMALL_AND_LARGE[self.size.width > 2048]


class Problem:
    """A case of a setting: its steps, each of which gets what it needs when it is first taken."""

    def __init__(self, setting: Setting, case: Case) -> None:
        self.setting, self.case = setting, case
        self._kept: dict[tuple[Callable[..., Any], int], Any] = {}

    @cached_property
    def clip(self) -> Clip:
        """One that bites for half of the units."""
        return median_clip(self.setting.model, self.case, self.setting.autocast, self.setting.micro_batches[0])

    @property
    def fitting(self) -> tuple[int, int]:
        """The small and the large micro-batch, no larger than the case with its rows padded to the longest."""
        whole = len(self.case.rows) * int(self.case.rows.lengths.max())
        small, large = (min(tokens, whole) for tokens in self.setting.micro_batches)
        return small, large

    def ours(self, tokens: int | None, method: str = "fast", compiled: bool | None = None) -> object:
        setting = self.setting
        return clipped_step(setting.model, self.case, self.clip, setting.autocast, method, tokens, compiled)

    def plain(self, tokens: int) -> None:
        setting, batches = self.setting, self._batches(padded_batches, tokens)
        plain_step(setting.model, batches, len(self.case.rows), setting.autocast)

    def fused(self, tokens: int) -> None:
        setting, batches = self.setting, self._batches(padded_batches, tokens)
        fused_step(setting.model, batches, len(self.case.rows), setting.autocast)

    def compiled(self, tokens: int) -> None:
        setting, batches = self.setting, self._batches(alike_batches, tokens)
        plain_step(setting.compiled, batches, len(self.case.rows), setting.autocast)

    def opacus(self, opened: Callable[[], OpacusStep], tokens: int) -> object:
        return opened()(self._batches(unit_batches, tokens), self.clip.norm, self.setting.autocast)

    def _batches(self, make: Callable[..., Any], tokens: int) -> Any:
        """Micro-batches, on the device from the first step on."""
        if (make, tokens) not in self._kept:
            self._kept[make, tokens] = make(self.case, tokens, self.setting.device)
        return self._kept[make, tokens]


def nearest(problem: Problem) -> Iterator[Way]:
    """Ours at the small micro-batch, and what it is held against."""
    small, large = problem.fitting
    yield Way("ours", small, partial(problem.ours, small))
    yield Way("non-private", small, partial(problem.plain, small))
    if problem.setting.compiling:
        yield Way("non-private, compiled", small, partial(problem.compiled, small))
    yield Way("non-private, fused loss", small, partial(problem.fused, small))
    yield Way("ours, not compiled", small, partial(problem.ours, small, compiled=False))
    if large > small:
        yield Way("non-private", large, partial(problem.plain, large))
        yield Way("non-private, fused loss", large, partial(problem.fused, large))


def rivals(problem: Problem) -> Iterator[Way]:
    """The loop over users, and Opacus, which has a model of its own as long as it is measured."""
    yield Way("loop", 0, partial(problem.ours, None, "reference"))
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus's own hooks
    for mode in ("per-sample", "ghost"):
        opened = cache(partial(_opacus, problem.setting, mode))
        for tokens in OF_OPACUS[problem.setting.size.width > 2048]:
            yield Way(f"opacus {mode}", tokens, partial(problem.opacus, opened, tokens))


def further(problem: Problem) -> Iterator[Way]:
    """What is compiled, at the large micro-batch and at that of the library's choice: a minute of compilation each."""
    small, large = problem.fitting
    if large > small:
        yield Way("ours", large, partial(problem.ours, large))
        yield Way("ours, not compiled", large, partial(problem.ours, large, compiled=False))
        if problem.setting.compiling:
            yield Way("non-private, compiled", large, partial(problem.compiled, large))
    yield Way("ours, size chosen", 0, partial(problem.ours, None))


TURNS = {"nearest": nearest, "rivals": rivals, "further": further}
"""Ways that are measured in turns, in order of worth."""


def steps(setting: Setting, findings: Findings, cases: str, ways: str, tables: Path | None) -> None:
    """Every way of every case, the most telling first.

    Args:
        cases, ways: Names, between commas and between semicolons; all where empty.
        tables: Folder for tables of kernels.
    """
    problems = {
        name: Problem(setting, case)
        for name, case in cases_of(setting.size).items()
        if not cases or name in cases.split(",")
    }
    for turn, ways_of in TURNS.items():
        for name, problem in problems.items():
            part = f"{name} {turn}"
            if findings.is_complete(part) or findings.time_is_over():
                continue
            asked = (way for way in ways_of(problem) if not ways or way.name in ways.split(";"))
            measured = measure(asked, setting.device, findings, case=name, tokens=problem.case.tokens)
            if turn == "nearest" and not findings.time_is_over():
                _profile(measured, setting, findings, name, tables)
            if not ways:
                findings.complete(part)
            del measured
            gc.collect()


def _profile(ways: list[Way], setting: Setting, findings: Findings, case: str, tables: Path | None) -> None:
    """How many kernels a step launches, and a table of them."""
    for way in ways:
        if way.name in PROFILED and setting.device.type == "cuda":
            try:
                table = kernels_of(way.step, setting.device)
            except Exception as error:
                findings.say(case=case, way=way.name, micro_batch=way.tokens, left_out=f"kernels: {in_a_line(error)}")
                continue
            findings.say(case=case, kernels_of=way.name, kernels=sum(number for _, number, _ in table))
            if tables:
                _write_table(tables / f"{findings.cell}-{case}-{way.name}.txt", table)


def _write_table(path: Path, table: list[tuple[str, int, float]]) -> None:
    """Kernels by name, the longest first: milliseconds, launches, name; the sum of all above them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{sum(ms for *_, ms in table):10.3f} ms {sum(n for _, n, _ in table):6d}  all kernels"]
    lines += [f"{milliseconds:10.3f} ms {number:6d}  {name[:150]}" for name, number, milliseconds in table[:25]]
    path.write_text("\n".join(lines) + "\n")


def _opacus(setting: Setting, mode: str) -> OpacusStep:
    if not find_opacus(install=False):
        raise Absent("opacus is not installed here; --packages names a folder with it")
    return OpacusStep(build(setting.size, setting.device, False, linear_layers=True), mode)
