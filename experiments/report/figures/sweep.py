"""Figures of a sweep."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.figures.style import COLOURS, GREY, blank, finish, save
from experiments.report.figures.vector import Drawing, vector
from experiments.sweep.points import ARM_TITLES

COLUMNS = 2
"""Panels beside each other; more would be too small to read in a page."""
PANEL = (4.6, 3.4)
"""Of a panel, inches."""
LEGEND_COLUMNS = 2
"""Of the legend, for each panel above it."""
DASHES = ("-", "--", ":", "-.")
"""Of an algorithm's lines where its arms differ in bands, from the fewest on."""
LOSS = "loss on held-out users (nats)"
AXES = {"epsilon": "user-level ε", "gradients_per_round": "gradient evaluations a round"}
NUMBERS = ("", "ε", "gradients a round", "group size", "loss", "± 95 %")

Cell = dict[str, Any]


def draw(folder: Path, cells: list[Cell], pretrained: float) -> list[Drawing]:
    """The figures, for the page and as PNG; none against an axis on which no panel has two places.

    Args:
        folder: Where the PNGs go.
        cells: Of experiments.sweep.results.cells_of.
        pretrained: Loss of the model before fine-tuning.
    """
    cells = by_bands(cells)
    drawings = []
    for against in AXES:
        if not _panels(cells, against):
            continue
        short = "epsilon" if against == "epsilon" else "compute"
        path = folder / f"loss_against_{short}.png"
        drawings.append(plot_outcomes(cells, pretrained, against, path))
        path = folder / f"perplexity_against_{short}.png"
        drawings.append(plot_outcomes(cells, pretrained, against, path, math.exp, "perplexity"))
    if tried := several_group_sizes(cells):
        drawings.append(plot_group_sizes(tried, folder / "group_sizes.png"))
    return drawings


def by_bands(cells: list[Cell]) -> list[Cell]:
    """The cells, each with its line's name; one for each number of bands where an arm was tried with several.

    Each has the best of its own settings: the least validation loss, of those with most seeds.
    """
    several = {arm for arm in {cell["arm"] for cell in cells} if len(_bands_of(cells, arm)) > 1}
    found = []
    for cell in cells:
        title = ARM_TITLES[cell["arm"]]
        if cell["arm"] not in several:
            found.append(cell | {"line": title, "place": 0})
            continue
        for place, bands in enumerate(_bands_of(cells, cell["arm"])):
            own = [setting for setting in cell["settings"] if setting.get("bands") == bands]
            if own:
                name = f"{title}, {'1 band' if bands == '1' else f'{bands} bands'}"
                found.append(cell | {"settings": own, "best": _best(own), "line": name, "place": place})
    return found


def plot_outcomes(
    cells: list[Cell],
    pretrained: float,
    against: str,
    path: Path,
    value: Callable[[float], float] = lambda loss: loss,
    value_label: str = LOSS,
) -> Drawing:
    """The best setting of each algorithm against ε or compute; one panel for each value of the other, on one scale.

    Args:
        cells: Of by_bands.
        pretrained: Loss of the model before fine-tuning.
        against: "epsilon" or "gradients_per_round".
        path: Where the PNG goes.
        value: What is drawn of a loss; exp for perplexity.
        value_label: Its name on the axis.
    """
    other = _other(against)
    panels = _panels(cells, against)
    private = [cell for cell in cells if cell["arm"] != "nonprivate" and cell[other] in panels]
    ends = [cell for cell in cells if cell["arm"] == "nonprivate"]
    figure, spots = _grid(len(panels))
    points: dict[str, list[str]] = {}
    for spot, panel in zip(spots, panels, strict=True):
        for line in dict.fromkeys(cell["line"] for cell in private):
            own = [cell for cell in private if cell["line"] == line and cell[other] == panel]
            _line(spot, own, against, value, points)
        if against == "epsilon":
            for cell in ends:
                if cell["gradients_per_round"] == panel:
                    title, colour = cell["line"], COLOURS["nonprivate"]
                    spot.axhline(value(cell["best"]["loss"]), color=colour, linestyle="-.", label=title)
        else:
            _line(spot, ends, against, value, points)
        spot.axhline(value(pretrained), color=GREY, linestyle="--", linewidth=1, label="pre-trained")
        spot.set_title(f"ε = {panel:g}" if other == "epsilon" else f"{panel:,} gradients a round", fontsize=10)
        _places(spot, sorted({cell[against] for cell in private}), AXES[against], value_label)
    shown = [*private, *ends]
    _legend(figure, spots, [cell["line"] for cell in shown])
    what = "Loss" if value_label == LOSS else value_label.capitalize()
    short = "ε" if against == "epsilon" else "compute"
    caption = f"{what} on held-out users against {short}; intervals of 95 % over seeds"
    alt = f"{caption}. {_told(shown, value)}"
    svg = vector(figure, alt, points)
    save(figure, path)
    headings = [*NUMBERS[:4], *(("loss", "± 95 %") if value_label == LOSS else ("loss", "± 95 %", value_label))]
    rows = [_numbers(cell) + ([] if value_label == LOSS else [f"{value(cell['best']['loss']):.2f}"]) for cell in shown]
    return Drawing(caption=caption, alt=alt, svg=svg, headings=headings, rows=rows, broad=len(panels) > 1)


