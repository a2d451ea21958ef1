"""Which algorithm, and which group size, for a compute budget: predicted before any training.

At fixed gradient evaluations a round, B, a released mean carries noise of standard deviation

    ULS: σ_ULS(q = B/(N·G)) · L(G) · G / B        ELS: σ_ELS(p = B/|D|, G) · L(1) / B

on each coordinate, when each algorithm clips at the typical norm of its units: L(G) is that of a user's mean gradient
over G of its examples. The gradient signal is the same in both, so less noise is better (Charles et al. 2024,
Section 5). Their advice, followed here: ELS takes the median number of examples a user owns; ULS takes the group size
of least predicted noise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

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
TIE = 0.05
"""Predictions closer than this are called level."""
CHALLENGER, BASELINE = ALGORITHMS
"""ULS, and ELS, against which it is measured: ratios are the baseline's noise over the challenger's."""


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


@dataclass(frozen=True, kw_only=True)
class NormCurve:
    """L(G)/L(1): the typical norm of a user's mean gradient over G examples, relative to one example's.

    Attributes:
        name: "aligned", "orthogonal", "measured" or "assumed".
        group_sizes: Ascending from 1.
        norms: L(G)/L(1) at them; between them interpolated in logarithms, beyond them held, which favours neither.
    """

    name: str
    group_sizes: tuple[int, ...]
    norms: tuple[float, ...]

    @classmethod
    def of_alignment(cls, name: str, alignment: float, largest: int = 1 << 20) -> "NormCurve":
        """L(G)² ∝ alignment + (1 − alignment)/G: a part that a user's examples share, and one that averages out.

        Args:
            name: Its name.
            alignment: Mean cosine between gradients of one user's examples: 1 alike, 0 orthogonal.
            largest: Largest group size covered.
        """
        if not 0 <= alignment <= 1:
            raise InvalidInput("alignment", alignment, "a number from 0 (orthogonal) to 1 (aligned)")
        sizes = tuple(sorted({round(2 ** (i / 8)) for i in range(8 * largest.bit_length())}))
        return cls(
            name=name,
            group_sizes=sizes,
            norms=tuple(math.sqrt(alignment + (1 - alignment) / size) for size in sizes),
        )

    @classmethod
    def measured(cls, group_sizes: Sequence[int], norms: Sequence[float]) -> "NormCurve":
        """From typical norms measured at some group sizes, the first of which is 1."""
        if not group_sizes or group_sizes[0] != 1 or len(group_sizes) != len(norms):
            raise InvalidInput("group_sizes", tuple(group_sizes), "ascending from 1, with one norm each")
        for value in norms:
            require_positive("norms", value)
        return cls(name="measured", group_sizes=tuple(group_sizes), norms=tuple(n / norms[0] for n in norms))

    def __call__(self, group_size: float) -> float:
        """L(G)/L(1)."""
        logs = np.interp(math.log(group_size), np.log(self.group_sizes), np.log(self.norms))
        return float(np.exp(logs))


ALIGNED = NormCurve(name="aligned", group_sizes=(1,), norms=(1.0,))
ORTHOGONAL = NormCurve.of_alignment("orthogonal", 0.0)


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
        found.append(_calibrated(plan, target.epsilon, expected.get(plan.name, 1.0)))
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


def _calibrated(plan: Plan, epsilon: float, near: float | None = None) -> Plan:
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


def predicted_noise(plan: Plan, curve: NormCurve, typical_size: int) -> float:
    """Noise on one coordinate of the released mean, as a multiple of L(1).

    Args:
        plan: With calibrated noise.
        curve: L(G)/L(1).
        typical_size: Examples of the median user, who cannot average over more.
    """
    return plan.noise_multiplier * curve(plan.rows_per_unit(typical_size)) / plan.normaliser


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


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is expected under one curve of gradient norms.

    Attributes:
        curve: L(G).
        plans: The recommended plan of each algorithm.
        noise: Its predicted noise, in units of L(1), by algorithm.
    """

    curve: NormCurve
    plans: Mapping[str, Plan]
    noise: Mapping[str, float]

    @property
    def ratio(self) -> float:
        """ELS noise over ULS noise: above 1, ULS is expected to do better."""
        return self.noise[BASELINE] / self.noise[CHALLENGER]

    @property
    def winner(self) -> str:
        """The algorithm that is expected to do better; "level" within TIE."""
        if abs(math.log(self.ratio)) <= math.log1p(TIE):
            return "level"
        return CHALLENGER if self.ratio > 1 else BASELINE


