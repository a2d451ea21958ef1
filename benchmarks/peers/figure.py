"""Held-out loss against ε for a user: what each library states, and what can be certified."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from benchmarks.peers.certificates import ADD_OR_REMOVE
from benchmarks.peers.lines import Line, asked
from experiments.report.figures.style import COLOURS, GREY, blank, finish, save

CURVE = "fedsim-bands"
"""Whose lines at several ε are joined."""
SHORT = {
    "opacus": "Opacus",
    "opacus-users": "Opacus, users' rows bounded,\nnoise from fedsim",
    "dptrainer": "DPTrainer",
    "dp-transformers": "dp-transformers",
    "flower": "Flower, noise from fedsim",
    "pfl": "pfl",
    "fedsim": "fedsim, independent noise",
}
"""What stands beside a point."""
PLACES = {
    "opacus": (-6, -13, "right"),
    "dptrainer": (-6, 8, "right"),
    "opacus-users": (-20, -24, "right"),
    "dp-transformers": (7, -11, "left"),
    "fedsim": (7, 6, "left"),
    "flower": (7, -14, "left"),
}
"""Where it stands from there, points, and which of its ends; right of it where nothing is said."""
SIZE = (7.6, 4.4)
TICKS = (0.5, 2, 8, 32, 100, 1_000, 10_000)


def draw(lines: Sequence[Line], epsilon: float, path: Path) -> Path:
    """The figure as PNG; returns its path.

    Args:
        lines: One for each library and ε that it was asked for.
        epsilon: The ε at which the libraries are compared.
        path: Where it goes.
    """
    figure, axes = blank(size=SIZE)
    certified = [one for one in lines if one.user_epsilon is not None and one.user_epsilon < math.inf]
    _curve(axes, [one for one in certified if one.peer == CURVE])
    for one in asked(certified, epsilon):
        if one.peer != CURVE:
            _rival(axes, one)
    axes.axvline(epsilon, color=GREY, linestyle=":", linewidth=1)
    axes.plot([], [], "o", color=GREY, fillstyle="none", label="ε that the library states")
    axes.plot([], [], "o", color=GREY, label="ε certified for adding or removing a user")
    axes.plot([], [], "o", color=GREY, fillstyle="left", label="ε certified for emptying a user's rows")
    axes.set(
        xscale="log",
        xlabel=f"ε at δ = {lines[0].task['delta']:g} (the other libraries were asked for {epsilon:g})",
        ylabel="loss on held-out users (nats)",
        xlim=(0.3, 20_000),
    )
    axes.set_xticks(TICKS, [f"{tick:,g}" for tick in TICKS])
    axes.minorticks_off()
    finish(axes)
    return save(figure, path)


def _curve(axes: Axes, own: Sequence[Line]) -> None:
    own = sorted(own, key=lambda one: one.user_epsilon or 0.0)
    axes.plot(
        [one.user_epsilon for one in own],
        [one.test_loss for one in own],
        "o-",
        color=COLOURS["uls"],
        label="fedsim, bands chosen by the planner",
    )


def _rival(axes: Axes, one: Line) -> None:
    colour = COLOURS["uls"] if one.peer == "fedsim" else COLOURS["els"]
    x, y = one.user_epsilon, one.test_loss
    if one.stated_epsilon is not None and abs(math.log(x / one.stated_epsilon)) > 0.05:
        axes.plot([one.stated_epsilon], [y], "o", color=colour, fillstyle="none")
        axes.annotate(
            "",
            (x, y),
            (one.stated_epsilon, y),
            arrowprops={"arrowstyle": "->", "color": colour, "shrinkA": 4, "shrinkB": 4},
        )
    axes.plot([x], [y], "o", color=colour, fillstyle="full" if one.user_words == ADD_OR_REMOVE else "left")
    right, up, end = PLACES.get(one.peer, (7, -3, "left"))
    axes.annotate(
        SHORT[one.peer], (x, y), xytext=(right, up), textcoords="offset points", ha=end, fontsize=8, color=colour
    )
