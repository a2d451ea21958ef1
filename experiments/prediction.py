"""The planner's prediction for a configured run, and how it compares with what came out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.plan.words import (
    change_of_mind,
    choice,
    correlated_in_words,
    from_private_data,
    in_words,
    private_statistics,
    verdict_json,
)
from fedsim.config import RunConfig
from fedsim.plan import ALGORITHMS, Plan, UserSizes
from fedsim.planner import (
    ALIGNED,
    ORTHOGONAL,
    NormCurve,
    Target,
    Verdict,
    best_bands,
    calibrated_plans,
    compare,
    default_group_sizes,
)
from fedsim.privacy.events import Adjacency
from fedsim.rows import SizedUsers


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the planner expects of a configuration.

    Attributes:
        arms: The group sizes that the run uses, under each curve of gradient norms; the likeliest curve first.
        advice: The group sizes that the planner would choose, under the same curves.
        private_statistics: What was read from the data to be protected; for the privacy statement.
        turning_points: At which gradient norms the advice would change.
        correlated: What correlating the noise of each arm promises, where that is asked for.
    """

    arms: list[Verdict]
    advice: list[Verdict]
    private_statistics: list[str]
    turning_points: list[str]
    correlated: list[str]

    def to_json(self) -> dict[str, Any]:
        """JSON values for a report."""
        return {
            "arms": [verdict_json(verdict) for verdict in self.arms],
            "advice": [verdict_json(verdict) for verdict in self.advice],
            "private_statistics": self.private_statistics,
            "in_words": self.in_words(),
        }

    def in_words(self) -> list[str]:
        """Sentences for the terminal and the report; the last says what was read of users without noise."""
        read = from_private_data(self.private_statistics)
        return [
            *(f"With the group sizes of this run. {sentence}" for sentence in _sentences(self.arms)),
            *(f"With the group sizes the planner advises. {sentence}" for sentence in _sentences(self.advice)),
            *self.correlated,
            *([read] if read else []),
        ]


def _sentences(verdicts: list[Verdict]) -> list[str]:
    """One sentence a curve of gradient norms, or one in all where the curve makes no difference."""
    choices = {choice(verdict) for verdict in verdicts}
    if len(choices) == 1:
        return [f"However alike a user's gradients are: {choices.pop()}."]
    return [in_words(verdict) for verdict in verdicts]


def predict(
    config: RunConfig,
    train: SizedUsers,
    group_sizes: Mapping[str, int | Sequence[int]],
    curve: NormCurve | None = None,
) -> Prediction:
    """Who should do better at a configuration's compute and ε; takes a second or two.

    Args:
        config: The run; its plan says compute, rounds, ε (finite), δ and adjacency.
        train: The training split of a UserStore.
        group_sizes: Those of the run, by algorithm.
        curve: L(G) as measured; without it the two extremes are the answer.

    Raises:
        InvalidInput: When the compute does not fit the data, or ε is not finite.
    """
    sizes = UserSizes.of_users(train)
    target = Target(
        epsilon=config.plan.epsilon,
        delta=config.plan.delta,
        gradients_per_round=config.plan.gradients_per_round,
        rounds=config.plan.rounds,
        adjacency=Adjacency(config.plan.adjacency),
    )
    of_run = {name: [given] if isinstance(given, int) else list(given) for name, given in group_sizes.items()}
    default = default_group_sizes(sizes, target)
    candidates = {
        name: sorted({*(default if kind.redraws else [sizes.median]), *of_run[name]})
        for name, kind in ALGORITHMS.items()
    }
    plans = calibrated_plans(sizes, target, candidates)
    plans_of_run = [plan for plan in plans if plan.group_size in of_run[plan.name]]
    curves = [ALIGNED, ORTHOGONAL] if curve is None else [curve, ALIGNED, ORTHOGONAL]
    advice = [compare(plans, sizes, one) for one in curves]
    return Prediction(
        arms=[compare(plans_of_run, sizes, one) for one in curves],
        advice=advice,
        private_statistics=private_statistics(sizes),
        turning_points=change_of_mind(plans, advice[0], sizes),
        correlated=_correlated(config, plans_of_run, target),
    )


def _correlated(config: RunConfig, plans: Sequence[Plan], target: Target) -> list[str]:
    if config.plan.wanted_bands == 1:
        return []
    bands = best_bands(plans, target, config.optimizer.workload(target.rounds))
    return [correlated_in_words(plan, forecast) for plan, forecast in zip(plans, bands, strict=True)]
