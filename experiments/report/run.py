"""The report of a run or a comparison: one HTML file that opens from disk, and the table of the terminal."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.report.curves import Curves, plot_run
from experiments.report.page import write_page
from experiments.report.times import times_table
from experiments.together import FinishedRun, Together
from fedsim.errors import InvalidInput
from server.results.run_folder import RunFolder

COLUMNS = {
    "algorithm": "algorithm",
    "mechanism": "mechanism",
    "epsilon": "ε",
    "noise_multiplier": "σ",
    "bands": "bands",
    "group_size": "G",
    "units_per_round": "cohort or batch",
    "gradient_evaluations": "gradient evaluations",
    "weights": "weights measured and exported",
    "test_loss_before": "loss before",
    "test_loss_after": "loss after",
    "test_perplexity_before": "perplexity before",
    "test_perplexity_after": "perplexity after",
    "test_accuracy_before": "accuracy before",
    "test_accuracy_after": "accuracy after",
    "training_seconds": "seconds",
}
"""Columns of the table, in order: key of a summary, heading."""


COMPARISON = "comparison.json"
"""The arms' summaries, and what releasing all of their models costs, in a comparison's folder."""
PREDICTION = "prediction.json"
"""What the planner expected before training, in a comparison's folder."""


def read_prediction(folder: Path) -> list[str]:
    """The planner's expectation in sentences; none where it was not asked."""
    path = folder / PREDICTION
    return list(json.loads(path.read_text(encoding="utf-8"))["in_words"]) if path.exists() else []


def released_together(folder: Path) -> Together | None:
    """What releasing the models of all arms of a comparison costs; None for a single one.

    Raises:
        InvalidInput: When the folder holds no finished run.
        LedgerDamaged: When a ledger is not what was written.
    """
    arms = _arms(folder)
    if len(arms) < 2:
        return None
    return Together.of([FinishedRun.read(arm.name, arm) for arm in arms])


def write_report(folder: Path) -> Path:
    """Write report.html and its figures for a run folder, or for a comparison's folder of runs.

    Raises:
        InvalidInput: When the folder holds no finished run.
    """
    arms = [folder] if (folder / "summary.json").exists() else _arms(folder)
    runs = [(RunFolder(arm), json.loads((arm / "summary.json").read_text(encoding="utf-8"))) for arm in arms]
    curves: Curves = {label(summary): run.read_metrics() for run, summary in runs}
    summaries = [summary for _, summary in runs]
    together = None if arms == [folder] else released_together(folder)
    figures = plot_run(curves, folder)
    for run, summary in runs:
        if run.path != folder:
            plot_run({label(summary): run.read_metrics()}, run.path)
    return write_page(
        folder / "report.html",
        "report.html",
        figures,
        title="User-level private fine-tuning",
        verdict=verdict(summaries),
        prediction=read_prediction(folder),
        bands=noise_over_rounds(summaries),
        columns=COLUMNS,
        rows=[[format_value(key, summary.get(key)) for key in COLUMNS] for summary in summaries],
        statements=[(label(summary), _statement(run)) for run, summary in runs],
        gradients=[(label(summary), paths) for run, summary in runs if (paths := _gradient_paths(run))],
        together="" if together is None else together.in_words(),
        alarms=[(label(summary), alarm["in_words"]) for _, summary in runs for alarm in summary.get("alarms", [])],
        not_private=[(label(summary), _not_private(run)) for run, summary in runs],
        times=times_table(curves),
        configs=[(label(summary), run.config.read_text(encoding="utf-8")) for run, summary in runs],
    )


def label(summary: dict[str, Any]) -> str:
    """An arm's name as people read it: the algorithm, and what sets it apart from plain Gaussian noise."""
    mechanism = summary.get("mechanism", "gaussian")
    title = str(summary["algorithm"]).upper()
    if summary.get("epsilon", 0.0) is None:
        return f"{title} without privacy"
    bands = summary.get("bands", 1)
    named = title if mechanism == "gaussian" else f"{title} {mechanism}"
    return named if bands == 1 else f"{named} with {bands} bands"


