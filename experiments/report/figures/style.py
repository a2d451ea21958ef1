"""What all figures have in common: colours, axes, and how they are written."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"uls": "#0b6e99", "els": "#c4571a", "nonprivate": "#3a7d44"}
"""By arm."""
OTHER_COLOURS = ("#7b4fa3", "#3a7d45", "#b0892b", "#a83a5b", "#4d4d4d")
"""Of arms that have none of their own, in turn; unlike those that have."""
GREY = "#777777"
"""What others are compared with: the pre-trained model, a guess."""
SIZE = (5.4, 3.5)
"""Of a figure with one panel, inches: as wide as a telephone's page, so that its words can be read there."""

plt.rcParams["text.parse_math"] = False  # names that people give may hold a dollar


def finish(axes: Axes, *, legend: bool = True) -> None:
    """A light grid, no box, and a legend where one is wanted."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False)


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG and free it; missing folders are made. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
