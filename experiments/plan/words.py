"""The planner's answer, as JSON values, in words and as a table."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsim.plan import ALGORITHMS, Plan, UserSizes
from fedsim.plan.bands import BandsForecast
from fedsim.planner import BASELINE, Target, Verdict, break_even_norm, predicted_noise


def to_json(
    sizes: UserSizes,
    target: Target,
    plans: list[Plan],
    verdicts: list[Verdict],
    others: dict[str, Verdict],
    bands: dict[Plan, BandsForecast],
) -> dict[str, Any]:
    """The whole answer as JSON values."""
    return {
        "users": users_to_json(sizes),
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
                "correlated": _correlated(bands.get(plan)),
            }
            for plan in plans
        ],
        "verdicts": [verdict_json(verdict) for verdict in verdicts],
        "what_if": {name: verdict_json(verdict) for name, verdict in others.items()},
        "private_statistics": private_statistics(sizes),
        "in_words": [
            *(in_words(verdict) for verdict in verdicts),
            *change_of_mind(plans, verdicts[0], sizes),
            *(correlated_in_words(plan, bands[plan]) for plan in verdicts[0].plans.values()),
            *(f"With {name}: {choice(verdict)}." for name, verdict in others.items()),
            *filter(None, [from_private_data(private_statistics(sizes))]),
        ],
    }


def users_to_json(sizes: UserSizes) -> dict[str, Any]:
    """How many examples users own, as JSON values."""
    return {
        "num_users": sizes.num_users,
        "median_examples": sizes.median,
        "examples_at_90_percent": sizes.quantile(0.9),
        "largest": int(sizes.sizes[-1]),
        "source": sizes.source,
        "computed_from_private_data": sizes.private,
    }


def _correlated(forecast: BandsForecast | None) -> dict[str, Any] | None:
    """What correlating a plan's noise promises, as JSON values; None where it was not asked: of plans that nobody
    recommends."""
    if forecast is None:
        return None
    return {
        "bands": forecast.bands,
        "noise_multiplier": forecast.noise_multiplier,
        "noise_ratio": forecast.ratio,
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


def correlated_in_words(plan: Plan, forecast: BandsForecast) -> str:
    """What correlating a plan's noise over rounds promises."""
    who = f"{plan.title} with G = {plan.group_size}"
    if forecast.bands == 1:
        return f"{who}: noise that is correlated over rounds (--plan.bands auto) promises nothing."
    return (
        f"{who}: noise correlated over {forecast.bands} rounds (--plan.bands auto) promises {forecast.ratio:.2f} "
        "times the noise in what the optimizer makes of all rounds, at the same ε."
    )


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


def print_plan(
    sizes: UserSizes,
    target: Target,
    plans: list[Plan],
    verdicts: list[Verdict],
    bands: dict[Plan, BandsForecast],
    lines: list[str],
) -> None:
    """The table and the advice on the terminal."""
    console = Console()
    table = Table(title="Predicted noise of the released mean, in units of an example's gradient norm")
    for heading in (
        "",
        "G",
        "units a round",
        "σ",
        *(f"noise, {verdict.curve.name}" for verdict in verdicts),
        "bands",
        "× noise",
    ):
        table.add_column(heading, justify="left" if not heading else "right")
    for plan in plans:
        forecast = bands.get(plan)
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
            "" if forecast is None else str(forecast.bands),
            "" if forecast is None else f"{forecast.ratio:.2f}",
        )
    console.print(table)
    console.print("* recommended: ELS keeps the median a user owns, ULS takes the group size of least noise")
    console.print(
        "bands, × noise: of what is recommended, correlated over the best number of rounds, and what is left of it at "
        "the same ε\n"
    )
    console.print(
        f"{sizes.num_users:,} users, median {sizes.median} examples ({sizes.source}); "
        f"{target.gradients_per_round:,.0f} gradients a round, {target.rounds:,} rounds; "
        f"ε = {target.epsilon:g}, δ = {target.delta:g}.",
        highlight=False,
    )
    for line in lines:
        console.print("• " + line, highlight=False)
