"""Whether an entry's ε holds, by two methods that share no code, and whether it is of its task."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.leaderboard.arguments import planned_event
from benchmarks.leaderboard.entry import Entry
from benchmarks.leaderboard.tasks import MADE_ALIKE, Task, task_named
from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds, flatten
from fedsim.privacy.best_of import BestOf
from fedsim.privacy.bounds import Bounds, shown_above
from fedsim.privacy.check import NotCheckable, Verdict, confirm
from fedsim.privacy.events import Adjacency, Event, from_json, to_json

UNIT, ADJACENCY = "user", Adjacency.ADD_OR_REMOVE_ONE_USER
"""What every ε of the board is about."""
SAME_NOISE = 0.01
"""Relative difference up to which the noise of an entry is that of its arguments: accountants of two versions find
the noise for an ε to about a thousandth. A forger gains what so much noise is worth, and pays for it in the ε that is
computed from the event."""


@dataclass
class Checked:
    """What came of an entry.

    Attributes:
        bounds: Certified bounds on the ε of its event at the task's δ; None where the event cannot be accounted for.
        faults: Sentences; an entry without any stands.
    """

    bounds: Bounds | None = None
    faults: list[str] = field(default_factory=list)


def check(entry: Entry) -> Checked:
    """Compute ε from the event, have it confirmed, and compare everything else with the task.

    Raises:
        InvalidInput: There is no such task.
    """
    task = task_named(entry.task)
    checked = Checked(faults=list(_not_the_tasks(entry, task)))
    try:
        event = from_json(entry.event)
        checked.bounds = bounds = epsilon_bounds(event, task.delta, adjacency=ADJACENCY)
        checked.faults += _claims(entry, task, event, bounds)
        if entry.arguments is not None:
            planned = planned_event(entry.arguments, task)
            checked.faults += _planned(entry, to_json(planned))
    except InvalidInput as refused:
        checked.faults.append(str(refused))
    return checked


def _not_the_tasks(entry: Entry, task: Task) -> Iterator[str]:
    kept = task.figures
    if entry.content != kept.content:
        yield f"its data has the content {entry.content[:12]}, that of {task.name} is {kept.content[:12]}"
    same = entry.weights == kept.weights
    if not same and (task.fetched or abs(entry.base_loss - kept.base_loss) > MADE_ALIKE):
        yield (
            f"its base model has the weights {entry.weights[:12]} and a loss of {entry.base_loss:.4f}, that of "
            f"{task.name} is {kept.weights[:12]} with {kept.base_loss:.4f}"
        )
    if entry.delta != task.delta:
        yield f"its δ is {entry.delta:g}, that of {task.name} is {task.delta:g}"
    if entry.unit != UNIT:
        yield f"its ε is about one {entry.unit}, and must be about one {UNIT} with all that they own"
    if entry.adjacency != ADJACENCY.value:
        yield f"its ε is for {entry.adjacency}, and must be for {ADJACENCY.value}"
    if task.tier(entry.epsilon) is None:
        largest = f"{task.tiers[-1]:g}, the largest tier of {task.name}"
        yield f"its ε is {shown_above(entry.epsilon)}, and must be at most {largest}"


def _claims(entry: Entry, task: Task, event: Event, bounds: Bounds) -> Iterator[str]:
    """What an entry says of its event, against both methods."""
    if not math.isfinite(bounds.upper):
        yield "its event has no finite ε at all"
        return
    if entry.epsilon < bounds.upper:
        yield (
            f"it states ε = {entry.epsilon:.6g}, and the accountant certifies no less than {bounds.upper:.6g} for its "
            f"event (at least {bounds.lower:.6g} is true)"
        )
    selected = any(isinstance(one, BestOf) for one in flatten(event))
    if selected != (entry.chosen == "private selection"):
        charged = "is charged" if selected else "is not charged"
        yield f"its settings were chosen {entry.chosen!r}, and a private selection {charged} in its event"
    try:
        found = confirm(event, task.delta, (0.0, entry.epsilon), ADJACENCY).upper
    except NotCheckable as unknown:
        yield f"the second method cannot confirm its event: {unknown}"
        return
    if found.verdict is not Verdict.CONFIRMED:
        yield (
            f"the second method finds δ = {found.delta} ± {found.error:.1g} at its ε of "
            f"{entry.epsilon:.6g}: {found.verdict.value}"
        )


def _planned(entry: Entry, planned: dict[str, Any]) -> Iterator[str]:
    for place, said, wanted in _differing(to_json(from_json(entry.event)), planned, "event"):
        yield f"its arguments plan {place} = {wanted!r}, and its event says {said!r}"
        return  # one is enough: the rest follows from it, or from a broken tree


def _differing(said: Any, wanted: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    """Places where two events differ, numbers by more than SAME_NOISE."""
    if isinstance(said, dict) and isinstance(wanted, dict) and set(said) == set(wanted):
        for name, value in said.items():
            yield from _differing(value, wanted[name], f"{place}.{name}")
    elif isinstance(said, list) and isinstance(wanted, list) and len(said) == len(wanted):
        for number, (one, other) in enumerate(zip(said, wanted, strict=True)):
            yield from _differing(one, other, f"{place}.{number}")
    elif isinstance(said, float) and isinstance(wanted, float):
        if not math.isclose(said, wanted, rel_tol=SAME_NOISE):
            yield place, said, wanted
    elif said != wanted:
        yield place, said, wanted
