"""Do text canaries keep their confidence? Seeded trials of one plan, each a training run of its own.

python -m benchmarks.text_canaries

Each trial trains a small model on canaries alone, everybody in each round, and puts a lower bound on ε beside the
certified one. Ends with one JSON line: how many bounds lie above what is certified, and how large they are.
"""

import json
import sys
from dataclasses import dataclass

import numpy as np

from benchmarks.command_line import run_benchmark
from experiments.audit.text_canaries import TextFinding, text_canaries
from experiments.audit.text_model import TextModel
from fedsim.config import OptimizerConfig, PlanConfig, RunConfig
from fedsim.plan import Algorithm, UserSizes
from fedsim.validation import require_at_least


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Seeded trials of text canaries."""

    algorithms: tuple[Algorithm, ...] = ("uls", "els")
    """Which are attacked."""
    trials: int = 50
    """Of each, with seeds of its own, from 0."""
    canaries: int = 500
    """Of each trial."""
    epsilon: float = 4.0
    """Certified, at δ = 1e-5."""
    rounds: int = 24
    """Of each run."""
    els_group_size: int = 2
    """Examples of a canary with els; with uls it has one."""
    vocabulary: int = 2048
    """Tokens of the model."""
    width: int = 32
    """Of its embeddings."""
    confidence: float = 0.95
    """Of each bound."""
    control: bool = False
    """Keep every canary out, whatever its coin: nothing is to be found."""

    def run(self) -> None:
        """All trials, a line each, and what they say together."""
        require_at_least("trials", self.trials, 1)
        outcomes = {}
        for place, algorithm in enumerate(self.algorithms):  # at one seed both would have the same noise
            found = []
            for seed in range(self.trials):
                found.append(self._trial(algorithm, seed + self.trials * place))
                print(f"{algorithm} {seed}: {found[-1].in_words()}", flush=True)
            outcomes[algorithm] = summary(found)
        print(json.dumps({"benchmark": "text_canaries", "control": self.control, **outcomes}))

    def _trial(self, algorithm: Algorithm, seed: int) -> TextFinding:
        group_size = 1 if algorithm == "uls" else self.els_group_size
        config = PlanConfig(
            algorithm=algorithm,
            epsilon=self.epsilon,
            rounds=self.rounds,
            group_size=group_size,
            gradients_per_round=self.canaries * group_size,
        )
        made = TextModel.of_size(self.vocabulary, self.width)
        return text_canaries(
            RunConfig(plan=config),
            config.for_users(UserSizes.of_quantiles(self.canaries, {0.5: group_size})),
            made,
            made.vocabulary,
            canaries=self.canaries,
            optimizer=OptimizerConfig(name="sgd", learning_rate=0.03),
            confidence=self.confidence,
            seed=seed,
            control=self.control,
        )


def summary(found: list[TextFinding]) -> dict[str, float]:
    """What the trials of one algorithm say together."""
    lower = np.array([one.finding.epsilon_lower for one in found])
    free = np.array([one.finding.epsilon_lower_free for one in found])
    areas = np.array([one.area.area for one in found])
    return {
        "trials": len(found),
        "epsilon_certified": max(one.finding.epsilon_certified for one in found),
        "above_certified": sum(one.finding.contradicts for one in found),
        "epsilon_lower_mean": round(float(lower.mean()), 3),
        "epsilon_lower_most": round(float(lower.max()), 3),
        "epsilon_lower_free_mean": round(float(free.mean()), 3),
        "epsilon_lower_free_most": round(float(free.max()), 3),
        "area_mean": round(float(areas.mean()), 4),
    }


if __name__ == "__main__":
    sys.exit(run_benchmark(Trials))