def several_group_sizes(cells: list[Cell]) -> list[Cell]:
    """The cells in which more than one group size was tried."""
    return [cell for cell in cells if len({setting["group_size"] for setting in cell["settings"]}) > 1]


def plot_group_sizes(cells: list[Cell], path: Path) -> Drawing:
    """Loss of each group size with its best learning rate and clip; one panel for each compute and ε, on one scale."""
    panels = sorted({(cell["gradients_per_round"], cell["epsilon"]) for cell in cells})
    groups = sorted({setting["group_size"] for cell in cells for setting in cell["settings"]})
    figure, spots = _grid(len(panels))
    points: dict[str, list[str]] = {}
    shown = []
    for spot, (gradients, epsilon) in zip(spots, panels, strict=True):
        for cell in cells:
            if (cell["gradients_per_round"], cell["epsilon"]) == (gradients, epsilon):
                best = best_of_groups(cell)
                shown += best
                _line(spot, best, "group_size", lambda loss: loss, points)
        spot.set_title(f"{_epsilon(epsilon)}, {gradients:,} gradients a round", fontsize=10)
        _places(spot, groups, "group size G", LOSS)
    _legend(figure, spots, [cell["line"] for cell in cells])
    caption = "Loss by group size; intervals of 95 % over seeds"
    alt = f"{caption}. {_told(shown, lambda loss: loss)}"
    svg = vector(figure, alt, points)
    save(figure, path)
    rows = [_numbers(cell) for cell in shown]
    return Drawing(caption=caption, alt=alt, svg=svg, headings=NUMBERS, rows=rows, broad=len(panels) > 1)


def best_of_groups(cell: Cell) -> list[Cell]:
    """For each group size of a cell, a cell in which it alone was tried, with its best setting."""
    groups = sorted({setting["group_size"] for setting in cell["settings"]})
    own = [[setting for setting in cell["settings"] if setting["group_size"] == group] for group in groups]
    return [
        cell | {"group_size": group, "settings": settings, "best": min(settings, key=lambda s: s["validation_loss"])}
        for group, settings in zip(groups, own, strict=True)
    ]


def _grid(panels: int) -> tuple[Figure, list[Axes]]:
    """So many panels on one scale, which each of them shows."""
    columns = min(COLUMNS, panels)
    rows = math.ceil(panels / columns)
    size = (PANEL[0] * columns, 0.4 + PANEL[1] * rows)
    figure, axes = blank(rows, columns, size=size, sharey=True, squeeze=False)
    for spot in axes.flat[panels:]:
        spot.set_visible(False)
    for spot in axes.flat:
        spot.tick_params(labelleft=True)
    return figure, list(axes.flat[:panels])


