"""Figures of runs: what training bought, and what it cost."""

import math
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.report.figures.style import COLOURS, GREY, OTHER_COLOURS, blank, finish
from experiments.report.figures.vector import Drawing, vector

Line = dict[str, Any]
Curves = dict[str, list[Line]]
"""The metrics of each arm, by its name. A line a round; older runs have one an evaluation."""
LOSS = "loss on held-out users (nats)"


def training_figures(curves: Curves) -> list[Drawing]:
    """The figures of a report; none of what no line tells."""
    measured = {name: found for name, lines in curves.items() if (found := [one for one in lines if "loss" in one])}
    charged = {name: found for name, lines in curves.items() if (found := _charged(lines))}
    bought = {name: charged[name] for name in charged if any("loss" in line for line in charged[name][1:])}
    drawings = []
    if measured:
        drawings.append(loss_against_rounds(measured))
    if bought:
        drawings.append(loss_against_epsilon(bought))
    if charged:
        drawings.append(epsilon_against_rounds(charged))
    released = {name: found for name, lines in curves.items() if (found := [x for x in lines if x.get("noise_norm")])}
    if released:
        drawings.append(noise_against_rounds(released))
    return drawings


def loss_against_rounds(curves: Curves) -> Drawing:
    """Held-out loss at the evaluations; against compute where arms do not compute alike in a round."""
    against, axis = ("round", "round") if _alike(curves) else ("gradient_evaluations", "gradient evaluations")
    figure, axes = _axes()
    styles, points = _styles(curves), {}
    for number, (name, lines) in enumerate(curves.items()):
        (drawn,) = axes.plot([line[against] for line in lines], [line["loss"] for line in lines], **styles[name])
        drawn.set_gid(f"loss-{number}")
        points[f"loss-{number}"] = [
            f"{name}, round {line['round']}: loss {line['loss']:.4f}, {line['gradient_evaluations']:,.0f} gradients"
            for line in lines
        ]
    _pretrained(axes, curves)
    axes.set_xlim(left=0)
    if against == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _labels(axes, axis, LOSS)
    told = [f"{name} from {lines[0]['loss']:.4f} to {lines[-1]['loss']:.4f}" for name, lines in curves.items()]
    return _drawing(
        figure,
        f"Loss on held-out users against {'rounds' if against == 'round' else 'compute'}",
        f"Lines of held-out loss: {'; '.join(told)}.",
        points,
        ["", "round", "gradient evaluations", "loss"],
        [
            [name, str(line["round"]), f"{line['gradient_evaluations']:,.0f}", f"{line['loss']:.4f}"]
            for name, lines in curves.items()
            for line in lines
        ],
    )


def loss_against_epsilon(curves: Curves) -> Drawing:
    """Held-out loss against ε spent, from the first evaluation after a round.

    What was spent before that bought a loss that nobody measured: it is dotted, level at the loss that was had for
    nothing as far as the first round went, and a tick on the axis marks each round's ε.
    """
    figure, axes = _axes()
    styles, points = _styles(curves), {}
    for number, (name, lines) in enumerate(curves.items()):
        style = styles[name]
        found = [line for line in lines[1:] if "loss" in line]
        (drawn,) = axes.plot([line["epsilon"] for line in found], [line["loss"] for line in found], **style)
        drawn.set_gid(f"bought-{number}")
        points[f"bought-{number}"] = [
            f"{name}, round {line['round']}: loss {line['loss']:.4f} at ε = {line['epsilon']:.3f}" for line in found
        ]
        first, colour = lines[1]["epsilon"], drawn.get_color()
        if (start := lines[0].get("loss")) is not None:
            way = ([0, first, found[0]["epsilon"]], [start, start, found[0]["loss"]])
            axes.plot(*way, ":", color=colour, linewidth=1.4)
        spent = sorted({line["epsilon"] for line in lines[1:]})
        axes.plot(spent, [0.015 + 0.03 * number] * len(spent), "|", color=colour, transform=axes.get_xaxis_transform())
    _pretrained(axes, curves)
    axes.set_xlim(0, 1.05 * max(line["epsilon"] for lines in curves.values() for line in lines))
    _labels(axes, "user-level ε spent (upper bound)", LOSS)
    firsts = [f"{name} ε = {lines[1]['epsilon']:.3f} by round {lines[1]['round']}" for name, lines in curves.items()]
    return _drawing(
        figure,
        "Loss on held-out users against the budget spent. Dotted: spent before the first evaluation after a round",
        f"Lines of held-out loss against ε; the first rounds cost {', '.join(firsts)}. A tick below marks each round.",
        points,
        ["", "round", "ε spent", "loss"],
        [
            [name, str(line["round"]), f"{line['epsilon']:.4f}", f"{line['loss']:.4f}"]
            for name, lines in curves.items()
            for line in lines
            if "loss" in line
        ],
    )


