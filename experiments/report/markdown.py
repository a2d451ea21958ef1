"""A sweep's tables as Markdown, for documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

GAINS = (
    *("", "ε", "B", "bands", "noise, predicted", "loss, independent", "loss, correlated"),
    *("gain, predicted", "gain", "half the noise is worth"),
)
"""What correlated noise promised and gained."""
PREDICTED = (
    *("ε", "B", "predicted", "ELS/ULS noise", "observed", "ELS − ULS loss"),
    *("ULS G, pred. / obs.", "ELS G, pred. / obs."),
)
"""What the planner predicted, and what came out."""


def write_markdown(
    path: Path,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    outcomes: Sequence[dict[str, Any]],
    gains: Sequence[Sequence[str]],
    notes: Sequence[str],
) -> None:
    """Write the table of outcomes, the planner's predictions beside them, and what the sweep cost.

    Args:
        path: The file.
        headings: Of the table of outcomes.
        rows: Its cells.
        outcomes: Of experiments.report.sweep.outcome.
        gains: What correlated noise gained, under GAINS; may be empty.
        notes: The last paragraphs.
    """
    predicted = [predicted_row(outcome) for outcome in outcomes]
    text = [table(headings, rows), table(PREDICTED, predicted), *([table(GAINS, gains)] if gains else []), *notes]
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")


def predicted_row(outcome: dict[str, Any]) -> list[str]:
    """Prediction beside outcome at one ε and compute, under PREDICTED."""
    half = outcome["observed_half_width"]
    return [
        f"{outcome['epsilon']:g}",
        f"{outcome['gradients_per_round']:,}",
        outcome["predicted_winner"].upper(),
        f"{outcome['predicted_els_over_uls_noise']:.2f}",
        str(outcome["observed_winner"] or "one seed").upper(),
        f"{outcome['observed_lead_of_uls']:+.4f}" + ("" if half is None else f" ± {half:.4f}"),
        f"{outcome['predicted_uls_group_size']} / {outcome['observed_uls_group_size']}",
        f"{outcome['predicted_els_group_size']} / {outcome['observed_els_group_size']}",
    ]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
