"""Records, summaries and options as flat names, which is what trackers take."""

from collections.abc import Mapping
from typing import Any

NOT_PRIVATE = "not_private"
NOT_PRIVATE_IN_SUMMARY = ("training_seconds", "seconds")
"""How long it took tells how much text was drawn, which no noise hides."""

Scalar = str | int | float | bool


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a record but for its round, by names like "not_private/norm_quantiles/0.5"; what is unknown is
    left out, and so are words."""
    return {
        name: float(value)
        for name, value in leaves(record, "/").items()
        if name != "round" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def outcome_of(summary: Mapping[str, Any], *, private_only: bool) -> dict[str, Scalar]:
    """A summary's single values, what is not private named so or left out; its lists are in summary.json alone."""
    found: dict[str, Scalar] = {}
    for name, value in summary.items():
        if name not in NOT_PRIVATE_IN_SUMMARY:
            found |= {name: value} if isinstance(value, Scalar) else {}
        elif value is not None and not private_only:
            found[f"{NOT_PRIVATE}/{name}"] = value
    return found


def options_of(config: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Scalar]:
    """What was set, by the options' names, and under "effective." the plan that came of it: its noise, its rounds."""
    effective = {f"effective.{name.replace('_', '-')}": value for name, value in leaves(plan, ".").items()}
    return {name: value for name, value in ({**config} | effective).items() if isinstance(value, Scalar)}


def leaves(values: Mapping[str, Any], between: str) -> dict[str, Any]:
    """Nested mappings as one, names joined; what is None is left out."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}{between}{inner}": leaf for inner, leaf in leaves(value, between).items()}
        elif value is not None:
            flat[name] = value
    return flat
