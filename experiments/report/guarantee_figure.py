"""The picture of a guarantee: ε against δ, and the errors left to an attacker."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from experiments.report.figures.style import COLOURS, GREY, blank, finish, save
from fedsim.privacy.bounds import Bounds
from fedsim.privacy.tradeoff import PrivacyCurve

COLOUR = COLOURS["uls"]


def plot_guarantee(curve: PrivacyCurve, delta: float, epsilon: Bounds, title: str, path: Path) -> Path:
    """Draw both curves.

    Args:
        curve: Certified points of δ(ε).
        delta: The δ at which ε is stated; marked.
        epsilon: ε there.
        title: What was accounted.
        path: Where the PNG goes; missing folders are made.
    """
    figure, (left, right) = blank(1, 2, size=(9.6, 4.2))
    _draw_epsilon(left, curve, delta, epsilon)
    _draw_tradeoff(right, curve)
    figure.suptitle(title, fontsize=11)
    finish(left)
    finish(right)
    return save(figure, path)


def _draw_epsilon(axes: Axes, curve: PrivacyCurve, delta: float, epsilon: Bounds) -> None:
    least = min(delta, 1e-12)
    shown = curve.upper > least / 2
    axes.fill_betweenx(
        curve.epsilons[shown], np.maximum(curve.lower[shown], least / 10), curve.upper[shown], color=COLOUR, alpha=0.3
    )
    axes.plot(curve.upper[shown], curve.epsilons[shown], color=COLOUR, linewidth=1.8, label="upper bound")
    axes.plot(
        curve.lower[shown], curve.epsilons[shown], color=COLOUR, linewidth=0.8, linestyle=":", label="lower bound"
    )
    axes.plot([delta], [epsilon.upper], "o", color="black", label=f"ε ≤ {epsilon.upper:.4g} at δ = {delta:g}")
    axes.set_xscale("log")
    axes.set_xlim(left=least / 2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("δ")
    axes.set_ylabel("user-level ε")


def _draw_tradeoff(axes: Axes, curve: PrivacyCurve) -> None:
    type_one = np.concatenate([[0.0], np.geomspace(1e-9, 1e-2, 200), np.linspace(0.01, 1, 400)[1:]])
    axes.plot([0, 1], [1, 0], color=GREY, linestyle="--", linewidth=1, label="guessing (perfect privacy)")
    axes.plot(type_one, curve.tradeoff(type_one), color=COLOUR, linewidth=1.8, label="no attack gets below")
    axes.set_aspect("equal")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("type I error: an absent user called present")
    axes.set_ylabel("type II error: a present user missed")
