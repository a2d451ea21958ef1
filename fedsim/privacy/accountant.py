"""Certified bounds on ε(δ) and δ(ε) of composed events."""

import functools
import math
import operator
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.privacy.best_of import BestOf
from fedsim.privacy.bounds import Bounds
from fedsim.privacy.cases import Cases, cases_of, together
from fedsim.privacy.certify import Question, certify
from fedsim.privacy.delta_curve import delta_curve
from fedsim.privacy.dominating_pairs import dominating_pair
from fedsim.privacy.events import (
    Adjacency,
    BinomialMixtureGaussian,
    Composed,
    Event,
    OfBlock,
    OfGroup,
    OneOf,
    PoissonSubsampledGaussian,
    Repeated,
)
from fedsim.privacy.gaussian_curve import composed_shift, gaussian_delta, gaussian_epsilon
from fedsim.privacy.gaussian_pairs import GaussianPair
from fedsim.privacy.grid_plan import Pairs
from fedsim.privacy.loss_cells import Floats
from fedsim.privacy.selection import added_epsilon, delta_above, selection_in, share_of
from fedsim.privacy.splits import OfSplit
from fedsim.privacy.unprotected import Unprotected
from fedsim.validation import require_at_least, require_between

LEAST_DELTA = 1e-280
"""Smaller ones are refused: grids end where less than a ten-millionth of δ is left, which floats must hold."""
COMPARED = 1e-6
"""The smallest δ down to which one run of a selection is looked at closely for what the selection adds to its ε, which
follows from larger ones."""


def epsilon_bounds(
    event: Event,
    delta: float,
    *,
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER,
    tolerance: float = 1e-3,
) -> Bounds:
    """The least ε at which the event is (ε, delta)-differentially private, between certified bounds."""
    accountant = Accountant(adjacency=adjacency)
    accountant.compose(event)
    return accountant.epsilon(delta, tolerance=tolerance)


def delta_bounds(
    event: Event,
    epsilon: float,
    *,
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER,
    tolerance: float = 1e-3,
) -> Bounds:
    """The least δ at which the event is (epsilon, δ)-differentially private, between certified bounds."""
    accountant = Accountant(adjacency=adjacency)
    accountant.compose(event)
    return accountant.delta(epsilon, tolerance=tolerance)


def delta_bounds_at(
    event: Event,
    epsilons: Floats,
    *,
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER,
    least_delta: float = 1e-12,
) -> tuple[Floats, Floats]:
    """Certified lower and upper bounds on δ at many ε, for little more than the price of one.

    Args:
        event: What is released.
        epsilons: ε ≥ 0, in any order, float64 [n].
        adjacency: Which data sets count as neighbours.
        least_delta: The smallest δ of interest; bounds below it may be far apart.

    Returns:
        float64 [n] each.

    Raises:
        InvalidInput: For an ε below 0.
    """
    epsilons = np.asarray(epsilons, dtype=np.float64)
    for wrong in epsilons[~(epsilons >= 0)][:1]:
        raise InvalidInput("epsilons", float(wrong), "at least 0")
    _require_known_groups(event, adjacency)
    most, least = cases_of(event), cases_of(event, least=True)
    curves = [_delta_curve(case, epsilons, adjacency, least_delta) for case in most]
    below = curves if least == most else [_delta_curve(case, epsilons, adjacency, least_delta) for case in least]
    return np.max([lower for lower, _ in below], axis=0), np.max([upper for _, upper in curves], axis=0)


def _delta_curve(
    counts: Counter[Event], epsilons: Floats, adjacency: Adjacency, least_delta: float
) -> tuple[Floats, Floats]:
    if Unprotected() in counts:
        return np.ones_like(epsilons), np.ones_like(epsilons)
    if (selection := selection_in(counts)) is not None:
        run = _one_run(selection, adjacency)
        return run.below(epsilons), delta_above(selection, epsilons, run.above)
    pairs = [(dominating_pair(one, adjacency), count) for one, count in _sorted(counts)]
    if not pairs:
        return np.zeros_like(epsilons), np.zeros_like(epsilons)
    shift = gaussian_shift(pairs)
    if np.isnan(shift):
        order = np.argsort(epsilons)
        places = np.argsort(order)
        lower, upper = delta_curve(pairs, epsilons[order], least_delta)
        return lower[places], upper[places]
    bounds = [gaussian_delta(shift, float(epsilon)) for epsilon in epsilons]
    return np.array([one.lower for one in bounds]), np.array([one.upper for one in bounds])


