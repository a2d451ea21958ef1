"""Where the time of runs' rounds went, as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedsim.phases import PHASES, Times

Lines = Sequence[Mapping[str, Any]]
"""Of metrics.jsonl, in order."""


def times_of(lines: Lines) -> Times:
    """The times of all rounds that lines of metrics tell of; of no round where they tell of none."""
    total = Times(seconds={})
    for line in lines:
        if (told := line.get("not_private", {}).get("phases")) is not None:
            total = total.added(Times.from_json(told))
    return total


def times_table(arms: Mapping[str, Lines]) -> list[list[str]]:
    """A heading, then a row a phase: seconds a round and share of each arm, longest phases of the first arm first.

    Args:
        arms: Lines of metrics by the arm's name; arms without times are left out, and there is no table without any.
    """
    known = {name: times for name, lines in arms.items() if (times := times_of(lines)).rounds}
    if not known:
        return []
    longest = next(iter(known.values())).seconds
    phases = sorted(PHASES, key=lambda phase: -longest.get(phase, 0.0))
    shown = [phase for phase in phases if any(times.seconds.get(phase) for times in known.values())]
    rows = [["seconds a round", *known]]
    rows += [[phase, *(_cell(times, times.seconds.get(phase, 0.0)) for times in known.values())] for phase in shown]
    rows.append(["in all", *(_cell(times, times.whole) for times in known.values())])
    if any(times.beside for times in known.values()):
        beside = (f"{times.beside / times.rounds:.3g}" for times in known.values())
        rows.append(["noise drawn in the background, no part of the above", *beside])
    return rows


def _cell(times: Times, seconds: float) -> str:
    return f"{seconds / times.rounds:.3g} ({seconds / times.whole:.0%})"
