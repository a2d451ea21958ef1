"""`plan`: ULS or ELS, and with which group size, answered before any training."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from fedsim.data.config import DataConfig
from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.plan import ALGORITHMS, Plan, UserSizes
from fedsim.planner import (
    ALIGNED,
    BASELINE,
    ORTHOGONAL,
    NormCurve,
    Target,
    Verdict,
    break_even_norm,
    calibrated_plans,
    compare,
    predicted_noise,
    what_if,
)
from fedsim.privacy.events import Adjacency
from fedsim.validation import require_positive

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
        return {"plan": budget, **{key: values[key] for key in ("data", "model") if key in values}}

    def run(self) -> int:
        """Print what is expected; 0."""
        target = self.plan.target()
        sizes = self._sizes()
        plans = calibrated_plans(sizes, target, self._candidates(sizes) if self.group_sizes else None)
        curves = self._curves()
        verdicts = [compare(plans, sizes, curve) for curve in curves]
        # Without a measured or assumed curve the orthogonal end is the one that leaves a choice.
        others = what_if(sizes, target, verdicts[0] if len(verdicts) > 2 else verdicts[-1])
        result = to_json(sizes, target, plans, verdicts, others)
        if self.output is not None:
            from experiments.report.plan_figure import plot_plan

            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "plan.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            plot_plan(plans, sizes, curves, self.output / "predicted_noise.png")
        if self.json:
            json.dump(result, sys.stdout, indent=2)
            print()
            return 0
        print_plan(sizes, target, plans, verdicts, result["in_words"])
        if self.output is not None:
            print(f"plot: {self.output / 'predicted_noise.png'}")
        return 0

    def _candidates(self, sizes: UserSizes) -> dict[str, Sequence[int]]:
        """The group sizes typed in, and the median where that is what is recommended: where examples are kept once."""
        with_median = sorted({*self.group_sizes, sizes.median})
        return {name: self.group_sizes if kind.redraws else with_median for name, kind in ALGORITHMS.items()}

    def _sizes(self) -> UserSizes:
        if self.num_users is not None:
            return UserSizes.of_quantiles(self.num_users, parse_quantiles(self.user_sizes or ("1",)))
        if self.user_sizes:
            raise InvalidInput("num-users", None, "given with --user-sizes")
        return UserSizes.of_users(self._store(self.data))

    def _store(self, data: DataConfig) -> Any:
        """The users of a data set; a prepared store is opened without loading any model."""
        from fedsim.data.ingest import open_or_build
        from fedsim.data.store import UserStore

        if data.source == "store":
            return UserStore.open(str(data.path)).split("train")
        return open_or_build(data, self._loaded().tokenizer).split("train")

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
            view = open_or_build(self.public, loaded.tokenizer)
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


def to_json(
    sizes: UserSizes, target: Target, plans: list[Plan], verdicts: list[Verdict], others: dict[str, Verdict]
) -> dict[str, Any]:
    """The whole answer as JSON values."""
    return {
        "users": {
            "num_users": sizes.num_users,
            "median_examples": sizes.median,
            "examples_at_90_percent": sizes.quantile(0.9),
            "largest": int(sizes.sizes[-1]),
            "source": sizes.source,
            "computed_from_private_data": sizes.private,
        },
        "target": {
            "epsilon": target.epsilon,
            "delta": target.delta,
            "gradients_per_round": target.gradients_per_round,
            "rounds": target.rounds,
            "adjacency": target.adjacency.value,
        },
        "plans": [
            {
                "algorithm": plan.name,
                "group_size": plan.group_size,
                "units_per_round": plan.normaliser,
                "sampling_probability": plan.sampling_probability,
                "noise_multiplier": plan.noise_multiplier,
                "predicted_noise": {
                    verdict.curve.name: predicted_noise(plan, verdict.curve, sizes.median) for verdict in verdicts
                },
            }
            for plan in plans
        ],
        "verdicts": [verdict_json(verdict) for verdict in verdicts],
        "what_if": {name: verdict_json(verdict) for name, verdict in others.items()},
        "private_statistics": private_statistics(sizes),
        "in_words": [
            *(in_words(verdict) for verdict in verdicts),
            *change_of_mind(plans, verdicts[0], sizes),
            *(f"With {name}: {choice(verdict)}." for name, verdict in others.items()),
            *filter(None, [from_private_data(private_statistics(sizes))]),
        ],
    }


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON values."""
    return {
        "norms": verdict.curve.name,
        "winner": verdict.winner,
        "els_over_uls_noise": verdict.ratio,
        **{f"{name}_group_size": plan.group_size for name, plan in verdict.plans.items()},
    }


