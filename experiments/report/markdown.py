"""A sweep's tables as Markdown, for documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

GAINS = (
    *("", "ε", "B", "bands", "noise, predicted", "loss, independent", "loss, correlated"),
    *("gain, predicted", "gain", "half the noise is worth"),
)
"""What correlated noise promised and gained."""


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
    predicted = [
        (
            f"{item['epsilon']:g}",
            str(item["gradients_per_round"]),
            item["predicted_winner"].upper(),
            f"{item['predicted_els_over_uls_noise']:.2f}",
            str(item["observed_winner"] or "one seed").upper(),
            f"{item['observed_lead_of_uls']:+.4f}"
            + ("" if item["observed_half_width"] is None else f" ± {item['observed_half_width']:.4f}"),
            f"{item['predicted_uls_group_size']} / {item['observed_uls_group_size']}",
            f"{item['predicted_els_group_size']} / {item['observed_els_group_size']}",
        )
        for item in outcomes
    ]
    heads = ("ε", "B", "predicted", "ELS/ULS noise", "observed", "ELS − ULS loss", "ULS G, pred. / obs.", "ELS G")
    text = [table(headings, rows), table(heads, predicted), *([table(GAINS, gains)] if gains else []), *notes]
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
