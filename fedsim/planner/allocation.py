"""How to spend a total of gradient evaluations: cohort, rounds, group size and bands of noise, chosen together.

Of each number of rounds every group size and number of bands is weighed by an estimate of the noise it needs, in
closed form; what comes out ahead is calibrated, and so is what lies around the best of that. All that is returned
carries certified noise: estimates decide what is looked at, and nothing else.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import scipy

from fedsim.errors import InvalidInput
from fedsim.plan import ALGORITHMS, Plan, UserSizes
from fedsim.plan.bands import candidates_for, with_bands
from fedsim.planner.candidates import Target, calibrated, default_group_sizes, draft_plan
from fedsim.planner.signal import SignalCurve, effective_rounds
from fedsim.privacy.events import Adjacency
from fedsim.privacy.gaussian_curve import log_delta
from fedsim.privacy.mechanisms.banded.coefficients import optimal_coefficients
from fedsim.privacy.mechanisms.banded.workload import Workload
from fedsim.validation import require_at_least

ROUNDS = (25, 35, 50, 70, 100, 140, 200, 280, 400, 560, 800, 1000)
"""Numbers of rounds to look at: every second one first, then those beside the best. Fewer are not: what is predicted
takes each step as the first, and models trained in fewer than 25 fell far behind it (docs/tutorials/choosing.md)."""
LEAST_COHORT = 8
"""Units a round, below which a round is not looked at: noise outweighs so few, whatever the rounds."""
MOST_BANDS = 32
"""Bands of noise up to which allocations are weighed; those of the one chosen may be looked for further."""
CLOSE = 3
"""Group sizes and bands that are calibrated at the best numbers of rounds."""


@dataclass(frozen=True, kw_only=True)
class Total:
    """A whole run's compute, and what is guaranteed.

    Attributes:
        epsilon: User-level ε, finite.
        delta: User-level δ.
        gradients: Expected gradient evaluations of the run.
        adjacency: The change of the data set that stays hidden.
    """

    epsilon: float
    delta: float
    gradients: float
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER

    def __post_init__(self) -> None:
        require_at_least("plan.total-gradients", self.gradients, ROUNDS[0] * LEAST_COHORT)
        self.over(ROUNDS[0])

    def over(self, rounds: int) -> Target:
        """The same spread over so many rounds, in whole gradient evaluations a round."""
        return Target(
            epsilon=self.epsilon,
            delta=self.delta,
            gradients_per_round=round(self.gradients / rounds),
            rounds=rounds,
            adjacency=self.adjacency,
        )


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """One way to spend a total.

    Attributes:
        plan: With the noise that meets the target, in as many bands as are best.
        noise_ratio: Noise in what the optimizer makes of all rounds, over that of independent noise of the plan's
            noise multiplier.
        effective_rounds: What its rounds are worth.
    """

    plan: Plan
    noise_ratio: float
    effective_rounds: float


def allocate(
    sizes: UserSizes,
    total: Total,
    signal: SignalCurve,
    parameters: int,
    workload: Callable[[int], Workload],
    group_sizes: Sequence[int] = (),
) -> dict[str, list[Allocation]]:
    """Ways to spend a total, by algorithm, those of most effective rounds first.

    Args:
        sizes: The users.
        total: Compute, ε and δ.
        signal: s(G) of users who own G examples or more.
        parameters: d, trainable parameters.
        workload: What the optimizer makes of the releases of so many rounds.
        group_sizes: Those to look at; by default powers of two up to the 90 % quantile of the user sizes.

    Returns:
        For each algorithm the allocations that were calibrated; an algorithm without any is left out.

    Raises:
        InvalidInput: When the total is more than the users can give in 1000 rounds, or less than 25 rounds need.
    """
    search = _Search(sizes, total, signal.among(sizes), parameters, workload, tuple(group_sizes))
    found = {name: search.of(name) for name in ALGORITHMS}
    if not any(found.values()):
        most = f"at most about {search.most * ROUNDS[-1]:,}, what these users give in {ROUNDS[-1]} rounds"
        raise InvalidInput("plan.total-gradients", total.gradients, most)
    return {name: ways for name, ways in found.items() if ways}


def estimated_noise(shift: float, probability: float, rounds: int) -> float:
    """About the noise multiplier that so many rounds need: an estimate by the central limit theorem, no bound.

    Subsampled rounds compose to about a Gaussian of shift μ with μ² = T·q²·(e^{1/σ²} − 1) (Bu et al. 2020). Above a
    probability of 1, where a user stands for several units, it is the plain Gaussian of as large a sum.

    Args:
        shift: μ of the one Gaussian that meets ε and δ.
        probability: Units that a user is expected to have in a round that it may be in.
        rounds: Such rounds.
    """
    whole = math.sqrt(rounds) / shift
    if probability >= 1:
        return probability * whole
    return min(whole, 1 / math.sqrt(math.log1p(shift**2 / (rounds * probability**2))))


class _Search:
    """Allocations of one total.

    Attributes:
        most: Gradient evaluations that the users can give in a round.
    """

    def __init__(
        self,
        sizes: UserSizes,
        total: Total,
        signal: SignalCurve,
        parameters: int,
        workload: Callable[[int], Workload],
        group_sizes: tuple[int, ...],
    ):
        self.sizes, self.total, self.signal, self.parameters = sizes, total, signal, parameters
        self.workload = workload
        self.groups = group_sizes or default_group_sizes(sizes, total.over(ROUNDS[0]))
        self.most = sizes.num_users * max(self.groups)
        self.shift = gaussian_shift(total.epsilon, total.delta)
        self._bands: dict[int, dict[int, tuple[tuple[float, ...], float]]] = {}

    def of(self, algorithm: str) -> list[Allocation]:
        """Those of one algorithm, the best first."""
        drafts = {rounds: self.drafts(algorithm, rounds) for rounds in ROUNDS[::2]}
        found = [self.certified(ways[0]) for ways in drafts.values() if ways]
        if not found:
            return []
        best = max(found, key=_worth).plan.steps
        place = ROUNDS.index(best)
        around = ROUNDS[max(0, place - 1) : place + 2]
        for rounds in around:
            found += [self.certified(way) for way in self.drafts(algorithm, rounds)[:CLOSE]]
        unique = {(way.plan.steps, way.plan.group_size, way.plan.bands): way for way in found}
        return sorted(unique.values(), key=_worth, reverse=True)

    def drafts(self, algorithm: str, rounds: int) -> list[Allocation]:
        """What so many rounds may be spent on, with estimated noise, the best first; at most one number of bands for
        each group size beside independent noise."""
        target, found = self.total.over(rounds), []
        for group in self.groups:
            plan = draft_plan(algorithm, group, self.sizes, target)
            if plan is None or plan.normaliser < LEAST_COHORT:
                continue
            ways = [self.estimate(plan, bands) for bands in self.bands_for(plan)]
            found += [ways[0], *sorted(ways[1:], key=_worth, reverse=True)[:1]]
        return sorted(found, key=_worth, reverse=True)

    def bands_for(self, plan: Plan) -> list[int]:
        """Numbers of bands that are worth a look, 1 first."""
        if self.total.adjacency is not Adjacency.ADD_OR_REMOVE_ONE_USER:
            return [1]
        return [bands for bands in candidates_for(plan.sampling_probability, plan.steps) if bands <= MOST_BANDS]

    def estimate(self, plan: Plan, bands: int) -> Allocation:
        units = plan.units_in_group(plan.group_size) or 1
        noise = estimated_noise(self.shift, plan.sampling_probability * units * bands, -(-plan.steps // bands))
        coefficients, ratio = self.fitted(plan.steps, bands)
        return self._allocation(replace(with_bands(plan, bands, coefficients), noise_multiplier=noise), ratio)

    def certified(self, way: Allocation) -> Allocation:
        """The same with calibrated noise."""
        plan = calibrated(way.plan, self.total.epsilon, way.plan.noise_multiplier)
        return self._allocation(plan, way.noise_ratio)

    def fitted(self, rounds: int, bands: int) -> tuple[tuple[float, ...], float]:
        """Coefficients of so many bands, and the noise that is left by them."""
        known = self._bands.setdefault(rounds, {1: ((1.0,), 1.0)})
        if bands not in known:
            workload = self.workload(rounds)
            coefficients = optimal_coefficients(bands, workload)
            known[bands] = coefficients, workload.error(coefficients) / workload.error((1.0,))
        return known[bands]

    def _allocation(self, plan: Plan, ratio: float) -> Allocation:
        worth = effective_rounds(plan, self.signal, self.parameters, ratio)
        return Allocation(plan=plan, noise_ratio=ratio, effective_rounds=worth)


def gaussian_shift(epsilon: float, delta: float) -> float:
    """μ of the Gaussian N(μ, 1) against N(0, 1) that has δ at ε."""

    def miss(shift: float) -> float:
        return log_delta(shift, epsilon)[0] - math.log(delta)

    most = 1.0
    while miss(most) < 0:
        most *= 2
    return float(scipy.optimize.brentq(miss, 1e-6, most))


def _worth(way: Allocation) -> float:
    return way.effective_rounds
