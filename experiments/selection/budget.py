"""What one run of a private selection may spend, so that the release costs what was asked for in total."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.selection.options import SelectionConfig
from experiments.selection.runs import at
from experiments.sweep.points import Point
from fedsim.config import RunConfig
from fedsim.errors import InvalidInput
from fedsim.plan import UserSizes
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.best_of import BestOf
from fedsim.privacy.bounds import Bounds, shown_above
from fedsim.privacy.events import Adjacency, Composed, Event, OneOf
from fedsim.privacy.selection import best_of
from fedsim.privacy.splits import HELD_OUT, SPLITS, TRAINING, OfSplit, of_split

_NOWHERE = Path()
CLOSE = 5e-3
"""Share of the total that may stay unspent."""
TRIES = 12


@dataclass(frozen=True, kw_only=True)
class SelectionBudget:
    """What the runs release, and what the best of them costs.

    Attributes:
        run_epsilon, score_epsilon: ε of one run to a user who is trained on, and to one who scores it.
        event: The release.
        epsilon: Certified bounds on its ε.
        composed: An upper bound on ε of releasing one run of every setting instead.
    """

    run_epsilon: float
    score_epsilon: float
    event: BestOf
    epsilon: Bounds
    composed: float


def budget_of(
    settings: Sequence[Point], common: RunConfig, sizes: UserSizes, held_out: int, options: SelectionConfig
) -> SelectionBudget:
    """What one run may spend, at least all but a two-hundredth of what would be too much.

    Args:
        settings: The grid.
        common: What the runs share; its plan.epsilon and plan.delta are those of the release.
        sizes: Of the training users.
        held_out: Users who score.
        options: The law of how many runs there are.

    Raises:
        InvalidInput: The score alone costs too much, or no run leaves room.
    """
    total, delta, adjacency = common.plan.epsilon, common.plan.delta, Adjacency(common.plan.adjacency)
    if math.isinf(total):
        raise InvalidInput("plan.epsilon", total, "finite with --select private")

    def spent(epsilon: float) -> tuple[BestOf, Bounds, float]:
        score = common.evaluation.private_epsilon if common.evaluation.private else epsilon
        events = _events(settings, common, sizes, held_out, epsilon, score)
        event = best_of(*events, expected_runs=options.runs, eta=options.eta)
        return event, epsilon_bounds(event, delta, adjacency=adjacency), score

    if common.evaluation.private:
        _require_room_for_score(settings, common, held_out, options)
    least = common.evaluation.private_epsilon if common.evaluation.private else 0.0
    epsilon, found = max(total / 1.5, least), None
    for _ in range(TRIES):
        event, bounds, score = spent(epsilon)
        if bounds.upper <= total and (found is None or epsilon > found[0]):
            found = epsilon, event, bounds, score
        if found is not None and found[2].upper >= (1 - CLOSE) * total:
            break
        if epsilon == least and bounds.upper > total:
            raise _no_room(least, total, f"Runs of at least as much come to {shown_above(bounds.upper)}")
        # What a selection costs is nearly proportional to what a run does.
        epsilon = max(epsilon * (1 - CLOSE / 4) * total / bounds.upper, least)
    if found is None:
        raise InvalidInput("plan.epsilon", total, "larger", "No noise leaves room for a selection among so many runs.")
    epsilon, event, bounds, score = found
    every = _events(settings, common, sizes, held_out, epsilon, score, alike=False)
    splits = (Composed(events=tuple(of_split(one, split) for one in every)) for split in SPLITS)
    composed = epsilon_bounds(OneOf(events=tuple(splits)), delta, adjacency=adjacency, tolerance=0.01).upper
    return SelectionBudget(run_epsilon=epsilon, score_epsilon=score, event=event, epsilon=bounds, composed=composed)


def _events(
    settings: Sequence[Point],
    common: RunConfig,
    sizes: UserSizes,
    held_out: int,
    epsilon: float,
    score: float,
    *,
    alike: bool = True,
) -> tuple[Event, ...]:
    """What a run of each setting releases to users who are trained on, or to those who score; equal ones once."""
    known: dict[object, Event] = {}
    found: list[Event] = []
    for setting in settings:
        run = at(setting, 0, epsilon, score).config(common, _NOWHERE)
        # Neither learning rate nor clip norm nor average has a part in what is released about whom.
        key = (setting.arm, setting.group_size, setting.gradients_per_round, setting.bands, run.plan.rounds)
        if key not in known:
            training = run.plan_for(sizes).event()
            evaluation = run.private_evaluation(held_out)
            scored = () if evaluation is None else (OfSplit(event=evaluation.event, split=HELD_OUT),)
            known[key] = OneOf(events=(OfSplit(event=training, split=TRAINING), *scored))
        found.append(known[key])
    return tuple(dict.fromkeys(found)) if alike else tuple(found)


def _require_room_for_score(
    settings: Sequence[Point], common: RunConfig, held_out: int, options: SelectionConfig
) -> None:
    """Refuse a score whose ε alone, selected by, is above the total."""
    score, delta = common.evaluation.private_epsilon, common.plan.delta
    run = at(settings[0], 0, max(score, common.plan.epsilon), score).config(common, _NOWHERE)
    evaluation = run.private_evaluation(held_out)
    assert evaluation is not None
    event = best_of(evaluation.event, expected_runs=options.runs, eta=options.eta)
    alone = epsilon_bounds(event, delta, adjacency=Adjacency(common.plan.adjacency)).upper
    if alone > common.plan.epsilon:
        raise _no_room(score, common.plan.epsilon, f"It alone comes to {shown_above(alone)}")


def _no_room(score: float, total: float, because: str) -> InvalidInput:
    """What to say of a score that costs too much."""
    allowed = f"so much that selecting by it stays within plan.epsilon, {total:g}"
    hint = f"{because}; leave out --evaluation.private to have it chosen."
    return InvalidInput("evaluation.private-epsilon", score, allowed, hint)
