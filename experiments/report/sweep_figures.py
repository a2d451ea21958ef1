"""Figures of a sweep."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.report.style import COLOURS, GREY, finish, save

NONPRIVATE = "#3a7d44"


def plot_outcomes(
    cells: list[dict[str, Any]],
    pretrained: float,
    against: str,
    label: str,
    path: Path,
    value: Callable[[float], float] = lambda loss: loss,
    value_label: str = "loss on held-out users (nats)",
) -> Path:
    """The best setting of each algorithm against ε or compute; one panel for each value of the other.

    Args:
        cells: Of experiments.sweep.results.cells.
        pretrained: Loss of the model before fine-tuning.
        against: "epsilon" or "gradients_per_round".
        label: Its name on the axis.
        path: Where the PNG goes.
        value: What is drawn of a loss; exp for perplexity.
        value_label: Its name on the axis.
    """
    other = "gradients_per_round" if against == "epsilon" else "epsilon"
    private = [cell for cell in cells if cell["arm"] != "nonprivate"]
    panels = sorted({cell[other] for cell in private})
    size = (1 + 3.5 * len(panels), 3.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for spot, panel in zip(axes[0], panels, strict=True):
        for arm in ("uls", "els"):
            chosen = sorted(
                (cell for cell in private if cell["arm"] == arm and cell[other] == panel),
                key=lambda cell: cell[against],
            )
            _line(
                spot, [cell[against] for cell in chosen], [cell["best"] for cell in chosen], COLOURS[arm], arm, value
            )
        ends = [cell for cell in cells if cell["arm"] == "nonprivate"]
        if against == "epsilon":
            for cell in ends:
                if cell["gradients_per_round"] == panel:
                    spot.axhline(value(cell["best"]["loss"]), color=NONPRIVATE, linestyle="-.", label="no privacy")
        else:
            ends.sort(key=lambda cell: cell["gradients_per_round"])
            places = [cell["gradients_per_round"] for cell in ends]
            _line(spot, places, [cell["best"] for cell in ends], NONPRIVATE, "no privacy", value)
        spot.axhline(value(pretrained), color=GREY, linestyle="--", linewidth=1, label="pre-trained")
        spot.set_title(f"ε = {panel:g}" if other == "epsilon" else f"{panel:,} gradients a round", fontsize=10)
        places = sorted({cell[against] for cell in private})
        spot.set_xscale("log", base=2)
        spot.set_xticks(places, [f"{place:g}" for place in places])
        spot.set_xlabel(label)
        finish(spot, legend=False)
    axes[0][0].set_ylabel(value_label)
    axes[0][-1].legend(frameon=False, fontsize=8)
    return save(figure, path)


def plot_group_sizes(cells: list[dict[str, Any]], path: Path) -> Path:
    """Loss of each group size with its best learning rate and clip, in every cell where several were tried."""
    tried = [cell for cell in cells if len({setting["group_size"] for setting in cell["settings"]}) > 1]
    columns = min(3, len(tried))
    lines = math.ceil(len(tried) / columns)
    size = (1 + 3.2 * columns, 2.6 * lines + 0.5)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for spot in axes.flat[len(tried) :]:
        spot.set_visible(False)
    for spot, cell in zip(axes.flat, tried, strict=False):
        groups = sorted({setting["group_size"] for setting in cell["settings"]})
        best = [
            min((s for s in cell["settings"] if s["group_size"] == group), key=lambda s: s["validation_loss"])
            for group in groups
        ]
        _line(spot, groups, best, COLOURS[cell["arm"]], cell["arm"], lambda loss: loss)
        spot.set_xscale("log", base=2)
        spot.set_xticks(groups, [str(group) for group in groups])
        spot.set_title(
            f"{cell['arm'].upper()}, ε = {cell['epsilon']:g}, B = {cell['gradients_per_round']:,}", fontsize=9
        )
        spot.set_xlabel("group size G")
        finish(spot, legend=False)
    return save(figure, path)


def _line(
    axes: Any,
    places: list[float],
    settings: list[dict[str, Any]],
    colour: str,
    name: str,
    value: Callable[[float], float],
) -> None:
    if not settings:
        return
    losses = [setting["loss"] for setting in settings]
    halves = [setting["half_width"] or 0.0 for setting in settings]
    middles = [value(loss) for loss in losses]
    below = [value(loss) - value(loss - half) for loss, half in zip(losses, halves, strict=True)]
    above = [value(loss + half) - value(loss) for loss, half in zip(losses, halves, strict=True)]
    text = name.upper() if name in COLOURS else name
    axes.errorbar(places, middles, yerr=[below, above], color=colour, marker="o", markersize=4, capsize=3, label=text)
