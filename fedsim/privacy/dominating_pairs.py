"""From an event and an adjacency to the pair of distributions that dominates it.

Another mechanism joins by registering a function from its event and an adjacency to a LossPair.
"""

from functools import singledispatch
from typing import Protocol, runtime_checkable

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.privacy.allocated_pair import AllocatedPair
from fedsim.privacy.events import (
    Adjacency,
    BinomialMixtureGaussian,
    FixedSizeSubsampledGaussian,
    Gaussian,
    MixtureOfGaussians,
    PoissonSubsampledGaussian,
    RandomAllocatedGaussian,
    TruncatedPoissonSubsampledGaussian,
)
from fedsim.privacy.fixed_size_pair import ReplacedInFixedSize
from fedsim.privacy.gaussian_pairs import Floats, GaussianPair, Mixture
from fedsim.privacy.loss_cells import LossCells
from fedsim.privacy.mixed_pair import mixed
from fedsim.privacy.truncation import truncation
from fedsim.validation import require_at_least, require_at_most

MOST_EXAMPLES = 1_000_000
"""Examples of one user that ELS is accounted with: tables of how many of them take part grow with their number."""
FARTHEST_MEAN = 1e15
"""Of a user's contribution, in standard deviations of the noise: floats hold no bounds on losses far beyond it."""
NEGLIGIBLE = -230.0
"""Log-weights below this are left out at the upper end; what they weigh together is charged as a loss of ∞."""


class LossPair(Protocol):
    """P against Q, as far as the accountant needs to know them."""

    @property
    def symmetric(self) -> bool:
        """Whether P against Q and Q against P have the same privacy curve."""

    @property
    def least_loss(self) -> float:
        """A lower limit of the loss, −∞ where there is none."""

    def loss_range(self, tail: float) -> tuple[float, float]:
        """Losses (low, high) with Q(loss < low) ≤ tail and P(loss > high) ≤ tail."""

    def cells(self, edges: Floats) -> LossCells:
        """Probabilities of the cells between evenly spaced losses, and of both ends, under P and under Q."""


@runtime_checkable
class BracketedPair(LossPair, Protocol):
    """P against Q, known between two pairs only: `cells` are of one that dominates it."""

    def cells_below(self, edges: Floats) -> LossCells:
        """As `cells`, of a pair that it dominates."""


@singledispatch
def dominating_pair(event: object, adjacency: Adjacency) -> LossPair:
    """The pair that dominates an event: Q is the distribution without the user, P with it (remove direction)."""
    raise InvalidInput("event", event, "an event with a registered dominating pair")


register = dominating_pair.register


@register
def _gaussian(event: Gaussian, adjacency: Adjacency) -> LossPair:
    return mixture_pair(np.array([1.0]), np.array([0.0]), event.noise_multiplier, adjacency)


@register
def _poisson(event: PoissonSubsampledGaussian, adjacency: Adjacency) -> LossPair:
    return mixture_pair(np.arange(2.0), _present(event.sampling_probability), event.noise_multiplier, adjacency)


@register
def _binomial(event: BinomialMixtureGaussian, adjacency: Adjacency) -> LossPair:
    require_at_most("group_size", event.group_size, MOST_EXAMPLES)
    sensitivities = np.arange(event.group_size + 1.0)
    log_weights = binomial_log_weights(event.group_size, event.sampling_probability)
    return mixture_pair(sensitivities, log_weights, event.noise_multiplier, adjacency)


@register
def _mixture(event: MixtureOfGaussians, adjacency: Adjacency) -> LossPair:
    order = np.argsort(event.sensitivities)
    weights = np.array(event.probabilities)[order]
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights / weights.sum())
    return mixture_pair(np.array(event.sensitivities)[order], log_weights, event.noise_multiplier, adjacency)


