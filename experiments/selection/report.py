"""The report of a private selection: results.json, report.md and one HTML page; nothing that stays secret is in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.report.markdown import table
from experiments.report.page import write_page, written_later
from experiments.selection.words import score_in_words
from server.results.run_folder import write_json

RESULTS = "results.json"
"""In the selection's folder, by the name that a sweep's results have."""
HEADINGS = ("", "B", "G", "learning rate", "clip", "bands", "average", "change of held-out loss, with noise")


def write_report(folder: Path, statement: Mapping[str, Any], cost: str) -> Path:
    """Write the report; returns the page.

    Args:
        folder: The selection's folder.
        statement: Of the released model.
        cost: The total, in words.
    """
    selection = statement["selection"]
    chosen = selection["selected"]
    row = [
        str(chosen["arm"]).upper(),
        f"{chosen['gradients_per_round']:,}",
        str(chosen["group_size"]),
        f"{chosen['learning_rate']:g}",
        f"{chosen['clip_norm']:g}",
        str(chosen["bands"]),
        str(chosen["average"]),
        f"{selection['private_change']:+.4f}",
    ]
    with written_later(folder, "the selection itself", "the command of the sweep: nothing is run again"):
        results = {
            "privacy_cost": {"epsilon": statement["epsilon"]["upper"], "delta": statement["delta"], "in_words": cost},
            "selection": selection,
        }
        write_json(folder / RESULTS, results)
        score = score_in_words(selection)
        text = [cost, selection["in_words"], table(HEADINGS, [row]), score]
        (folder / "report.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
        return write_page(
            folder / "report.html",
            "selection.html",
            (),
            title="A private selection",
            cost=cost,
            selection=selection["in_words"],
            score=score,
            statement=statement["in_words"],
            headings=HEADINGS,
            rows=[row],
        )
