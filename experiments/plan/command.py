"""`plan`: ULS or ELS, and with which group size, answered before any training."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.plan.allocation import allocations_to_json, print_allocations
from experiments.plan.budget import BudgetConfig
from experiments.plan.words import print_plan, to_json
from fedsim.config import OptimizerConfig
from fedsim.data.config import DataConfig
from fedsim.disk import require_writable
from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.plan import ALGORITHMS, UserSizes
from fedsim.plan.limits import require_delta_for
from fedsim.planner import (
    ALIGNED,
    ALIGNMENT,
    ASSUMED_SIGNAL,
    ORTHOGONAL,
    SIMILARITY,
    NormCurve,
    SignalCurve,
    Target,
    Total,
    allocate,
    best_bands,
    calibrated_plans,
    compare,
    what_if,
)
from fedsim.privacy.dominating_pairs import MOST_EXAMPLES
from fedsim.validation import require_at_least, require_at_most

PUBLIC_USERS = DataConfig(packages=("standard-library",))
"""Users nobody needs to protect: the modules of Python's standard library, with their docstrings as examples."""


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
    similarity: float | None = None
    """With --plan.total-gradients: assume that gradients of examples of different users have this mean cosine; about
    0.1 for a small pre-trained model on text that is new to it."""
    trainable_parameters: int | None = None
    """With --plan.total-gradients: parameters that are trained, where the model of --model.* is not to be loaded."""
    measure: bool = False
    """Measure at the model of --model.* on public users (--public.*) L(G), the norm of a user's mean gradient, and how
    much of it users share."""
    data: DataConfig = field(default_factory=DataConfig)
    """The users, where they are not typed in."""
    public: DataConfig = PUBLIC_USERS
    """Public users for --measure: by default the modules of Python's standard library."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model whose tokenizer cuts --data.*, and whose gradients --measure looks at."""
    json: bool = False
    """Print JSON in place of the table."""
    output: Path | None = None
    """Folder for plan.json and the plot: predicted noise against group size, or effective rounds against rounds."""

    @classmethod
    def preset_values(cls, values: dict[str, Any], arguments: Sequence[str] = ()) -> dict[str, Any]:
        """What a preset of a training command says about planning.

        Args:
            values: The preset's.
            arguments: What else is on the command line: a total takes the place of the preset's rounds.
        """
        chosen = any(one.partition("=")[0] == "--plan.total-gradients" for one in arguments)
        left_out = {"gradients-per-round", "rounds"} if chosen else set()
        budget = {key: value for key, value in values.get("plan", {}).items() if _known(key) and key not in left_out}
        return {"plan": budget, **{key: values[key] for key in ("data", "model", "optimizer") if key in values}}

    def __post_init__(self) -> None:
        for size in self.group_sizes:
            require_at_least("group-sizes", size, 1)
            require_at_most("group-sizes", size, MOST_EXAMPLES)
        for name in ("similarity", "trainable_parameters"):
            if getattr(self, name) is not None and self.plan.total_gradients is None:
                raise InvalidInput(name.replace("_", "-"), getattr(self, name), "given with plan.total-gradients")
        for name in ("similarity", "alignment"):
            if self.measure and self.plan.total_gradients is not None and getattr(self, name) is not None:
                raise InvalidInput(name, getattr(self, name), "left out with measure", "It is measured.")
        if self.trainable_parameters is not None:
            require_at_least("trainable-parameters", self.trainable_parameters, 1)

    def run(self) -> int:
        """Print what is expected; 0."""
        if self.output is not None:
            require_writable(self.output)
        total = self.plan.total()
        return self._compare(self.plan.target()) if total is None else self._allocate(total)

    def _compare(self, target: Target) -> int:
        """At fixed gradients a round and rounds: which algorithm, with which group size."""
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

    def _allocate(self, total: Total) -> int:
        """Of a total of gradient evaluations: which cohort, rounds, group size and bands of noise."""
        signal = self._assumed_signal()
        sizes = self._sizes()
        if self.measure:
            signal = self._measured()[1]
        parameters = self.trainable_parameters or trainable_parameters(self._loaded.model)
        found = allocate(sizes, total, signal, parameters, self.optimizer.workload, self.group_sizes)
        result = allocations_to_json(sizes, total, signal, parameters, self.optimizer.name, found)
        if self.output is not None:
            from experiments.report.allocation_figure import plot_allocations

            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "plan.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            plot_allocations(found, sizes, self.output / "effective_rounds.png")
        if self.json:
            json.dump(result, sys.stdout, indent=2)
            print()
            return 0
        print_allocations(result)
        if self.output is not None:
            print(f"plot: {self.output / 'effective_rounds.png'}")
        return 0

    def _assumed_signal(self) -> SignalCurve:
        if self.similarity is None and self.alignment is None:
            return ASSUMED_SIGNAL
        similarity = SIMILARITY if self.similarity is None else self.similarity
        alignment = max(similarity, ALIGNMENT) if self.alignment is None else self.alignment
        return SignalCurve.of_similarity("assumed", similarity, alignment)

    def _candidates(self, sizes: UserSizes) -> dict[str, Sequence[int]]:
        """The group sizes typed in, and the median where that is what is recommended: where examples are kept once."""
        with_median = sorted({*self.group_sizes, min(sizes.median, MOST_EXAMPLES)})
        return {name: self.group_sizes if kind.redraws else with_median for name, kind in ALGORITHMS.items()}

    def _sizes(self) -> UserSizes:
        sizes = self._users()
        require_delta_for(self.plan.delta, sizes.num_users)
        return sizes

    def _users(self) -> UserSizes:
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
        return open_or_build(data, self._loaded.tokenizer, apart=self.model.reads_apart).split("train")

    @cached_property
    def _loaded(self) -> Any:
        from fedsim.cache import default_cache
        from fedsim.data.sources import public_texts
        from fedsim.models.load import load_model

        return load_model(self.model, public_texts=public_texts, cache=default_cache())

    def _measured(self) -> tuple[NormCurve, SignalCurve]:
        from experiments.public_norms import measure_curves
        from fedsim.data.ingest import open_or_build

        view = open_or_build(self.public, self._loaded.tokenizer, apart=self.model.reads_apart)
        return measure_curves(self._loaded.model, self._loaded.objective, view)

    def _curves(self) -> list[NormCurve]:
        curves = [ALIGNED, ORTHOGONAL]
        if self.alignment is not None:
            curves.insert(0, NormCurve.of_alignment("assumed", self.alignment))
        if self.measure:
            curves.insert(0, self._measured()[0])
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


def trainable_parameters(model: Any) -> int:
    """d: how many numbers of a model are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