def epsilon_against_rounds(curves: Curves) -> Drawing:
    """ε spent by the end of each round."""
    figure, axes = _axes()
    styles, points = _styles(curves), {}
    for number, (name, lines) in enumerate(curves.items()):
        every = len(lines) == lines[-1]["round"] + 1
        style = styles[name] | {"markersize": 3 if len(lines) < 100 else 0}
        (drawn,) = axes.plot(
            [line["round"] for line in lines],
            [line["epsilon"] for line in lines],
            **style,
            drawstyle="steps-post" if every else "default",
        )
        drawn.set_gid(f"spent-{number}")
        points[f"spent-{number}"] = [f"{name}, round {line['round']}: ε = {line['epsilon']:.4f}" for line in lines]
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _labels(axes, "round", "user-level ε spent (upper bound)")
    told = [f"{name} {lines[1]['epsilon']:.3f} by round {lines[1]['round']}, {lines[-1]['epsilon']:.3f} in all"
            for name, lines in curves.items()]  # fmt: skip
    return _drawing(
        figure,
        "ε spent by the end of each round",
        f"Rising lines of ε: {'; '.join(told)}.",
        points,
        ["", "round", "ε spent"],
        [[name, str(x["round"]), f"{x['epsilon']:.4f}"] for name, lines in curves.items() for x in lines],
    )


def noise_against_rounds(curves: Curves) -> Drawing:
    """Length of each released mean beside that which its noise alone is expected to have."""
    figure, axes = _axes()
    styles = _styles(curves)
    points, shares = {}, []
    for number, (name, lines) in enumerate(curves.items()):
        rounds = [line["round"] for line in lines]
        (drawn,) = axes.plot(rounds, [line["released_norm"] for line in lines], **styles[name])
        drawn.set_gid(f"released-{number}")
        noise = [line["noise_norm"] for line in lines]
        axes.plot(rounds, noise, "--", color=drawn.get_color(), linewidth=1.2, label=f"{name}, noise expected")
        points[f"released-{number}"] = [
            f"{name}, round {line['round']}: released {line['released_norm']:.4g}, noise {line['noise_norm']:.4g}"
            for line in lines
        ]
        shares.append(f"{name} {_share(lines):.1%}")
    longest = max(max(line["released_norm"], line["noise_norm"]) for lines in curves.values() for line in lines)
    axes.set_ylim(0, 1.1 * longest)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _labels(axes, "round", "L2 norm of the released mean")
    return _drawing(
        figure,
        "Noise and signal of each release: where the lines meet, a release is noise. What the rounds have in common "
        f"still adds up. Signal in the squared norm of all releases: {', '.join(shares)}",
        f"Norm of each released mean beside the expected norm of its noise. Share of signal: {', '.join(shares)}.",
        points,
        ["", "round", "released", "noise expected"],
        [
            [name, str(line["round"]), f"{line['released_norm']:.5g}", f"{line['noise_norm']:.5g}"]
            for name, lines in curves.items()
            for line in lines
        ],
    )


def _share(lines: Iterable[Line]) -> float:
    """How much of the squared norms is not noise; what chance makes negative is none."""
    lines = list(lines)
    released, noise = (math.fsum(line[name] ** 2 for line in lines) for name in ("released_norm", "noise_norm"))
    return max(0.0, 1 - noise / released)


def _charged(lines: list[Line]) -> list[Line]:
    """The lines that tell ε, where it is finite and some was spent."""
    found = [line for line in lines if line["epsilon"] is not None and math.isfinite(line["epsilon"])]
    return found if len(found) > 1 and found[-1]["epsilon"] > 0 else []


def _alike(curves: Curves) -> bool:
    """Whether all arms compute as many gradients in a round."""
    ratios = [
        lines[-1]["gradient_evaluations"] / lines[-1]["round"] for lines in curves.values() if lines[-1]["round"]
    ]
    return not ratios or max(ratios) - min(ratios) <= 1e-3 * max(ratios)


def _styles(curves: Curves) -> dict[str, dict[str, Any]]:
    """Of each arm's line: an algorithm's first arm has its colour, others those that nobody has."""
    left, free = list(OTHER_COLOURS), dict(COLOURS)
    styles = {}
    for name in curves:
        kind = "nonprivate" if name.endswith(("without privacy", "no privacy")) else name.partition(" ")[0].lower()
        colour = free.pop(kind, None) or (left.pop(0) if left else GREY)
        styles[name] = {"marker": "o", "markersize": 4, "linewidth": 1.8, "color": colour, "label": name}
    return styles


def _pretrained(axes: Axes, curves: Curves) -> None:
    starts = [lines[0]["loss"] for lines in curves.values() if "loss" in lines[0]]
    if starts:
        axes.axhline(starts[0], color=GREY, linestyle="--", linewidth=1, label="pre-trained")


def _axes() -> tuple[Figure, Axes]:
    figure, axes = blank()
    return figure, axes


def _labels(axes: Axes, below: str, beside: str) -> None:
    axes.set_xlabel(below)
    axes.set_ylabel(beside)
    finish(axes)


def _drawing(
    figure: Figure,
    caption: str,
    alt: str,
    points: dict[str, list[str]],
    headings: list[str],
    rows: list[list[str]],
) -> Drawing:
    return Drawing(caption=caption, alt=alt, svg=vector(figure, alt, points), headings=headings, rows=rows)