@register
def _fixed_size(event: FixedSizeSubsampledGaussian, adjacency: Adjacency) -> LossPair:
    share = event.cohort_size / event.population_size
    removed = mixture_pair(
        np.array([0.0, 2.0]), _present(share), event.noise_multiplier, Adjacency.ADD_OR_REMOVE_ONE_USER
    )
    return ReplacedInFixedSize(removed) if adjacency is Adjacency.REPLACE_ONE_USER and share < 1 else removed


@register
def _allocated(event: RandomAllocatedGaussian, adjacency: Adjacency) -> LossPair:
    if adjacency is Adjacency.REPLACE_ONE_USER:
        raise InvalidInput(
            "adjacency",
            adjacency.value,
            f"{Adjacency.ADD_OR_REMOVE_ONE_USER.value} with random allocation",
            "A user who replaces another is allocated to another round; no pair for both rounds is known.",
        )
    if event.rounds_per_block == 1:
        return _gaussian(Gaussian(noise_multiplier=event.noise_multiplier), adjacency)
    return AllocatedPair(event.rounds_per_block, event.noise_multiplier)


@register
def _truncated_poisson(event: TruncatedPoissonSubsampledGaussian, adjacency: Adjacency) -> LossPair:
    q, noise, grows = event.sampling_probability, event.noise_multiplier, adjacency is not Adjacency.REPLACE_ONE_USER
    shares = truncation(event.population_size, q, event.most_units, grows=grows)
    joined, displacing = np.arange(2.0), np.array([0.0, 2.0])
    displaced = mixture_pair(displacing, _present(shares.chance), noise, Adjacency.ADD_OR_REMOVE_ONE_USER)
    return mixed(
        (shares.untouched, mixture_pair(joined, _present(q), noise, adjacency)),
        (shares.displacing, displaced if grows else ReplacedInFixedSize(displaced)),
        (shares.doubtful, mixture_pair(displacing, _present(q), noise, adjacency)),
    )


def mixture_pair(
    sensitivities: Floats, log_weights: Floats, noise_multiplier: float, adjacency: Adjacency
) -> GaussianPair:
    """A contribution of norm s_i with probability w_i, plus noise, against none or against the opposite one.

    Small weights of small norms are kept, whatever they are: they limit how much the user's absence can lose.

    Args:
        sensitivities: s_i, increasing.
        log_weights: log w_i.
        noise_multiplier: σ.
        adjacency: Which data sets count as neighbours.

    Raises:
        InvalidInput: The largest norm is more than FARTHEST_MEAN times the noise.
    """
    last = int(np.flatnonzero(log_weights > NEGLIGIBLE)[-1])
    present = (log_weights > -np.inf) & (np.arange(len(log_weights)) <= last)
    require_at_least("noise_multiplier", noise_multiplier, float(sensitivities[last]) / FARTHEST_MEAN)
    means, kept = sensitivities[present] / noise_multiplier, log_weights[present]
    nothing = Mixture(np.zeros(1), np.zeros(1))
    replaced = adjacency is Adjacency.REPLACE_ONE_USER
    return GaussianPair(
        above=Mixture(means, kept),
        below=Mixture(-means, kept) if replaced else nothing,
        left_out=float(np.exp(log_weights[last + 1 :]).sum()),
    )


def binomial_log_weights(trials: int, probability: float) -> Floats:
    """log of Binomial(trials, probability) at 0 … trials, computed in extended precision."""
    if probability == 1:
        certain: Floats = np.where(np.arange(trials + 1) == trials, 0.0, -np.inf)
        return certain
    chosen = np.arange(trials + 1, dtype=np.longdouble)
    steps = np.log((trials - chosen[:-1]) / chosen[1:])
    log_coefficients = np.append(np.longdouble(0), np.cumsum(steps))
    p = np.longdouble(probability)
    return np.asarray(log_coefficients + chosen * np.log(p) + (trials - chosen) * np.log1p(-p), dtype=np.float64)


def _present(probability: float) -> Floats:
    """log-probabilities of no contribution and of one."""
    with np.errstate(divide="ignore"):
        return np.array([np.log1p(-probability), np.log(probability)])
