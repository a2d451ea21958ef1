"""The benchmark's lines as a page: a table in words, and a plot of times over those of a step without privacy."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BASELINE = "non-private"
SHOWN = (
    "ours", "ours, size chosen", "ours, not compiled", "loop", BASELINE, "non-private, fused loss",
    "non-private, compiled",
)  # fmt: skip
EXPLANATION = """\
A case is the units of a step by the rows of each: `64x4` are 64 users with four full rows, `256x1` as many users or
examples with one, `ragged` 64 users with one to seven rows of all lengths. Times are medians of five steps by the
device's clock, of the quicker of the micro-batches tried (in tokens); `size chosen` leaves these to the library.
Memory is the peak above what was there before the step, the model. "ours" is as it comes: compiled for a model of this
size, which "not compiled" is without. "non-private" is the ordinary step in bfloat16 autocast, "fused loss" the same
with our chunked loss, "compiled" the ordinary one under `torch.compile`.
"""


def write_page(lines: list[dict[str, Any]], out: Path) -> Path:
    """README.md and times.png in `out`; returns the page's path."""
    times = {(line["model"], line["case"], line["way"]): line for line in lines if "way" in line}
    text = ["# The clipped sum on a GPU", ""]
    for line in lines:
        if "copy_gb_per_second" in line:
            text.append(
                f"{line['device']}, torch {line['torch']}: a copy moves {line['copy_gb_per_second']:,} GB/s, read and "
                f"written; a product of 8192 x 8192 bfloat16 matrices runs at {line['bfloat16_tflops']:.0f} TFLOP/s.\n"
            )
        if "in_words" in line:
            text.append(
                f"A round end to end ({line['in_words']}): gradients are {1 - line['beyond_gradients']:.0%} of it.\n"
            )
        if "checks" in line:
            text.append(
                f"{line['checks']} checks of the clip, {line['number_failed']} failed: copies of one unit reached "
                f"{line['largest_reach']:.7f} clip norms a copy at most; float32 sums were off those of float64 by "
                f"{line['largest_float32_error']:.1e} of their norm at most.\n"
            )
    text += [EXPLANATION, _table(times)]
    if times:
        _plot(times, out / "times.png")
        text.append("\n![Time over that of the step without privacy](times.png)")
    page = out / "README.md"
    page.write_text("\n".join(text) + "\n")
    return page


def _table(times: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    rows = [
        "| model | case | way | micro-batch | ms | over non-private | over compiled | memory, MiB | kernels |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (model, case, way), line in times.items():
        ratios = [_ratio(line, times.get((model, case, other))) for other in (BASELINE, "non-private, compiled")]
        rows.append(
            f"| {model} | {case} | {way} | {line['micro_batch'] or '–'} | {line['milliseconds']:,.1f} | {ratios[0]} | "
            f"{ratios[1]} | {line['peak_mib']:,} | {line['kernels'] or '–'} |"
        )
    return "\n".join(rows)


def _ratio(line: dict[str, Any], other: dict[str, Any] | None) -> str:
    return f"{line['milliseconds'] / other['milliseconds']:.2f}" if other else "–"


def _plot(times: dict[tuple[str, str, str], dict[str, Any]], path: Path) -> None:
    places = list(dict.fromkeys((model, case) for model, case, _ in times if (model, case, BASELINE) in times))
    ways = [way for way in SHOWN if any((*place, way) in times for place in places)]
    figure, axes = plt.subplots(figsize=(max(5, 1.6 + 1.5 * len(places)), 3.8), dpi=150, layout="constrained")
    width = 0.8 / max(1, len(ways))
    for number, way in enumerate(ways):
        there = [(i, times[(*place, way)]) for i, place in enumerate(places) if (*place, way) in times]
        base = [times[(*places[i], BASELINE)]["milliseconds"] for i, _ in there]
        heights = [line["milliseconds"] / b for (_, line), b in zip(there, base, strict=True)]
        bars = axes.bar([i + (number + 0.5) * width - 0.4 for i, _ in there], heights, width, label=way)
        axes.bar_label(bars, fmt="%.2f", fontsize=6)
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_xticks(range(len(places)), [f"{model}\n{case}" for model, case in places], fontsize=8)
    axes.set_ylabel("time over the non-private step")
    figure.legend(loc="outside upper center", ncols=3, fontsize=7, frameon=False)
    figure.savefig(path)
    plt.close(figure)