class Accountant:
    """Adds events up, and bounds their common (ε, δ).

    Args:
        adjacency: Which data sets count as neighbours.
    """

    def __init__(self, *, adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER) -> None:
        self.adjacency = adjacency
        self._most: Cases = [Counter()]
        self._least: Cases = [Counter()]

    def compose(self, event: Event, count: int = 1) -> "Accountant":
        """Add count independent releases of event, whose choice may depend on earlier releases.

        Raises:
            InvalidInput: For a release to a group of users, or one of several, where users are replaced.
        """
        require_at_least("count", count, 0)
        _require_known_groups(event, self.adjacency)
        added = Repeated(event=event, count=count)
        self._most = together(self._most, cases_of(added), least=False)
        self._least = together(self._least, cases_of(added, least=True), least=True)
        return self

    def epsilon(self, delta: float, *, tolerance: float = 1e-3) -> Bounds:
        """Bounds on ε at delta: certified and, unless an infinite loss has a probability of delta, finite.

        `Bounds.met` says whether they are as close together as the tolerance asks.
        """
        require_between("delta", delta, LEAST_DELTA, 1)
        return self._solve(delta=delta, tolerance=tolerance)

    def delta(self, epsilon: float, *, tolerance: float = 1e-3) -> Bounds:
        """Bounds on δ at epsilon."""
        require_at_least("epsilon", epsilon, 0)
        return self._solve(epsilon=epsilon, tolerance=tolerance)

    def _solve(self, *, epsilon: float | None = None, delta: float | None = None, tolerance: float) -> Bounds:
        require_between("tolerance", tolerance, 0, 1)
        question = Question(epsilon, delta, tolerance)
        return _bounds(self._most, self._least, self.adjacency, question)


@lru_cache(maxsize=256)
def bounds_of(counts: tuple[tuple[Event, int], ...], adjacency: Adjacency, question: Question) -> Bounds:
    """Bounds of events, each taken as often as its count says; their tolerance is the question's."""
    if any(event == Unprotected() for event, _ in counts):
        return Bounds(lower=math.inf, upper=math.inf) if question.delta is not None else Bounds(lower=1.0, upper=1.0)
    if (selection := selection_in(dict(counts))) is not None:
        return replace(_selected(selection, adjacency, question), tolerance=question.tolerance)
    found = _larger_direction([(dominating_pair(event, adjacency), count) for event, count in counts], question)
    return replace(found, tolerance=question.tolerance)


@dataclass(frozen=True)
class _Run:
    """One run of a selection: what users of each kind may go through in it, whichever setting it draws.

    Attributes:
        most: Cases that bound from above together.
        least: Cases that there are.
    """

    most: tuple[tuple[tuple[Event, int], ...], ...]
    least: tuple[tuple[tuple[Event, int], ...], ...]
    adjacency: Adjacency

    def above(self, epsilons: Floats, least_delta: float = 1e-15) -> Floats:
        """Upper bounds on δ at many ε."""
        return self._largest([upper for _, upper in self._curves(self.most, epsilons, least_delta)])

    def below(self, epsilons: Floats, least_delta: float = 1e-15) -> Floats:
        """Lower bounds on δ at many ε."""
        return self._largest([lower for lower, _ in self._curves(self.least, epsilons, least_delta)])

    def _curves(
        self, cases: tuple[tuple[tuple[Event, int], ...], ...], at: Floats, least_delta: float
    ) -> list[tuple[Floats, Floats]]:
        return [_delta_curve(Counter(dict(case)), at, self.adjacency, least_delta) for case in cases]

    @staticmethod
    def _largest(curves: list[Floats]) -> Floats:
        largest: Floats = np.max(curves, axis=0)
        return largest


def _one_run(selection: BestOf, adjacency: Adjacency) -> _Run:
    most, least = (
        tuple(dict.fromkeys(_sorted(case) for event in selection.events for case in cases_of(event, least=least)))
        for least in (False, True)
    )
    return _Run(most, least, adjacency)


def _selected(selection: BestOf, adjacency: Adjacency, question: Question) -> Bounds:
    """Bounds of the best of several runs, by the theorem; from below those of one, whose score may tell nothing."""
    run = _one_run(selection, adjacency)
    if question.delta is None:
        upper = float(delta_above(selection, np.array([question.epsilon or 0.0]), run.above)[0])
    else:
        once = replace(question, delta=share_of(selection, question.delta), threshold=np.nan)
        require_between("delta", once.delta or 0.0, LEAST_DELTA, 1)
        worst = max(bounds_of(case, adjacency, once).upper for case in run.most)
        upper = worst + added_epsilon(selection, partial(run.above, least_delta=COMPARED))
    question = replace(question, threshold=np.nan)
    return Bounds(lower=max(bounds_of(case, adjacency, question).lower for case in run.least), upper=upper)


