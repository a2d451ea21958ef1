"""Figures of runs, as PNG."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.report.style import COLOURS, GREY, OTHER_COLOURS, finish, save

Curves = dict[str, list[dict[str, Any]]]
"""The metrics of each arm, by its name."""


def plot_loss(curves: Curves, against: str, label: str, path: Path, *, after_training: bool = False) -> Path:
    """Held-out loss against compute or against the budget spent.

    Args:
        curves: Lines of metrics.jsonl of each arm.
        against: The metric on the horizontal axis ("gradient_evaluations", "epsilon").
        label: Its name on the axis.
        path: Where the PNG goes.
        after_training: Whether lines begin at the first evaluation after a round; before it the loss is the
            pre-trained model's, which is drawn in any case.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.set_prop_cycle(color=OTHER_COLOURS)
    for name, lines in curves.items():
        drawn = [line for line in lines if "loss" in line and (line["round"] > 0 or not after_training)]
        axes.plot(
            [line[against] for line in drawn],
            [line["loss"] for line in drawn],
            marker="o",
            markersize=4,
            linewidth=1.8,
            color=COLOURS.get(name.lower()),  # None takes the next of the others
            label=name,
        )
    starts = [lines[0]["loss"] for lines in curves.values() if lines]
    if starts:
        axes.axhline(starts[0], color=GREY, linestyle="--", linewidth=1, label="pre-trained")
    places = [line[against] for lines in curves.values() for line in lines]
    axes.set_xlim(0, 1.05 * max(places, default=0) or 1)  # room for the last marker
    axes.set_xlabel(label)
    axes.set_ylabel("loss on held-out users (nats)")
    finish(axes)
    return save(figure, path)


def plot_run(curves: Curves, folder: Path) -> dict[str, Path]:
    """The figures of a report, by caption; against ε only where ε is finite."""
    figures = {
        "Loss on held-out users against compute": plot_loss(
            curves, "gradient_evaluations", "gradient evaluations", folder / "loss_against_compute.png"
        )
    }
    private = {name: [line for line in lines if line["epsilon"] is not None] for name, lines in curves.items()}
    private = {name: lines for name, lines in private.items() if len(lines) > 1}
    if private:
        # The first round costs most, and what it bought was not measured: a line from ε = 0 would hide both.
        figures["Loss on held-out users against the budget spent, from the first evaluation after a round"] = (
            plot_loss(
                private,
                "epsilon",
                "user-level ε spent (upper bound)",
                folder / "loss_against_epsilon.png",
                after_training=True,
            )
        )
    return figures
