"""The benchmark's picture: a panel for each model's steps, one for rounds by phase, one for slices of the device."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.gpu.cells import CELLS
from benchmarks.gpu.findings import Line
from benchmarks.gpu.page import BASELINE, best_ways, slices_found
from fedsim.phases import PHASES

COLOURS = {
    "ours": "#1b6ca8", "ours, size chosen": "#4f9bd1", "ours, not compiled": "#9cc9ea", "loop": "#7a7a7a",
    BASELINE: "#d9822b", "non-private, fused loss": "#efb366", "non-private, compiled": "#b3541e",
    "opacus per-sample": "#6a9c5b", "opacus ghost": "#a9cf9c",
}  # fmt: skip
"""Of the ways, in the order of their bars."""
Draw = Callable[[Any], None]


def plot(by_cell: dict[str, list[Line]], path: Path) -> bool:
    """Draw what there is; False if there is nothing."""
    panels = _panels(by_cell)
    if not panels:
        return False
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(10, 0.7 + 2.6 * len(panels)), dpi=120, layout="constrained", squeeze=False
    )
    for draw, ax in zip(panels, axes[:, 0], strict=True):
        draw(ax)
        ax.spines[["top", "right"]].set_visible(False)
    shown = [way for way in COLOURS if any(line.get("way") == way for lines in by_cell.values() for line in lines)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[way]) for way in shown]
    figure.legend(handles, shown, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path)
    plt.close(figure)
    return True


def _panels(by_cell: dict[str, list[Line]]) -> list[Draw]:
    panels: list[Draw] = []
    for name, cell in CELLS.items():
        times = best_ways(by_cell.get(name, ())) if cell.kind == "steps" else {}
        if any(way == BASELINE for _, way in times):
            panels.append(partial(_steps, name=name, times=times))
    rounds = {
        name: [line for line in by_cell.get(name, ()) if "in_words" in line][-1:]
        for name, cell in CELLS.items()
        if cell.kind == "rounds"
    }
    if any(rounds.values()):
        panels.append(partial(_rounds, rounds={name: lines[0] for name, lines in rounds.items() if lines}))
    for name, cell in CELLS.items():
        if cell.kind == "slices" and (found := slices_found(by_cell.get(name, ()))):
            panels.append(partial(_slices, name=name, found=found))
    return panels


def _steps(ax: Any, name: str, times: dict[tuple[str, str], Line]) -> None:
    """Time over that of the step without privacy, on a logarithmic scale around 1."""
    cases = [case for case in dict.fromkeys(case for case, _ in times) if (case, BASELINE) in times]
    for i, case in enumerate(cases):
        ways = [way for way in COLOURS if (case, way) in times]
        width = 0.85 / max(6, len(ways))
        for place, way in enumerate(ways):
            ratio = times[case, way]["milliseconds"] / times[case, BASELINE]["milliseconds"]
            at = i + (place - (len(ways) - 1) / 2) * width
            ax.bar(at, ratio, width, color=COLOURS[way])
            ax.annotate(
                f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", (at, ratio), fontsize=5.5, ha="center", va="bottom",
                rotation=90, xytext=(0, 2), textcoords="offset points",
            )  # fmt: skip
    ax.axhline(1, color="black", linewidth=0.6)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.4), high * 1.6)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xticks(range(len(cases)), cases, fontsize=8)
    ax.set_xlim(-0.6, max(4, len(cases)) - 0.4)
    ax.set_ylabel("time over\nnon-private", fontsize=8)
    ax.tick_params(axis="y", labelsize=7)
    ax.set_title(name, fontsize=9, loc="left")


def _rounds(ax: Any, rounds: dict[str, Line]) -> None:
    """Milliseconds a round, phase upon phase."""
    left = [0.0] * len(rounds)
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for number, phase in enumerate(PHASES):
        each = [1e3 * line["seconds"].get(phase, 0.0) / line["rounds"] for line in rounds.values()]
        if any(each):
            ax.barh(list(rounds), each, left=left, height=0.6, label=phase, color=colours[number])
            left = [a + b for a, b in zip(left, each, strict=True)]
    ax.invert_yaxis()
    ax.set_ylim(len(rounds) - 0.5, -0.5)
    ax.set_xlabel("ms a round", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=7, frameon=False, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.set_title("rounds, by phase", fontsize=9, loc="left")


def _slices(ax: Any, name: str, found: list[Line]) -> None:
    """Tokens a second of all processes together."""
    for line in found:
        label = f"{line['slice_way']}\n{line['processes']} x {line['micro_batch']}"
        bar = ax.bar(label, line["tokens_per_second"], 0.6, color=COLOURS["ours"])
        ax.bar_label(bar, fmt="{:,.0f}", fontsize=7)
    ax.set_ylabel("tokens a second", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.margins(y=0.15)
    ax.set_title(f"{name}: processes x tokens of a micro-batch", fontsize=9, loc="left")
