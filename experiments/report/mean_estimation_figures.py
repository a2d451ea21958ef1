"""Figures of the mean-estimation study."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.report.figures.style import COLOURS, blank, finish, save

STYLES = {
    "uls": ("ULS, best G", COLOURS["uls"], "-"),
    "uls-all": ("ULS, all of a user's examples", COLOURS["uls"], ":"),
    "els": ("ELS, best G", COLOURS["els"], "-"),
}


def plot_sweep(rows: list[dict[str, Any]], against: str, label: str, path: Path) -> Path:
    """Error against one coordinate: lines are the closed form, points the simulation with 95 % intervals."""
    figure, axes = blank(size=(6.4, 4.0))
    for arm, (name, colour, style) in STYLES.items():
        own = [row for row in rows if row["arm"] == arm]
        places = [row[against] for row in own]
        axes.plot(places, [row["closed_form"] for row in own], style, color=colour, label=name)
        axes.errorbar(
            places,
            [row["simulated"] for row in own],
            yerr=[1.96 * row["standard_error"] for row in own],
            fmt="o",
            markersize=4,
            color=colour,
            capsize=3,
        )
        if arm != "uls-all":
            for row in own:
                spot = (row[against], row["closed_form"])
                shift = (0, -14 if arm == "uls" else 7)
                axes.annotate(
                    f"G={row['group_size']}", spot, shift, textcoords="offset points", fontsize=7, ha="center"
                )
    if against != "diversity":
        axes.set_xscale("log", base=2)
        places = sorted({row[against] for row in rows})
        axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("mean squared error")
    finish(axes)
    return save(figure, path)


def plot_map(rows: list[dict[str, Any]], path: Path) -> Path:
    """Who wins over compute and diversity: error of ELS over error of ULS, closed form."""
    compute = sorted({row["gradients_per_round"] for row in rows})
    diversity = sorted({row["diversity"] for row in rows})
    panels = [("", "each with its best group size"), ("_all", "both with all of a user's examples")]
    ratios = []
    for suffix, _ in panels:
        grid = np.full((len(diversity), len(compute)), np.nan)
        for row in rows:
            place = diversity.index(row["diversity"]), compute.index(row["gradients_per_round"])
            grid[place] = row[f"els{suffix}"] / row[f"uls{suffix}"]
        ratios.append(grid)
    reach = max(float(np.nanmax(np.abs(np.log2(grid)))) for grid in ratios)
    figure, axes = blank(1, 2, size=(9.6, 4.0), sharey=True)
    for spot, grid, (_, title) in zip(axes, ratios, panels, strict=True):
        image = spot.imshow(np.log2(grid), origin="lower", cmap="PuOr_r", vmin=-reach, vmax=reach, aspect="auto")
        for (y, x), value in np.ndenumerate(grid):
            dark = abs(np.log2(value)) > 0.6 * reach
            spot.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
        spot.set_xticks(range(len(compute)), [str(value) for value in compute])
        spot.set_yticks(range(len(diversity)), [f"{value:g}" for value in diversity])
        spot.set_title(title, fontsize=10)
        spot.set_xlabel("gradient evaluations a round")
    axes[0].set_ylabel("within-user diversity")
    bar = figure.colorbar(image, ax=axes, label="ELS error / ULS error (above 1: ULS wins)")
    ticks = [tick for tick in bar.get_ticks() if abs(tick) <= reach]
    bar.set_ticks(ticks, labels=[f"{2**tick:.2g}" for tick in ticks])
    return save(figure, path)
