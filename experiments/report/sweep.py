"""The report of a sweep: results.json, figures, and one HTML file that opens from disk."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.plan.words import from_private_data
from experiments.prediction import Prediction
from experiments.report.figures.sweep import draw
from experiments.report.markdown import GAINS, PREDICTED, predicted_row, write_markdown
from experiments.report.page import write_page, written_later
from experiments.sweep.clipping import in_words
from experiments.sweep.points import ARM_TITLES
from experiments.sweep.results import cells_of, cost_of_sweep, gains_of_bands, lead
from experiments.together import Together
from fedsim.plan import ALGORITHMS
from fedsim.plan.bands import AUTO
from server.results.run_folder import write_json

RESULTS = "results.json"
"""A sweep's results, in its folder."""
HEADINGS = (
    *("", "ε", "B", "G", "learning rate", "clip", "bands", "average"),
    *("test loss", "± 95 %", "perplexity", "seeds"),
)


def write_sweep_report(
    folder: Path,
    rows: list[dict[str, Any]],
    finished: list[dict[str, Any]],
    predictions: dict[tuple[float, int], Prediction],
    failures: dict[str, str],
    chosen: bool = False,
    left_out: Sequence[str] = (),
    *,
    looked: bool = False,
) -> Path:
    """Write results.json, the figures, report.md and report.html into the sweep's folder; returns the page.

    Args:
        folder: The sweep's folder.
        rows: The sweep's finished points (experiments.sweep.results.collect).
        finished: All finished points of the folder, those of an earlier, other grid too: somebody has seen them.
        predictions: The planner's, by (ε, gradients a round).
        failures: Last line of the traceback of each failed point, by name.
        chosen: Whether some points were trained because of what others gave.
        left_out: Names of points that did not run because a larger clip norm does the same.
        looked: Whether what was clipped of training users decided that.

    Raises:
        Failure: The disk refused: nothing but the report is missing.
    """
    with written_later(folder, "the sweep itself", "the command of the sweep: finished points are not run again"):
        return _write(folder, rows, finished, predictions, failures, chosen, left_out, looked)


def _write(
    folder: Path,
    rows: list[dict[str, Any]],
    finished: list[dict[str, Any]],
    predictions: dict[tuple[float, int], Prediction],
    failures: dict[str, str],
    chosen: bool,
    left_out: Sequence[str],
    looked: bool,
) -> Path:
    cells = cells_of(rows)
    pretrained = sum(row["test_loss_before"] for row in rows) / len(rows)
    cost = cost_of_sweep(folder, finished, chosen, looked=looked)
    free = sum(row["arm"] == "nonprivate" for row in finished)
    compared = [outcome(cells, key, prediction) for key, prediction in sorted(predictions.items())]
    outcomes = [item for item in compared if item is not None]
    gains = gains_of_bands(cells)
    skipped = in_words(left_out)
    cost_words = " ".join(filter(None, [skipped, cost_in_words(cost, free)]))
    write_json(
        folder / RESULTS,
        {
            "pretrained_loss": pretrained,
            "points": [_finite(row) for row in rows],
            "cells": [_finite(cell) for cell in cells],
            "planner": outcomes,
            "bands": gains,
            "privacy_cost": privacy_cost(cost, free),
            "left_out": {"points": list(left_out), "in_words": skipped},
            "failures": failures,
        },
    )
    table = [_cell_row(cell) for cell in cells]
    mark = from_private_data(sorted({name for p in predictions.values() for name in p.private_statistics}))
    predicted = mark and f"The planner's predictions. {mark}"
    notes = [*filter(None, [predicted]), cost_words]
    correlated = [gain_row(gain) for gain in gains]
    write_markdown(folder / "report.md", HEADINGS, table, outcomes, correlated, notes)
    return write_page(
        folder / "report.html",
        "sweep.html",
        draw(folder, cells, pretrained),
        title="ULS and ELS at fixed compute",
        headings=HEADINGS,
        rows=table,
        pretrained=f"{pretrained:.4f}",
        prediction_headings=PREDICTED,
        predictions=[predicted_row(item) for item in outcomes],
        gain_headings=GAINS,
        gains=correlated,
        cost=cost_words,
        predicted=predicted,
        failures=failures,
    )


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


def gain_row(gain: dict[str, Any]) -> list[str]:
    """What correlated noise gained in one cell, under GAINS."""
    half = "" if gain["half_width"] is None else f" ± {gain['half_width']:.4f}"
    return [
        ARM_TITLES[gain["arm"]],
        f"{gain['epsilon']:g}",
        f"{gain['gradients_per_round']:,}",
        f"{gain['bands_used']}" + (" (auto)" if gain["bands"] == AUTO else ""),
        f"{gain['predicted_noise_ratio']:.2f}",
        f"{gain['loss_of_independent_noise']:.4f}",
        f"{gain['loss']:.4f}",
        _signed(gain["predicted_gain"]),
        f"{gain['gain']:+.4f}{half}",
        _signed(gain["loss_saved_by_half_the_noise"]),
    ]


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}"


def privacy_cost(cost: Together | None, free: int) -> dict[str, Any]:
    """What the sweep cost, as JSON values; ε is null where none is claimed or finite."""
    bounds = None if cost is None else cost.epsilon
    return {
        "epsilon": bounds.upper if bounds is not None and math.isfinite(bounds.upper) else None,
        "delta": None if cost is None else cost.delta,
        "private_points": 0 if cost is None else cost.models,
        "points_without_privacy": free,
        "unclaimed": None if cost is None else cost.unclaimed or None,
        "in_words": cost_in_words(cost, free),
    }


def cost_in_words(cost: Together | None, free: int) -> str:
    """What the models of a sweep cost, and what choosing by its results does.

    Args:
        cost: Of all private points; None where there are none.
        free: Points without privacy.
    """
    sentences = []
    if cost is not None:
        sentences.append(
            f"Each of the {cost.models} private points in this folder meets its own ε, for its own model alone."
        )
        if cost.epsilon is None:
            sentences.append(f"What their models cost together is not stated: {cost.unclaimed}.")
        else:
            sentences.append(
                f"The models of these {cost.models} points together are {cost.guarantee}-differentially private at "
                "user level, by composition: no two share their sampling or noise."
            )
    if free:
        sentences.append(
            f"{free} points were trained on the same users without privacy (ε = ∞): whoever chooses settings with an "
            "eye on these has no finite ε for the choice."
        )
    sentences.append(
        "Losses on validation users, by which settings are chosen here, were measured without noise: for those users "
        "no choice has a finite ε, unless they are public. A single release with settings tuned on public data costs "
        "only its own ε."
    )
    if cost is not None:
        sentences.append(cost.warning())
    return " ".join(filter(None, sentences))


def _cell_row(cell: dict[str, Any]) -> list[str]:
    best, private = cell["best"], cell["arm"] != "nonprivate"
    return [
        ARM_TITLES[cell["arm"]],
        f"{cell['epsilon']:g}" if private else "∞",
        f"{cell['gradients_per_round']:,}",
        str(best["group_size"]) if private else "–",
        f"{best['learning_rate']:g}",
        f"{best['clip_norm']:g}" if private else "–",
        str(best["bands_used"]) if private else "–",
        best["average"],
        f"{best['loss']:.4f}",
        "–" if best["half_width"] is None else f"{best['half_width']:.4f}",
        f"{math.exp(best['loss']):.2f}",
        str(best["seeds"]),
    ]


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: null stands for no privacy."""
    return {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in values.items()}
