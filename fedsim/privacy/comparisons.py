"""The same run under several accountants, side by side; only the first certifies."""

from dataclasses import dataclass
from typing import Literal

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds, flatten
from fedsim.privacy.bounds import Bounds, Estimate, LooseBound
from fedsim.privacy.edgeworth import ORDERS, epsilon_estimate, finite_sample_epsilon
from fedsim.privacy.events import Adjacency, BinomialMixtureGaussian, Event
from fedsim.privacy.group_privacy import group_privacy_epsilon
from fedsim.privacy.renyi import renyi_epsilon

Kind = Literal["certified", "looser upper bound", "estimate"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One accountant's answer.

    Attributes:
        method: The accountant.
        kind: What its number is: certified bounds, an upper bound that certifies nothing here, or an estimate.
        epsilon: The answer.
    """

    method: str
    kind: Kind
    epsilon: Bounds | LooseBound | Estimate

    @property
    def value(self) -> float:
        """The number to show: the upper bound of a pair."""
        return self.epsilon.upper if isinstance(self.epsilon, Bounds) else self.epsilon.value


def compare(
    event: Event, delta: float, *, adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER
) -> tuple[Comparison, ...]:
    """ε at delta by the tight pair, Rényi, black-box group privacy (ELS) and Edgeworth series (add-or-remove).

    Methods that are not defined for an event or an adjacency are left out.

    Raises:
        InvalidInput: For a δ outside (0, 1).
    """
    rows = [
        Comparison(
            method="tight pair, privacy-loss distribution",
            kind="certified",
            epsilon=epsilon_bounds(event, delta, adjacency=adjacency),
        )
    ]
    counts = flatten(event)
    try:
        loose = [renyi_epsilon(event, delta, adjacency=adjacency)]
    except InvalidInput:  # A pair of another kind than Gaussian mixtures.
        return tuple(rows)
    if counts and all(isinstance(single, BinomialMixtureGaussian) for single in counts):
        loose.append(group_privacy_epsilon(event, delta, adjacency=adjacency))
    rows += [Comparison(method=bound.method, kind="looser upper bound", epsilon=bound) for bound in loose]
    if adjacency.accounted_as is Adjacency.ADD_OR_REMOVE_ONE_USER:
        estimates = [epsilon_estimate(event, delta, order=order) for order in ORDERS]
        estimates.append(finite_sample_epsilon(event, delta, order=1))
        rows += [Comparison(method=one.method, kind="estimate", epsilon=one) for one in estimates]
    return tuple(rows)
