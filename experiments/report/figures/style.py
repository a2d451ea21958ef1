"""What all figures have in common: colours, axes, and how they are written."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

COLOURS = {"uls": "#0b6e99", "els": "#c4571a", "nonprivate": "#3a7d44"}
"""By arm."""
OTHER_COLOURS = ("#7b4fa3", "#3a7d45", "#b0892b", "#a83a5b", "#4d4d4d")
"""Of arms that have none of their own, in turn; unlike those that have."""
GREY = "#777777"
"""What others are compared with: the pre-trained model, a guess."""
SIZE = (5.4, 3.5)
"""Of a figure with one panel, inches: as wide as a telephone's page, so that its words can be read there."""


def blank(rows: int = 1, columns: int = 1, *, size: tuple[float, float] = SIZE, **options: Any) -> tuple[Figure, Any]:
    """A figure that no window shows, and its axes as `Figure.subplots` gives them.

    Not of pyplot, which would take the backend of the program around: a notebook's figures would no longer be shown.
    """
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def spell_out(figure: Figure) -> None:
    """Let no text be a formula: names that people give may hold a dollar."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)


def finish(axes: Axes, *, legend: bool = True) -> None:
    """A light grid, no box, and a legend where one is wanted."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False)


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG; missing folders are made. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    spell_out(figure)
    figure.savefig(path, dpi=150)
    return path
