"""`plan`: ULS or ELS, and with which group size, answered before any training."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments.plan.words import print_plan, to_json
from fedsim.config import OptimizerConfig
from fedsim.data.config import DataConfig
from fedsim.disk import require_writable
from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.plan import ALGORITHMS, UserSizes
from fedsim.planner import (
    ALIGNED,
    ORTHOGONAL,
    NormCurve,
    Target,
    best_bands,
    calibrated_plans,
    compare,
    what_if,
)
from fedsim.privacy.dominating_pairs import MOST_EXAMPLES
from fedsim.privacy.events import Adjacency
from fedsim.validation import require_at_least, require_at_most, require_positive

PUBLIC_USERS = DataConfig(packages=("standard-library",))
"""Users nobody needs to protect: the modules of Python's standard library, with their docstrings as examples."""


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Compute and guarantee, named as in the other commands."""

    epsilon: float = 8.0
    """User-level ε of the whole run."""
    delta: float = 1e-5
    """User-level δ."""
    gradients_per_round: int = 256
    """Expected gradient evaluations a round."""
    rounds: int = 16
    """Rounds (uls) or steps (els)."""
    adjacency: Literal["add-or-remove-one-user", "replace-one-user"] = "add-or-remove-one-user"
    """The change of the data set that must stay hidden."""
    tokens: float | None = None
    """The budget as tokens over the whole run, in place of gradients-per-round."""
    hours: float | None = None
    """The budget as hours of training, in place of gradients-per-round; needs tokens-per-second."""
    tokens_per_second: float | None = None
    """Measured training throughput."""
    tokens_per_example: float = 64.0
    """Mean tokens of an example, where the budget is in tokens or hours."""

    def target(self) -> Target:
        """Gradient evaluations a round from whichever budget was given."""
        if self.tokens is not None and self.hours is not None:
            raise InvalidInput("plan.hours", self.hours, "left out when plan.tokens is given")
        tokens = self.tokens
        if self.hours is not None:
            if self.tokens_per_second is None:
                raise InvalidInput(
                    "plan.tokens-per-second", None, "given with plan.hours", "A run's report shows its throughput."
                )
            require_positive("plan.hours", self.hours)
            require_positive("plan.tokens-per-second", self.tokens_per_second)
            tokens = self.hours * 3600 * self.tokens_per_second
        gradients = float(self.gradients_per_round)
        if tokens is not None:
            require_positive("plan.tokens", tokens)
            require_positive("plan.tokens-per-example", self.tokens_per_example)
            gradients = tokens / self.tokens_per_example / self.rounds
        return Target(
            epsilon=self.epsilon,
            delta=self.delta,
            gradients_per_round=gradients,
            rounds=self.rounds,
            adjacency=Adjacency(self.adjacency),
        )


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Predict, before any training, whether user-level or example-level sampling will do better, and how to group."""

    plan: BudgetConfig = field(default_factory=BudgetConfig)
    """Compute and guarantee."""
    num_users: int | None = None
    """Users, typed in; without it the users of --data.* are counted."""
    user_sizes: tuple[str, ...] = ()
    """Examples a user owns as quantiles, with --num-users: "0.5:12 0.9:65 1:1404", or one number for all: "16"."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """What makes use of the releases; how well noise that is correlated over rounds cancels depends on it."""
    group_sizes: tuple[int, ...] = ()
    """Group sizes to look at; by default powers of two up to what the users own."""
    alignment: float | None = None
    """Assume that gradients of one user's examples have this mean cosine: 1 alike, 0 orthogonal."""
    measure: bool = False
    """Measure L(G), the norm of a user's mean gradient, at the model of --model.* on public users (--public.*)."""
    data: DataConfig = field(default_factory=DataConfig)
    """The users, where they are not typed in."""
    public: DataConfig = PUBLIC_USERS
    """Public users for --measure: by default the modules of Python's standard library."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model whose tokenizer cuts --data.*, and whose gradients --measure looks at."""
    json: bool = False
    """Print JSON in place of the table."""
    output: Path | None = None
    """Folder for plan.json and the plot of predicted noise against group size."""

    @classmethod
    def preset_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What a preset of a training command says about planning."""
        budget = {key: value for key, value in values.get("plan", {}).items() if _known(key)}
        return {"plan": budget, **{key: values[key] for key in ("data", "model", "optimizer") if key in values}}

    def __post_init__(self) -> None:
        for size in self.group_sizes:
            require_at_least("group-sizes", size, 1)
            require_at_most("group-sizes", size, MOST_EXAMPLES)

    def run(self) -> int:
        """Print what is expected; 0."""
        if self.output is not None:
            require_writable(self.output)
        target = self.plan.target()
        sizes = self._sizes()
        plans = calibrated_plans(sizes, target, self._candidates(sizes) if self.group_sizes else None)
        curves = self._curves()
        verdicts = [compare(plans, sizes, curve) for curve in curves]
        # Without a measured or assumed curve the orthogonal end is the one that leaves a choice.
        others = what_if(sizes, target, verdicts[0] if len(verdicts) > 2 else verdicts[-1])
        recommended = list(dict.fromkeys(plan for verdict in verdicts for plan in verdict.plans.values()))
        promised = best_bands(recommended, target, self.optimizer.workload(target.rounds))
        bands = dict(zip(recommended, promised, strict=True))
        result = to_json(sizes, target, plans, verdicts, others, bands)
        if self.output is not None:
            from experiments.report.plan_figure import plot_plan

            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "plan.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            plot_plan(plans, sizes, curves, self.output / "predicted_noise.png")
        if self.json:
            json.dump(result, sys.stdout, indent=2)
            print()
            return 0
        print_plan(sizes, target, plans, verdicts, bands, result["in_words"])
        if self.output is not None:
            print(f"plot: {self.output / 'predicted_noise.png'}")
        return 0

    def _candidates(self, sizes: UserSizes) -> dict[str, Sequence[int]]:
        """The group sizes typed in, and the median where that is what is recommended: where examples are kept once."""
        with_median = sorted({*self.group_sizes, min(sizes.median, MOST_EXAMPLES)})
        return {name: self.group_sizes if kind.redraws else with_median for name, kind in ALGORITHMS.items()}

    def _sizes(self) -> UserSizes:
        if self.num_users is not None:
            return UserSizes.of_quantiles(self.num_users, parse_quantiles(self.user_sizes or ("1",)))
        if self.user_sizes:
            raise InvalidInput("num-users", None, "given with --user-sizes")
        sizes = UserSizes.of_users(self._store(self.data))
        if sizes.several_owners:
            hint = "Only els is defined where examples have several owners: there is nothing to choose between."
            raise InvalidInput("data.several-owners", "keep", "drop for plan", hint)
        return sizes

    def _store(self, data: DataConfig) -> Any:
        """The users of a data set; a prepared store is opened without loading any model."""
        from fedsim.data.ingest import open_or_build
        from fedsim.data.store import UserStore

        if data.source == "store":
            return UserStore.open(str(data.path)).split("train")
        return open_or_build(data, self._loaded().tokenizer, apart=self.model.reads_apart).split("train")

    def _loaded(self) -> Any:
        from fedsim.cache import default_cache
        from fedsim.data.sources import public_texts
        from fedsim.models.load import load_model

        return load_model(self.model, public_texts=public_texts, cache=default_cache())

    def _curves(self) -> list[NormCurve]:
        curves = [ALIGNED, ORTHOGONAL]
        if self.alignment is not None:
            curves.insert(0, NormCurve.of_alignment("assumed", self.alignment))
        if self.measure:
            from experiments.public_norms import measure_norms
            from fedsim.data.ingest import open_or_build

            loaded = self._loaded()
            view = open_or_build(self.public, loaded.tokenizer, apart=self.model.reads_apart)
            curves.insert(0, measure_norms(loaded.model, loaded.objective, view))
        return curves


def parse_quantiles(texts: tuple[str, ...]) -> dict[float, float]:
    """{0.5: 12.0} from ("0.5:12",); a number alone is the size of every user."""
    quantiles: dict[float, float] = {}
    for text in texts:
        level, _, size = text.rpartition(":")
        try:
            quantiles[float(level or 0.5)] = float(size)
        except ValueError:
            raise InvalidInput("user-sizes", text, 'level:examples, such as "0.5:12"') from None
    return quantiles


def _known(key: str) -> bool:
    return key.replace("-", "_") in BudgetConfig.__dataclass_fields__
