"""The report of a sweep: results.json, figures, and one HTML file that opens from disk."""

import math
from pathlib import Path
from typing import Any

from experiments.prediction import Prediction
from experiments.report.markdown import write_markdown
from experiments.report.page import write_page
from experiments.report.sweep_figures import plot_group_sizes, plot_outcomes, several_group_sizes
from experiments.sweep.points import ARM_TITLES
from experiments.sweep.results import cells_of, cost_of_sweep, lead
from fedsim.config import RunConfig
from fedsim.plan import ALGORITHMS
from fedsim.privacy.events import Adjacency
from server.run_folder import write_json

HEADINGS = ("", "ε", "B", "G", "learning rate", "clip", "test loss", "± 95 %", "perplexity", "seeds")


def write_sweep_report(
    folder: Path,
    common: RunConfig,
    rows: list[dict[str, Any]],
    predictions: dict[tuple[float, int], Prediction],
    failures: dict[str, str],
) -> Path:
    """Write results.json, the figures, report.md and report.html into the sweep's folder; returns the page.

    Args:
        folder: The sweep's folder.
        common: What all points share.
        rows: Finished points (experiments.sweep.results.collect).
        predictions: The planner's, by (ε, gradients a round).
        failures: Last line of the traceback of each failed point, by name.
    """
    cells = cells_of(rows)
    pretrained = sum(row["test_loss_before"] for row in rows) / len(rows)
    private = [row for row in rows if row["arm"] != "nonprivate"]
    cost = cost_of_sweep(folder, rows, common.plan.delta, Adjacency(common.plan.adjacency)) if private else 0.0
    compared = [outcome(cells, key, prediction) for key, prediction in sorted(predictions.items())]
    outcomes = [item for item in compared if item is not None]
    figures = draw(folder, cells, pretrained)
    cost_words = cost_in_words(len(private), cost, common.plan.delta)
    write_json(
        folder / "results.json",
        {
            "pretrained_loss": pretrained,
            "points": [_finite(row) for row in rows],
            "cells": [_finite(cell) for cell in cells],
            "planner": outcomes,
            "privacy_cost": {"epsilon": cost, "delta": common.plan.delta, "in_words": cost_words},
            "failures": failures,
        },
    )
    table = [_cell_row(cell) for cell in cells]
    write_markdown(folder / "report.md", HEADINGS, table, outcomes, cost_words)
    return write_page(
        folder / "report.html",
        "sweep.html",
        figures,
        title="ULS and ELS at fixed compute",
        headings=HEADINGS,
        rows=table,
        pretrained=f"{pretrained:.4f}",
        outcomes=outcomes,
        cost=cost_words,
        private_statistics=sorted({name for p in predictions.values() for name in p.private_statistics}),
        failures=failures,
    )


def draw(folder: Path, cells: list[dict[str, Any]], pretrained: float) -> dict[str, Path]:
    """The figures, by caption; none against an axis on which there is a single place."""
    axes = {"epsilon": "user-level ε", "gradients_per_round": "gradient evaluations a round"}
    figures: dict[str, Path] = {}
    for against, label in axes.items():
        if len({cell[against] for cell in cells if cell["arm"] != "nonprivate"}) < 2:
            continue
        short = "epsilon" if against == "epsilon" else "compute"
        path = plot_outcomes(cells, pretrained, against, label, folder / f"loss_against_{short}.png")
        figures[f"Loss on held-out users against {short}; intervals of 95 % over seeds"] = path
        path = plot_outcomes(
            cells, pretrained, against, label, folder / f"perplexity_against_{short}.png", math.exp, "perplexity"
        )
        figures[f"Perplexity on held-out users against {short}"] = path
    if tried := several_group_sizes(cells):
        figures["Loss by group size; intervals of 95 % over seeds"] = plot_group_sizes(
            tried, folder / "group_sizes.png"
        )
    return figures


def outcome(cells: list[dict[str, Any]], key: tuple[float, int], prediction: Prediction) -> dict[str, Any] | None:
    """Prediction beside outcome at one ε and compute; None while one of the algorithms has no finished point."""
    best = {cell["arm"]: cell["best"] for cell in cells if (cell["epsilon"], cell["gradients_per_round"]) == key}
    if not best.keys() >= ALGORITHMS.keys():
        return None
    difference, half = lead(best["uls"], best["els"])
    observed = None  # a single seed tells nothing
    if half is not None:
        observed = "level" if abs(difference) <= half else ("uls" if difference > 0 else "els")
    expected = prediction.arms[0]
    groups = {
        f"{when}_{name}_group_size": size
        for name in ALGORITHMS
        for when, size in (
            ("predicted", expected.plans[name].group_size),
            ("observed", best[name]["group_size"]),
        )
    }
    return {
        "epsilon": key[0],
        "gradients_per_round": key[1],
        "norms": expected.curve.name,
        "predicted_winner": expected.winner,
        "predicted_els_over_uls_noise": expected.ratio,
        "observed_winner": observed,
        "observed_lead_of_uls": difference,
        "observed_half_width": half,
        "agrees": None if observed is None else expected.winner == observed,
        **groups,
        "advice": prediction.to_json()["advice"],
    }


def cost_in_words(runs: int, epsilon: float, delta: float) -> str:
    """What it would cost to release the best of the sweep's models."""
    total = f"({epsilon:.1f}, {delta:g})" if math.isfinite(epsilon) else "no finite ε"
    return (
        f"Each of the {runs} private points meets its own ε. Choosing settings by loss on private users looks at all "
        f"of them: together they are {total}-differentially private at user level. A single release tuned on public "
        "data costs only its own ε. The noise seeds of these points are known: none of their models may be released."
    )


def _cell_row(cell: dict[str, Any]) -> list[str]:
    best, private = cell["best"], cell["arm"] != "nonprivate"
    return [
        ARM_TITLES[cell["arm"]],
        f"{cell['epsilon']:g}" if private else "∞",
        f"{cell['gradients_per_round']:,}",
        str(best["group_size"]) if private else "–",
        f"{best['learning_rate']:g}",
        f"{best['clip_norm']:g}" if private else "–",
        f"{best['loss']:.4f}",
        "–" if best["half_width"] is None else f"{best['half_width']:.4f}",
        f"{math.exp(best['loss']):.2f}",
        str(best["seeds"]),
    ]


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: null stands for no privacy."""
    return {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in values.items()}
