"""The report of a sweep: results.json, figures, and one HTML file that opens from disk."""

import math
from pathlib import Path
from typing import Any

from experiments.prediction import Prediction
from experiments.report.markdown import write_markdown
from experiments.report.page import write_page
from experiments.report.sweep_figures import plot_group_sizes, plot_outcomes
from experiments.sweep.results import cells, cost_of_sweep, lead
from fedsim.config import RunConfig
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
    found = cells(rows)
    pretrained = sum(row["test_loss_before"] for row in rows) / len(rows)
    private = [row for row in rows if row["arm"] != "nonprivate"]
    cost = cost_of_sweep(folder, rows, common.plan.delta, Adjacency(common.plan.adjacency)) if private else 0.0
    compared = [outcome(found, key, prediction) for key, prediction in sorted(predictions.items())]
    outcomes = [item for item in compared if item is not None]
    figures = draw(folder, found, pretrained)
    cost_words = cost_in_words(len(private), cost, common.plan.delta)
    write_json(
        folder / "results.json",
        {
            "pretrained_loss": pretrained,
            "points": [_finite(row) for row in rows],
            "cells": [_finite(cell) for cell in found],
            "planner": outcomes,
            "privacy_cost": {"epsilon": cost, "delta": common.plan.delta, "in_words": cost_words},
            "failures": failures,
        },
    )
    table = [_cell_row(cell) for cell in found]
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


def draw(folder: Path, found: list[dict[str, Any]], pretrained: float) -> dict[str, Path]:
    """The figures, by caption."""
    axes = {"epsilon": "user-level ε", "gradients_per_round": "gradient evaluations a round"}
    figures: dict[str, Path] = {}
    if any(cell["arm"] != "nonprivate" for cell in found):
        for against, label in axes.items():
            short = "epsilon" if against == "epsilon" else "compute"
            path = plot_outcomes(found, pretrained, against, label, folder / f"loss_against_{short}.png")
            figures[f"Loss on held-out users against {short}; intervals of 95 % over seeds"] = path
            path = plot_outcomes(
                found, pretrained, against, label, folder / f"perplexity_against_{short}.png", math.exp, "perplexity"
            )
            figures[f"Perplexity on held-out users against {short}"] = path
    if any(len({setting["group_size"] for setting in cell["settings"]}) > 1 for cell in found):
        figures["Loss by group size"] = plot_group_sizes(found, folder / "group_sizes.png")
    return figures


def outcome(found: list[dict[str, Any]], key: tuple[float, int], prediction: Prediction) -> dict[str, Any] | None:
    """Prediction beside outcome at one ε and compute; None while one of the algorithms has no finished point."""
    here = {cell["arm"]: cell for cell in found if (cell["epsilon"], cell["gradients_per_round"]) == key}
    if not {"uls", "els"} <= set(here):
        return None
    difference, half = lead(here["uls"]["best"], here["els"]["best"])
    observed = None  # a single seed tells nothing
    if half is not None:
        observed = "level" if abs(difference) <= half else ("uls" if difference > 0 else "els")
    expected = prediction.arms[0]
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
        "predicted_uls_group_size": expected.plans["uls"].group_size,
        "observed_uls_group_size": here["uls"]["best"]["group_size"],
        "predicted_els_group_size": expected.plans["els"].group_size,
        "observed_els_group_size": here["els"]["best"]["group_size"],
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
        cell["arm"].upper() if private else "no privacy",
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
