"""A result of `account`, for people."""

import math
from typing import Any

from experiments.account import bands
from fedsim.privacy.bounds import shown_above, shown_below
from fedsim.privacy.comparisons import Comparison

PARAMETERS = (
    "noise_multiplier", "steps", "sampling_probability", "group_size", "cohort_size", "population_size", "most_units",
    "rounds_per_block", "groups",
)  # fmt: skip
"""Of a plan, in the order in which they are named."""


def in_words(result: dict[str, Any]) -> str:
    """A result for people."""
    epsilon = result["epsilon"]
    at = f"at δ = {result['delta']:g} ({result['adjacency']})"
    accounted = "" if result["tight"] else ", as far as it is accounted for here,"
    least = f"it is{accounted} at least {shown_below(epsilon['lower'] or 0.0)}"
    if epsilon["upper"] is None:
        lines = [f"user-level ε could not be bounded {at}", f"{least}, which is certified"]
    else:
        lines = [f"user-level ε ≤ {shown_above(epsilon['upper'])} {at}", f"{least}: both bounds are certified"]
    tolerance = result["tolerance"]
    if not tolerance["met"] and not result.get("selection"):
        lines.append(
            f"the tolerance of {tolerance['asked']:g} is missed: the bounds are {shown_above(tolerance['gap'])} of "
            "the upper one apart, and the true ε may be anywhere between"
        )
    lines += bands.in_words(result)
    if result["calibrated"]:
        lines.append(f"found: {dashed(result['calibrated'])} = {result[result['calibrated']]!r}")
    values = [f"{dashed(name)} {shown(result[name])}" for name in PARAMETERS if result.get(name) is not None]
    if values:
        lines.append(f"{result['algorithm'].upper()}, sampling {result['sampling']}: " + ", ".join(values))
    if selection := result.get("selection"):
        lines.append(
            f"of a selection: the best of {shown(selection['expected_runs'])} runs in expectation (η = "
            f"{shown(selection['eta'])}) by a private score, whose own ε is not counted here: held-out users pay it"
        )
    if "comparisons" in result:
        lines += ["", *_table(result["comparisons"])]
    if "plot" in result:
        lines.append(f"plot: {result['plot']}")
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    width = max(len(row["method"]) for row in rows)
    kinds = max(len(row["kind"]) for row in rows)
    found = [shown_above(math.inf if row["epsilon"] is None else row["epsilon"]) for row in rows]
    head = f"{'accountant'.ljust(width)}  {'kind'.ljust(kinds)}  {'ε':>10}"
    body = [
        f"{row['method'].ljust(width)}  {row['kind'].ljust(kinds)}  {text:>10}"
        for row, text in zip(rows, found, strict=True)
    ]
    return [head, *body, "Only the first certifies; an estimate may lie on either side of the true value."]


def as_row(row: Comparison) -> dict[str, Any]:
    return {"method": row.method, "kind": row.kind, "epsilon": finite(row.value)}


def dashed(name: str) -> str:
    """A field's name as an option's."""
    return name.replace("_", "-")


def shown(value: float) -> str:
    """A whole number in full, any other to six digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def finite(value: float) -> float | None:
    """null for what JSON cannot hold."""
    return value if math.isfinite(value) else None
