"""The black-box group-privacy conversion of example-level sampling, for comparison: why a tight accountant is needed.

ELS is (ε′, δ′)-private for one example (the Poisson-subsampled Gaussian). Chaining it over a user's G examples gives
(Gε′, δ′ Σ_{i<G} e^{iε′}) for the user (Vadhan 2017, Lemma 2.2). It forgets that a user's examples rarely meet in one
batch, and e^{Gε′} makes it useless beyond a few examples.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from scipy.special import logsumexp

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds, flatten
from fedsim.privacy.bounds import LooseBound
from fedsim.privacy.events import Adjacency, BinomialMixtureGaussian, Composed, Event, Repeated
from fedsim.validation import require_between

LEAST_LOG_DELTA = -690.0
"""The smallest log δ′ that double precision holds."""
SPACING = 1.15
REFINEMENTS = 6
TOLERANCE = 0.01


def group_privacy_epsilon(
    event: Event, delta: float, *, adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER
) -> LooseBound:
    """User-level ε at delta of example-level sampling, by group privacy from its tight example-level curve.

    Args:
        event: Binomial-mixture releases of one group size, composed at will.
        delta: User-level δ, 0 < δ < 1.
        adjacency: Adding or removing a user is G such changes of one example; replacing one is G replacements.

    Returns:
        The least Gε′(δ′) with δ′ Σ_{i<G} e^{iε′} ≤ δ that a search over δ′ finds, to about 1 % of itself; ε′ is an
        upper bound. inf where no δ′ that double precision holds is small enough.

    Raises:
        InvalidInput: For a δ outside (0, 1), or an event that is not example-level sampling with one group size.
    """
    require_between("delta", delta, 0, 1)
    group_size, example = _example_level(event)
    steps = np.arange(group_size)

    def chained(log_delta: float) -> tuple[bool, float]:
        """Whether the group's δ meets the target when one example's is e^log_delta, and the group's ε."""
        one = epsilon_bounds(example, math.exp(log_delta), adjacency=adjacency, tolerance=TOLERANCE).upper
        return log_delta + float(logsumexp(steps * one)) <= math.log(delta) + 1e-12, group_size * one

    method = f"black-box group privacy, {group_size} examples"
    return LooseBound(value=_least(chained, math.log(delta)), method=method)


def _least(chained: Callable[[float], tuple[bool, float]], start: float) -> float:
    """ε at the largest log δ′ from start downwards that is feasible, or inf."""
    low, previous = start, start
    feasible, epsilon = chained(low)
    while not feasible:
        previous, low = low, low * SPACING
        if low < LEAST_LOG_DELTA:
            return math.inf
        feasible, epsilon = chained(low)
    for _ in range(REFINEMENTS if low < previous else 0):
        middle = (low + previous) / 2
        feasible, at_middle = chained(middle)
        if feasible:
            low, epsilon = middle, at_middle
        else:
            previous = middle
    return epsilon


def _example_level(event: Event) -> tuple[int, Composed]:
    """Group size, and the same run as one example sees it."""
    counts = flatten(event)
    sizes = {single.group_size for single in counts if isinstance(single, BinomialMixtureGaussian)}
    if len(sizes) != 1 or not all(isinstance(single, BinomialMixtureGaussian) for single in counts):
        raise InvalidInput("event", event, "example-level sampling with one group size", "ULS bounds users directly.")
    example = tuple(
        Repeated(event=dataclasses.replace(single, group_size=1), count=count)
        for single, count in counts.items()
        if isinstance(single, BinomialMixtureGaussian)
    )
    return sizes.pop(), Composed(events=example)
