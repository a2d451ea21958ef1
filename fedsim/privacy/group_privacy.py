"""The black-box group-privacy conversion of example-level sampling, for comparison: why a tight accountant is needed.

ELS is (ε′, δ′)-private for one example (the Poisson-subsampled Gaussian). Chaining it over a user's G examples gives
(Gε′, δ′ Σ_{i<G} e^{iε′}) for the user (Vadhan 2017, Lemma 2.2). It forgets that a user's examples rarely meet in one
batch, and e^{Gε′} makes it useless beyond a few examples.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import scipy

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds, flatten
from fedsim.privacy.bounds import LooseBound
from fedsim.privacy.events import Adjacency, BinomialMixtureGaussian, Composed, Event, Repeated
from fedsim.validation import require_between

LEAST_LOG_DELTA = -690.0
"""The smallest log δ′ that double precision holds."""
STEP = 1.01
"""Least factor between log δ′ that are tried."""
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

    def chained(log_delta: float) -> tuple[float, float]:
        """One example's ε at δ′ = e^log_delta, and the log δ′ that the group's δ then needs."""
        one = epsilon_bounds(example, math.exp(log_delta), adjacency=adjacency, tolerance=TOLERANCE).upper
        return one, math.log(delta) - float(scipy.special.logsumexp(steps * one))

    method = f"black-box group privacy, {group_size} examples"
    return LooseBound(value=group_size * _least(chained, math.log(delta)), method=method)


def _least(chained: Callable[[float], tuple[float, float]], start: float) -> float:
    """One example's ε at the largest log δ′ from start downwards that is small enough, to a step; or inf.

    What is needed only falls as δ′ does: nothing between a δ′ and what it needs can be small enough, and is skipped.
    """
    log_delta = start
    while log_delta >= LEAST_LOG_DELTA:
        epsilon, needed = chained(log_delta)
        if log_delta <= needed + 1e-12 * abs(needed):
            return epsilon
        log_delta = min(needed, log_delta * STEP)
    return math.inf


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