def verdict(summaries: list[dict[str, Any]]) -> str:
    """What came out, in a sentence."""
    gains = [f"{label(s)} {s['test_loss_before'] - s['test_loss_after']:+.4f}" for s in summaries]
    if len(summaries) == 1:
        return f"Held-out loss fell by {gains[0]} nats a token."
    best, *others = sorted(summaries, key=lambda summary: summary["test_loss_after"])
    lead = others[0]["test_loss_after"] - best["test_loss_after"]
    return (
        f"{label(best)} did better on held-out users, by {lead:.4f} nats a token. "
        f"Fall of the loss against the pre-trained model: {', '.join(gains)}."
    )


def print_table(summaries: list[dict[str, Any]]) -> None:
    """The table of outcomes on the terminal: one column an arm, so that it fits narrow windows."""
    table = Table(title="Fine-tuned with user-level privacy", title_justify="left")
    table.add_column("")
    for summary in summaries:
        table.add_column(label(summary), justify="right")
    for key, heading in list(COLUMNS.items())[1:]:
        table.add_row(heading, *(format_value(key, summary.get(key)) for summary in summaries))
    console = Console()
    console.print(table)
    console.print(verdict(summaries), highlight=False)
    for name, words in noise_over_rounds(summaries):
        console.print(f"{name}: {words}" if len(summaries) > 1 else words, highlight=False)


def noise_over_rounds(summaries: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Why noise is correlated over as many rounds as it is, by arm; nothing of arms that were not asked to."""
    return [(label(summary), summary["bands_in_words"]) for summary in summaries if "bands_in_words" in summary]


def format_value(key: str, value: Any) -> str:
    """A summary's value as people read it."""
    if value is None:
        return "∞: no privacy" if key == "epsilon" else "–"
    if isinstance(value, str):
        return value.upper() if key == "algorithm" else value
    if key in {"gradient_evaluations", "units_per_round", "group_size", "bands"}:
        return f"{value:,.0f}"
    if key.startswith("test_accuracy"):
        return f"{value:.2%}"
    if key.startswith("test_perplexity") or key == "training_seconds":
        return f"{value:,.1f}"
    return f"{value:.4f}" if key.startswith("test_loss") else f"{value:.3f}"


def _arms(folder: Path) -> list[Path]:
    arms = sorted(path.parent for path in folder.glob("*/summary.json"))
    if not arms:
        raise InvalidInput("folder", str(folder), "a folder with a finished run", "No summary.json was found in it.")
    return sorted(arms, key=lambda arm: arm.name, reverse=True)


def _gradient_paths(run: RunFolder) -> list[dict[str, Any]]:
    """Which ways gradients took on the workers, and each way's layers; none of a run of an earlier version."""
    if not run.paths.exists():
        return []
    return list(json.loads(run.paths.read_text(encoding="utf-8"))["gradients"])


def _statement(run: RunFolder) -> dict[str, Any]:
    """The privacy statement, without what an audit of an earlier version put there of the run's own users."""
    statement: dict[str, Any] = json.loads(run.privacy.read_text(encoding="utf-8"))
    if "audit" in statement:
        statement["audit"] = {key: value for key, value in statement["audit"].items() if key != "black_box"}
    return statement


def _not_private(run: RunFolder) -> list[str]:
    """What the folder holds that was computed from training users without noise, a sentence each."""
    lines = run.read_metrics()
    statistics: dict[str, Any] = lines[-1].get("not_private", {}) if lines else {}
    numbers = {key: value for key, value in statistics.items() if not isinstance(value, dict)}  # phases have a table
    shown = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in numbers.items())
    sentences = [f"last round: {shown}"] if shown else []
    for path, holder in ((run.audit_not_private, None), (run.privacy, "audit")):
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        found = (values if holder is None else values.get(holder, {})).get("black_box", ())
        sentences += [f"audit ({path.name}): {finding['in_words']}" for finding in found]
    return sentences