def _larger_direction(pairs: Pairs, question: Question) -> Bounds:
    if not pairs:
        return Bounds(lower=0.0, upper=0.0)
    shift = gaussian_shift(pairs)
    if np.isfinite(shift):
        return _gaussian_bounds(shift, question)
    bounds = certify(pairs, question, swapped=False)
    if all(pair.symmetric for pair, _ in pairs):
        return bounds
    other = certify(pairs, replace(question, settled=bounds.lower), swapped=True)
    return Bounds(lower=max(bounds.lower, other.lower), upper=max(bounds.upper, other.upper))


def gaussian_shift(pairs: Pairs) -> float:
    """The shift of the one Gaussian that all pairs compose to, NaN where not all are Gaussians."""
    shifts = [(pair.gaussian_shift, count) for pair, count in pairs if isinstance(pair, GaussianPair)]
    return composed_shift(shifts) if len(shifts) == len(pairs) else np.nan


def _gaussian_bounds(shift: float, question: Question) -> Bounds:
    if question.delta is not None:
        return gaussian_epsilon(shift, question.delta)
    return gaussian_delta(shift, question.epsilon or 0.0)


def epsilon_against(event: Event, delta: float, threshold: float, *, adjacency: Adjacency, tolerance: float) -> Bounds:
    """Bounds on ε at delta, only as close as it takes to tell on which side of the threshold the upper one lies."""
    require_between("delta", delta, LEAST_DELTA, 1)
    require_between("tolerance", tolerance, 0, 1)
    _require_known_groups(event, adjacency)
    question = Question(None, delta, tolerance, threshold=threshold)
    return _bounds(cases_of(event), cases_of(event, least=True), adjacency, question)


def _bounds(most: Cases, least: Cases, adjacency: Adjacency, question: Question) -> Bounds:
    """Bounds for the users who go through most of all: from above of all cases, from below of cases that there are."""
    found = [bounds_of(_sorted(case), adjacency, question) for case in most]
    below = found if least == most else [bounds_of(_sorted(case), adjacency, question) for case in least]
    upper = max(found, key=lambda bounds: bounds.upper)
    return replace(upper, lower=max(bounds.lower for bounds in below))


def flatten(event: Event) -> Counter[Event]:
    """The primitive events within an event, and how often each occurs: of events that each user is in one of, as many
    of every kind as any of them has, which nobody goes through more than."""
    if isinstance(event, Repeated):
        return Counter({inner: count * event.count for inner, count in flatten(event.event).items()})
    if isinstance(event, Composed):
        return sum(map(flatten, event.events), Counter())
    if isinstance(event, OfGroup | OfBlock | OfSplit):
        return flatten(event.event)
    if isinstance(event, OneOf):
        return functools.reduce(operator.or_, map(flatten, event.events))
    return Counter({event: 1})


def is_tight(event: Event) -> bool:
    """Whether bounds from below bound the release itself, and not only what it is accounted as.

    Whoever does not know which of several events a user is in knows less than any of their pairs tells.
    """
    if isinstance(event, Repeated):
        return is_tight(event.event)
    if isinstance(event, Composed):
        return all(map(is_tight, event.events))
    return event.tight


def _require_known_groups(event: Event, adjacency: Adjacency) -> None:
    """Refuse groups of users where one may be replaced by another, who may be of another group."""
    if isinstance(event, OfGroup | OfSplit | OneOf) and adjacency is Adjacency.REPLACE_ONE_USER:
        raise InvalidInput(
            "adjacency",
            adjacency.value,
            f"{Adjacency.ADD_OR_REMOVE_ONE_USER.value} for releases to groups of users",
            "Who takes a user's place may be of another group: no bound for both is known here.",
        )
    if isinstance(event, Repeated):
        _require_known_groups(event.event, adjacency)
    if isinstance(event, Composed | BestOf):
        for inner in event.events:
            _require_known_groups(inner, adjacency)


def _sorted(counts: Counter[Event]) -> tuple[tuple[Event, int], ...]:
    together: Counter[Event] = Counter()
    for event, count in counts.items():
        together[_plainest(event)] += count
    return tuple((event, count) for event, count in sorted(together.items(), key=repr) if count)


def _plainest(event: Event) -> Event:
    """Of events that release the same, one: of users with one example each, examples are sampled as users are."""
    if isinstance(event, BinomialMixtureGaussian) and event.group_size == 1:
        return PoissonSubsampledGaussian(
            sampling_probability=event.sampling_probability, noise_multiplier=event.noise_multiplier
        )
    return event
