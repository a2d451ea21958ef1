"""The report of a run or a comparison: one HTML file that opens from disk, and the table of the terminal."""

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.report.arms.arm import Arm, arms_in, label
from experiments.report.arms.glance import at_a_glance
from experiments.report.arms.guarantee import guarantee
from experiments.report.arms.not_private import alarms, not_private
from experiments.report.arms.samples import read_samples, write_samples
from experiments.report.arms.times import times_table
from experiments.report.figures.curves import training_figures
from experiments.report.page import write_page, written_later
from experiments.together import FinishedRun, Together
from fedsim.errors import InvalidInput
from fedsim.plan import ALL_EXAMPLES
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
    "private_change": "private change of the loss",
    "private_change_std": "its standard deviation",
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
    """What releasing the models of all finished arms of a comparison costs; None for a single one.

    Raises:
        InvalidInput: When the folder holds no finished run.
        LedgerDamaged: When a ledger is not what was written.
    """
    arms = sorted((path.parent for path in folder.glob("*/summary.json")), key=lambda arm: arm.name, reverse=True)
    if not arms:
        raise InvalidInput("folder", str(folder), "a folder with a finished run", "No summary.json was found in it.")
    if len(arms) < 2:
        return None
    return Together.of([FinishedRun.read(arm.name, arm) for arm in arms])


def write_report(folder: Path, samples: Sequence[str] = ()) -> Path:
    """Write report.html for a run folder, or for a comparison's folder of runs; of runs that go on, how far they are.

    Args:
        folder: The folder.
        samples: Prompts that the models before and after training go on with; without any the report shows what is
            there of an earlier time.

    Raises:
        InvalidInput: When the folder holds no run.
        Failure: The disk refused the page: nothing else is missing.
    """
    arms = arms_in(folder)
    alone = arms[0].run.path == folder
    again = f"python -m experiments.run report {shlex.quote(str(folder))}"
    with written_later(folder, "the run itself" if alone else "the comparison itself", again):
        if samples:
            write_samples(arms, samples)
        return write_page(
            folder / "report.html",
            "report.html",
            training_figures({arm.name: arm.lines for arm in arms}),
            **_words(folder, arms, alone),
        )


def _words(folder: Path, arms: list[Arm], alone: bool) -> dict[str, Any]:
    """What the page says."""
    finished = [(arm, arm.summary) for arm in arms if arm.summary is not None]
    summaries = [summary for _, summary in finished]
    together = released_together(folder) if not alone and len(finished) > 1 else None
    private = [(arm.name, not_private(arm)) for arm in arms]
    prediction, from_users = read_prediction(folder), _predicted_from_users(folder)
    return {
        "title": "User-level private fine-tuning",
        "verdict": verdict(summaries) if summaries else "",
        "unfinished": [(arm.name, arm.unfinished) for arm in arms if arm.unfinished],
        "glance": at_a_glance(arms),
        "outcome": outcome(arms),
        "prediction": [] if from_users else prediction,
        "bands": noise_over_rounds(summaries),
        "samples": [(arm.name, found) for arm in arms if (found := read_samples(arm.run.path))],
        "statements": [(arm.name, arm.statement, guarantee(arm.statement)) for arm in arms if arm.statement],
        "as_json": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        "gradients": [(arm.name, paths) for arm in arms if (paths := _gradient_paths(arm.run))],
        "together": "" if together is None else together.in_words(),
        "alarms": [(arm.name, words) for arm in arms for words in alarms(arm, private=False)],
        "not_private": [(name, sentence) for name, sentences in private for sentence in sentences],
        "private_prediction": prediction if from_users else [],
        "times": times_table({arm.name: arm.lines for arm in arms}),
        "configs": [(arm.name, arm.run.config.read_text(encoding="utf-8")) for arm in arms],
    }


def outcome(arms: Sequence[Arm]) -> list[list[str]]:
    """A heading, then what came out of each finished arm, a row a value."""
    finished = [(arm.name, arm.summary) for arm in arms if arm.summary is not None]
    rows = [
        [heading, *(format_value(key, summary.get(key)) for _, summary in finished)]
        for key, heading in COLUMNS.items()
        if key in _told([summary for _, summary in finished])
        and (key.startswith(("test_", "private_")) or key in ("gradient_evaluations", "units_per_round", "weights"))
    ]
    return [["", *(name for name, _ in finished)], *rows] if finished else []


def _told(summaries: list[dict[str, Any]]) -> dict[str, str]:
    """The columns without those of private evaluations where there were none."""
    private = any("private_change" in summary for summary in summaries)
    return {key: heading for key, heading in COLUMNS.items() if private or not key.startswith("private_")}


def verdict(summaries: list[dict[str, Any]]) -> str:
    """What came out, in a sentence."""
    if any(summary.get("test_loss_after") is None for summary in summaries):
        return " ".join(f"{label(summary)}: {_released(summary)}" for summary in summaries)
    if len(summaries) == 1:
        return f"{label(summaries[0])}: the loss on held-out users {_change(_fall(summaries[0]))}."
    best, *others = sorted(summaries, key=lambda summary: summary["test_loss_after"])
    lead = others[0]["test_loss_after"] - best["test_loss_after"]
    falls = ", ".join(f"{label(summary)} {_fall(summary):+.4f}" for summary in summaries)
    return (
        f"{label(best)} did better on held-out users, by {lead:.4f} nats a token. "
        f"Fall of the loss against the pre-trained model: {falls}."
    )


def _released(summary: dict[str, Any]) -> str:
    """What was released of held-out users' losses, a sentence."""
    if summary.get("private_change") is None:
        return "of held-out users nothing is told of the final model."
    error = f"released with noise of standard deviation {summary['private_change_std']:.4f}"
    return f"the loss on held-out users {_change(-summary['private_change'])} ({error})."


def _change(fall: float) -> str:
    if math.isnan(fall):
        return "is no number"
    if abs(fall) < 5e-5:
        return "hardly changed: by less than 0.0001 nats a token"
    return f"{'fell' if fall > 0 else 'rose'} by {abs(fall):.4f} nats a token"


def _fall(summary: dict[str, Any]) -> float:
    """Of the loss on test users against the pre-trained model."""
    return float(summary["test_loss_before"] - summary["test_loss_after"])


def print_table(summaries: list[dict[str, Any]]) -> None:
    """The table of outcomes on the terminal: one column an arm, so that it fits narrow windows."""
    table = Table(title="Fine-tuned with user-level privacy", title_justify="left")
    table.add_column("")
    for summary in summaries:
        table.add_column(label(summary), justify="right")
    for key, heading in list(_told(summaries).items())[1:]:
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
    if key == "group_size" and value >= ALL_EXAMPLES:
        return "all"
    if key in {"gradient_evaluations", "units_per_round", "group_size", "bands"}:
        return f"{value:,.0f}"
    if key.startswith("test_accuracy"):
        return f"{value:.2%}"
    if key.startswith("test_perplexity") or key == "training_seconds":
        return f"{value:,.1f}"
    return f"{value:.4f}" if key.startswith("test_loss") else f"{value:.3f}"


def _gradient_paths(run: RunFolder) -> list[dict[str, Any]]:
    """Which ways gradients took on the workers, and each way's layers; none of a run of an earlier version."""
    if not run.paths.exists():
        return []
    return list(json.loads(run.paths.read_text(encoding="utf-8"))["gradients"])


def _predicted_from_users(folder: Path) -> bool:
    """Whether the planner read private users' data without noise."""
    path = folder / PREDICTION
    return path.exists() and bool(json.loads(path.read_text(encoding="utf-8")).get("private_statistics"))
