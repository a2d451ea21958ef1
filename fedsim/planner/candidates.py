"""What is computed and guaranteed, and the plans that do it, each with the least noise that meets the target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedsim.errors import InvalidInput
from fedsim.plan import ALGORITHMS, Plan, UserSizes
from fedsim.plan.bands import AUTO, BandsForecast, best, forecasts_for
from fedsim.privacy.calibration import calibrate_noise_multiplier
from fedsim.privacy.events import Adjacency, Event
from fedsim.privacy.mechanisms.banded.workload import Workload
from fedsim.validation import require_at_least, require_between, require_positive

TOLERANCE = 0.01
"""Relative tolerance on ε when the planner calibrates: its σ are certified, but up to about 1 % above the least."""
PRECISION = 1e-3
"""Relative precision of noise multipliers that predictions are made of."""
_known: dict[tuple[Event, float, float, Adjacency], float] = {}
"""Noise multipliers that were calibrated before in this process, by what is released at 1 and the target."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is computed and what is guaranteed.

    Attributes:
        epsilon: User-level ε, finite.
        delta: User-level δ.
        gradients_per_round: B, expected gradient evaluations a round.
        rounds: T.
        adjacency: The change of the data set that stays hidden.
    """

    epsilon: float
    delta: float
    gradients_per_round: float
    rounds: int
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER

    def __post_init__(self) -> None:
        require_positive("plan.epsilon", self.epsilon)
        require_between("plan.delta", self.delta, 0, 1)
        require_at_least("plan.gradients-per-round", self.gradients_per_round, 1)
        require_at_least("plan.rounds", self.rounds, 1)


def calibrated_plans(
    sizes: UserSizes,
    target: Target,
    group_sizes: Mapping[str, Sequence[int]] | None = None,
    near: Mapping[str, float] | None = None,
) -> list[Plan]:
    """Every algorithm and group size for which the budget fits the data, with calibrated noise and clip norm 1.

    Args:
        sizes: The users.
        target: Compute, ε and δ.
        group_sizes: Those to look at, by algorithm; by default `default_group_sizes` for each.
        near: Where the noise multipliers are expected, by algorithm.

    Raises:
        InvalidInput: When the budget is larger than the data under every choice.
    """
    candidates = group_sizes or dict.fromkeys(ALGORITHMS, default_group_sizes(sizes, target))
    drafts = [draft_plan(name, group, sizes, target) for name in candidates for group in candidates[name]]
    fitting = [plan for plan in drafts if plan is not None]
    if not fitting:
        most = f"at most {sizes.num_users * max(max(groups) for groups in candidates.values())}"
        raise InvalidInput("plan.gradients-per-round", target.gradients_per_round, most + ", what the data can give")
    expected, found = dict(near or {}), []
    for plan in fitting:  # one after the other: what the last one needs is a guess at what the next one does
        found.append(calibrated(plan, target.epsilon, expected.get(plan.name, 1.0)))
        expected[plan.name] = found[-1].noise_multiplier
    return found


def draft_plan(algorithm: str, group_size: int, sizes: UserSizes, target: Target) -> Plan | None:
    """The plan of one algorithm with one group size, its noise not yet calibrated; None if the data is too small."""
    try:
        return ALGORITHMS[algorithm].draft(
            sizes,
            gradients_per_round=target.gradients_per_round,
            group_size=group_size,
            clip_norm=1.0,
            noise_multiplier=1.0,
            steps=target.rounds,
            delta=target.delta,
            adjacency=target.adjacency,
        )
    except InvalidInput as refusal:
        if refusal.field != "plan.gradients-per-round":
            raise
        return None


def default_group_sizes(sizes: UserSizes, target: Target) -> list[int]:
    """Powers of two up to the 90 % quantile of the user sizes, B and 64, and the median."""
    most = max(1, min(int(sizes.quantile(0.9)), int(target.gradients_per_round), 64))
    powers = {1 << i for i in range(most.bit_length())}
    return sorted(powers | {min(sizes.median, most)})


def calibrated(plan: Plan, epsilon: float, near: float | None = None) -> Plan:
    """The plan with the least noise that meets the target.

    Args:
        plan: A draft.
        epsilon: The target, at the plan's δ and adjacency.
        near: Where the noise multiplier is expected.
    """
    key = replace(plan, noise_multiplier=1.0).event(), epsilon, plan.delta, plan.adjacency
    if key not in _known:  # four times the compute and four times the group size release the same, say
        noise = calibrate_noise_multiplier(
            lambda value: replace(plan, noise_multiplier=value).event(),
            epsilon=epsilon,
            delta=plan.delta,
            adjacency=plan.adjacency,
            tolerance=TOLERANCE,
            precision=PRECISION,
            near=near,
        )
        _known[key] = noise.value
    return replace(plan, noise_multiplier=_known[key])


def best_bands(plans: Sequence[Plan], target: Target, workload: Workload) -> list[BandsForecast]:
    """For each plan what correlating its noise over the best number of rounds promises.

    Args:
        plans: Of calibrated_plans.
        target: As they were calibrated to.
        workload: What the optimizer makes of the releases.
    """

    # One after the other: plans that release the same then find each other's bounds.
    asked = {"epsilon": target.epsilon, "tolerance": TOLERANCE, "precision": PRECISION}
    return [best(forecasts_for(plan, AUTO, workload, **asked, near=plan.noise_multiplier)) for plan in plans]
