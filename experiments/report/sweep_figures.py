"""Figures of a sweep."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.report.style import COLOURS, GREY, finish, save
from experiments.sweep.points import ARM_TITLES
from fedsim.plan import ALGORITHMS

COLUMNS = 3
"""Panels beside each other; more would be too small to read in a page."""


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
        cells: Of experiments.sweep.results.cells_of.
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
        for arm in ALGORITHMS:
            own = [cell for cell in private if cell["arm"] == arm and cell[other] == panel]
            _line(spot, own, against, value)
        ends = [cell for cell in cells if cell["arm"] == "nonprivate"]
        if against == "epsilon":
            for cell in ends:
                if cell["gradients_per_round"] == panel:
                    title, colour = ARM_TITLES["nonprivate"], COLOURS["nonprivate"]
                    spot.axhline(value(cell["best"]["loss"]), color=colour, linestyle="-.", label=title)
        else:
            _line(spot, ends, against, value)
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


def several_group_sizes(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells in which more than one group size was tried."""
    return [cell for cell in cells if len({setting["group_size"] for setting in cell["settings"]}) > 1]


def plot_group_sizes(cells: list[dict[str, Any]], path: Path) -> Path:
    """Loss of each group size with its best learning rate and clip; one panel for each compute and ε, on one scale."""
    panels = sorted({(cell["gradients_per_round"], cell["epsilon"]) for cell in cells})
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (1 + 3.6 * columns, 0.3 + 3.3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for spot in axes.flat[len(panels) :]:
        spot.set_visible(False)
    for spot, (gradients, epsilon) in zip(axes.flat, panels, strict=False):
        here = [cell for cell in cells if (cell["gradients_per_round"], cell["epsilon"]) == (gradients, epsilon)]
        for cell in here:
            _line(spot, best_of_groups(cell), "group_size", lambda loss: loss)
        groups = sorted({setting["group_size"] for cell in here for setting in cell["settings"]})
        spot.set_xscale("log", base=2)
        spot.set_xticks(groups, [str(group) for group in groups])
        spot.set_xlabel("group size G")
        spot.set_title(f"ε = {epsilon:g}, {gradients:,} gradients a round", fontsize=10)
        finish(spot, legend=False)
    for spot in axes[:, 0]:
        spot.set_ylabel("loss on held-out users (nats)")
    named = {name: line for spot in axes.flat for line, name in zip(*spot.get_legend_handles_labels(), strict=True)}
    axes[0, 0].legend(named.values(), named.keys(), frameon=False)
    return save(figure, path)


def best_of_groups(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """For each group size of a cell, a cell in which it alone was tried, with its best setting."""
    groups = sorted({setting["group_size"] for setting in cell["settings"]})
    own = [[setting for setting in cell["settings"] if setting["group_size"] == group] for group in groups]
    return [
        {"arm": cell["arm"], "group_size": group, "best": min(settings, key=lambda s: s["validation_loss"])}
        for group, settings in zip(groups, own, strict=True)
    ]


def _line(axes: Any, cells: list[dict[str, Any]], against: str, value: Callable[[float], float]) -> None:
    """One arm's best losses against a value of its cells, with intervals."""
    if not cells:
        return
    cells = sorted(cells, key=lambda cell: cell[against])
    losses = [cell["best"]["loss"] for cell in cells]
    halves = [cell["best"]["half_width"] or 0.0 for cell in cells]
    below = [value(loss) - value(loss - half) for loss, half in zip(losses, halves, strict=True)]
    above = [value(loss + half) - value(loss) for loss, half in zip(losses, halves, strict=True)]
    arm = cells[0]["arm"]
    axes.errorbar(
        [cell[against] for cell in cells],
        [value(loss) for loss in losses],
        yerr=[below, above],
        color=COLOURS[arm],
        marker="o",
        markersize=4,
        capsize=3,
        label=ARM_TITLES[arm],
    )
