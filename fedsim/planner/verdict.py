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

from fedsim.errors import InvalidInput
from fedsim.plan import ALGORITHMS, Plan, UserSizes
from fedsim.planner.candidates import Target, calibrated_plans, draft_plan
from fedsim.planner.norms import NormCurve

TIE = 0.05
"""Predictions closer than this are called level."""
CHALLENGER, BASELINE = ALGORITHMS
"""ULS, and ELS, against which it is measured: ratios are the baseline's noise over the challenger's."""


def predicted_noise(plan: Plan, curve: NormCurve, typical_size: int) -> float:
    """Noise on one coordinate of the released mean, as a multiple of L(1).

    Args:
        plan: With calibrated noise.
        curve: L(G)/L(1).
        typical_size: Examples of the median user, who cannot average over more.
    """
    return plan.noise_multiplier * curve(plan.rows_per_unit(typical_size)) / plan.normaliser


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