def private_statistics(sizes: UserSizes) -> list[str]:
    """What the planner read from data to be protected, for the privacy statement."""
    if not sizes.private:
        return []
    return ["number of training users", "examples each user owns (median and capped totals)"]


def from_private_data(statistics: Sequence[str]) -> str:
    """The mark on what was made of such statistics; empty where there are none."""
    names = ", ".join(statistics)
    return f"Not private: computed from the data to be protected, without noise: {names}." if names else ""


CURVES = {
    "measured": "with gradient norms as measured on public users",
    "assumed": "with the alignment assumed",
    "aligned": "if a user's gradients were all alike",
    "orthogonal": "if a user's gradients were orthogonal",
}


def in_words(verdict: Verdict) -> str:
    """Who is expected to win under one curve, by how much, with which group sizes."""
    case = CURVES[verdict.curve.name]
    return f"{case[0].upper()}{case[1:]}: {choice(verdict)}."


def choice(verdict: Verdict) -> str:
    """Who is expected to win, by how much, with which group sizes."""
    groups = ", ".join(f"{plan.title} with G = {plan.group_size}" for plan in verdict.plans.values())
    if verdict.winner == "level":
        return f"level ({groups}; ELS has {verdict.ratio:.2f}× the noise of ULS)"
    title = ALGORITHMS[verdict.winner].title
    return f"{title}, with {max(verdict.ratio, 1 / verdict.ratio):.2f}× less noise ({groups})"


def change_of_mind(plans: list[Plan], verdict: Verdict, sizes: UserSizes) -> list[str]:
    """The gradient norms at which each ULS group size would stop being the better choice."""
    baseline = verdict.plans[BASELINE]
    lines = []
    for plan in plans:
        if plan.rows_per_unit(plan.group_size) == 1:  # its units are single examples, whose norm is L(1)
            continue
        group = f"{plan.title} with G = {plan.group_size}"
        least = 1 / math.sqrt(plan.rows_per_unit(sizes.median))
        norm = break_even_norm(plan, baseline)
        if norm >= 1:
            lines.append(f"{group} is ahead of {baseline.title} however alike a user's gradients are.")
        elif norm <= least:
            lines.append(f"{group} is behind {baseline.title} even if a user's gradients are orthogonal.")
        else:
            limit = f"L({plan.group_size})/L(1) < {norm:.2f}"
            lines.append(f"{group} is ahead of {baseline.title} as long as {limit}.")
    return lines


def print_plan(sizes: UserSizes, target: Target, plans: list[Plan], verdicts: list[Verdict], lines: list[str]) -> None:
    """The table and the advice on the terminal."""
    console = Console()
    table = Table(title="Predicted noise of the released mean, in units of an example's gradient norm")
    for heading in ("", "G", "units a round", "σ", *(f"noise, {verdict.curve.name}" for verdict in verdicts)):
        table.add_column(heading, justify="left" if not heading else "right")
    for plan in plans:
        cells = []
        for verdict in verdicts:
            noise = f"{predicted_noise(plan, verdict.curve, sizes.median):.5f}"
            cells.append(f"[bold]{noise} *[/bold]" if plan in verdict.plans.values() else noise)
        table.add_row(
            plan.title,
            str(plan.group_size),
            f"{plan.normaliser:,.1f}",
            f"{plan.noise_multiplier:.3f}",
            *cells,
        )
    console.print(table)
    console.print("* recommended: ELS keeps the median a user owns, ULS takes the group size of least noise\n")
    console.print(
        f"{sizes.num_users:,} users, median {sizes.median} examples ({sizes.source}); "
        f"{target.gradients_per_round:,.0f} gradients a round, {target.rounds:,} rounds; "
        f"ε = {target.epsilon:g}, δ = {target.delta:g}.",
        highlight=False,
    )
    for line in lines:
        console.print("• " + line, highlight=False)


def _known(key: str) -> bool:
    return key.replace("-", "_") in BudgetConfig.__dataclass_fields__