def _places(axes: Axes, places: Sequence[float], below: str, beside: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.set_xlabel(below)
    axes.set_ylabel(beside)
    finish(axes, legend=False)


def _legend(figure: Figure, spots: Sequence[Axes], order: Sequence[str]) -> None:
    """One for all panels, below them, where it hides nothing: lines in order, then what else is drawn."""
    pairs = itertools.chain.from_iterable(zip(*spot.get_legend_handles_labels(), strict=True) for spot in spots)
    found = {name: line for line, name in pairs}
    named = {name: found[name] for name in dict.fromkeys([*order, *found]) if name in found}
    columns = LEGEND_COLUMNS * min(len(spots), COLUMNS)
    figure.legend(named.values(), named.keys(), frameon=False, loc="outside lower center", ncols=columns)


def _line(
    axes: Axes, cells: list[Cell], against: str, value: Callable[[float], float], points: dict[str, Any]
) -> None:
    """One arm's best losses against a value of its cells, with intervals."""
    if not cells:
        return
    cells = sorted(cells, key=lambda cell: cell[against])
    losses = [cell["best"]["loss"] for cell in cells]
    halves = [cell["best"]["half_width"] or 0.0 for cell in cells]
    below = [value(loss) - value(loss - half) for loss, half in zip(losses, halves, strict=True)]
    above = [value(loss + half) - value(loss) for loss, half in zip(losses, halves, strict=True)]
    first = cells[0]
    drawn = axes.errorbar(
        [cell[against] for cell in cells],
        [value(loss) for loss in losses],
        yerr=[below, above] if any(halves) else None,
        color=COLOURS[first["arm"]],
        linestyle=DASHES[first["place"] % len(DASHES)],
        marker="o",
        markersize=4,
        capsize=3,
        label=first["line"],
    )
    name = f"sweep-{len(points)}"
    drawn[0].set_gid(name)
    points[name] = [
        f"{cell['line']}, {_epsilon(cell['epsilon'])}, {cell['gradients_per_round']:,} gradients a round, "
        f"G = {cell['best']['group_size']}: {value(cell['best']['loss']):.4f}"
        for cell in cells
    ]


def _panels(cells: list[Cell], against: str) -> list[Any]:
    """Values of the other axis at which some arm has two places on this one: of one, a line tells nothing."""
    other = _other(against)
    places: dict[Any, set[Any]] = {}
    for cell in cells:
        if cell["arm"] != "nonprivate":
            places.setdefault(cell[other], set()).add(cell[against])
    return sorted(panel for panel, found in places.items() if len(found) > 1)


def _other(against: str) -> str:
    return "gradients_per_round" if against == "epsilon" else "epsilon"


def _bands_of(cells: list[Cell], arm: str) -> list[str]:
    """Bands that an arm was tried with, from the fewest on; "auto" last."""
    found = {setting.get("bands", "1") for cell in cells if cell["arm"] == arm for setting in cell["settings"]}
    return sorted(found, key=lambda bands: (not bands.isdigit(), int(bands) if bands.isdigit() else 0))


def _best(settings: list[dict[str, Any]]) -> dict[str, Any]:
    most = max(setting["seeds"] for setting in settings)
    return min((one for one in settings if one["seeds"] == most), key=lambda setting: setting["validation_loss"])


def _epsilon(epsilon: float) -> str:
    return f"ε = {epsilon:g}" if math.isfinite(epsilon) else "no privacy"


def _numbers(cell: Cell) -> list[str]:
    best, private = cell["best"], math.isfinite(cell["epsilon"])
    half = "–" if best["half_width"] is None else f"{best['half_width']:.4f}"
    epsilon = f"{cell['epsilon']:g}" if private else "∞"
    group = str(best["group_size"]) if private else "–"
    return [cell["line"], epsilon, f"{cell['gradients_per_round']:,}", group, f"{best['loss']:.4f}", half]


def _told(cells: list[Cell], value: Callable[[float], float]) -> str:
    """The range of each line, for those who do not see it."""
    ranges = []
    for line in dict.fromkeys(cell["line"] for cell in cells):
        values = [value(cell["best"]["loss"]) for cell in cells if cell["line"] == line]
        ranges.append(f"{line}: {min(values):.4f} to {max(values):.4f}")
    return "; ".join(ranges) + "."