def compare(plans: Sequence[Plan], sizes: UserSizes, curve: NormCurve) -> Verdict:
    """Compare the recommended plan of each algorithm under a curve.

    Raises:
        InvalidInput: When one of the algorithms has no plan that fits.
    """
    recommended: dict[str, Plan] = {}
    for name in ALGORITHMS:
        own = [plan for plan in plans if plan.name == name]
        if not own:
            raise InvalidInput("plan.gradients-per-round", "too large", f"within what {name} can draw from the data")
        recommended[name] = _recommended(own, sizes, curve)
    noise = {name: predicted_noise(plan, curve, sizes.median) for name, plan in recommended.items()}
    return Verdict(curve=curve, plans=recommended, noise=noise)


def _recommended(plans: Sequence[Plan], sizes: UserSizes, curve: NormCurve) -> Plan:
    """The plan of least noise; where examples are kept once, the group size nearest to the median user's.

    Examples that are not kept are lost for the whole run, which the predicted noise does not show.
    """
    if plans[0].redraws:
        return min(plans, key=lambda plan: predicted_noise(plan, curve, sizes.median))
    return min(plans, key=lambda plan: (abs(plan.group_size - sizes.median), plan.group_size))


def break_even_norm(uls: Plan, els: Plan) -> float:
    """The L(G)/L(1) at which both plans carry the same noise: below it, uls is ahead.

    At 1 or above, uls is ahead or level even when a user's gradients are all the same; below 1/√G, els is ahead even
    when they are orthogonal.
    """
    return els.noise_multiplier / els.normaliser * uls.normaliser / uls.noise_multiplier


def what_if(sizes: UserSizes, target: Target, verdict: Verdict, factor: float = 4.0) -> dict[str, Verdict]:
    """The verdict under more and less compute, and under weaker and stronger privacy; what does not fit is left out.

    ULS chooses between 1 and the group sizes around the one recommended, at most `factor` times larger or smaller and
    no larger than users have examples; ELS keeps its group size.

    Args:
        sizes: The users.
        target: What the verdict was found for.
        verdict: The verdict.
        factor: How much more or less.
    """
    gradients, epsilon = target.gradients_per_round, target.epsilon
    cases = {
        f"{factor:g}× the compute": replace(target, gradients_per_round=gradients * factor),
        f"1/{factor:g} of the compute": replace(target, gradients_per_round=max(1.0, gradients / factor)),
        f"{factor:g}× the ε": replace(target, epsilon=epsilon * factor),
        f"1/{factor:g} of the ε": replace(target, epsilon=epsilon / factor),
    }
    most = max(1, int(sizes.quantile(0.9)))
    groups = {name: _nearby_group_sizes(plan, factor, most) for name, plan in verdict.plans.items()}
    near = {name: plan.noise_multiplier for name, plan in verdict.plans.items()}
    verdicts = {}
    for name, case in cases.items():
        if all(any(draft_plan(one, group, sizes, case) for group in groups[one]) for one in groups):
            verdicts[name] = compare(calibrated_plans(sizes, case, groups, near), sizes, verdict.curve)
    return verdicts


def _nearby_group_sizes(plan: Plan, factor: float, most: int) -> list[int]:
    """Group sizes around a plan's, none larger than most users have examples."""
    if not plan.redraws:
        return [plan.group_size]
    scaled = (round(plan.group_size * scale) for scale in (1 / factor, 1 / 2, 1, 2, factor))
    return sorted({1, plan.group_size, *(size for size in scaled if 0 < size <= most)})
