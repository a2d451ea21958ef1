"""How a total of gradient evaluations is best spent, as JSON values, in words and as a table."""

from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.plan.words import from_private_data, private_statistics, users_to_json
from fedsim.plan import ALGORITHMS, Plan, UserSizes
from fedsim.planner import Allocation, SignalCurve, Total
from fedsim.planner.allocation import ROUNDS
from fedsim.privacy.events import Adjacency

SHOWN = 5
"""Allocations of each algorithm in the table."""
LEVEL = 1.1
"""The best of both algorithms are called level where their effective rounds are within this factor."""


def allocations_to_json(
    sizes: UserSizes,
    total: Total,
    signal: SignalCurve,
    parameters: int,
    optimizer: str,
    found: dict[str, list[Allocation]],
) -> dict[str, Any]:
    """The whole answer as JSON values; allocations by algorithm, the best first."""
    bests = {name: ways[0] for name, ways in found.items()}
    best = max(bests.values(), key=lambda way: way.effective_rounds)
    statistics = private_statistics(sizes)
    return {
        "users": users_to_json(sizes),
        "target": {
            "epsilon": total.epsilon,
            "delta": total.delta,
            "total_gradients": total.gradients,
            "adjacency": total.adjacency.value,
        },
        "trainable_parameters": parameters,
        "signal": {
            "source": signal.name,
            "shared": {str(size): signal(size) ** 2 for size in (1, 2, 4, 8, 16)},
        },
        "allocations": {name: [_to_json(way) for way in ways] for name, ways in found.items()},
        "best": {"algorithm": best.plan.name, **_to_json(best), "flags": flags(best.plan, total)},
        "private_statistics": statistics,
        "in_words": [
            *_verdict(bests),
            *_signal_in_words(signal),
            *_caveats(best.plan, bests, sizes),
            _learning_rate(optimizer),
            *filter(None, [from_private_data(statistics)]),
        ],
    }


def flags(plan: Plan, total: Total) -> str:
    """The options of `train` that make this plan at the total's ε and δ."""
    chosen = {
        "algorithm": plan.name,
        "epsilon": f"{total.epsilon:g}",
        "delta": f"{total.delta:g}",
        "gradients-per-round": str(round(plan.gradients_per_round)),
        "rounds": str(plan.steps),
        "group-size": str(plan.group_size),
        "bands": str(plan.bands),
    }
    if plan.adjacency is not Adjacency.ADD_OR_REMOVE_ONE_USER:
        chosen["adjacency"] = plan.adjacency.value
    return " ".join(f"--plan.{name} {value}" for name, value in chosen.items())


def _to_json(way: Allocation) -> dict[str, Any]:
    plan = way.plan
    return {
        "rounds": plan.steps,
        "units_per_round": plan.normaliser,
        "gradients_per_round": plan.gradients_per_round,
        "group_size": plan.group_size,
        "bands": plan.bands,
        "noise_multiplier": plan.noise_multiplier,
        "noise_ratio": way.noise_ratio,
        "effective_rounds": way.effective_rounds,
    }


def _verdict(bests: dict[str, Allocation]) -> list[str]:
    """What each algorithm is best given, and which of them gets further."""
    lines = []
    ordered = sorted(bests.values(), key=lambda way: way.effective_rounds, reverse=True)
    for way in ordered:
        plan = way.plan
        noise = "independent noise" if plan.bands == 1 else f"noise in {plan.bands} bands"
        lines.append(
            f"{plan.title}: {plan.steps} rounds of {plan.normaliser:,.0f} {plan.unit}s with G = {plan.group_size} and "
            f"{noise}, worth {way.effective_rounds:.3g} rounds without noise."
        )
    if len(ordered) > 1:
        factor = ordered[0].effective_rounds / ordered[1].effective_rounds
        ahead = f"{ordered[0].plan.title} gets {factor:.2f} times as far as {ordered[1].plan.title}."
        lines.append("The two are level." if factor <= LEVEL else ahead)
    without = [kind.title for name, kind in ALGORITHMS.items() if name not in bests]
    return lines + [f"{title} cannot spend so much on these users." for title in without]


def _signal_in_words(signal: SignalCurve) -> list[str]:
    cosines = f"{signal(1) ** 2:.2g} with one example each, {signal(8) ** 2:.2g} with 8"
    if signal.name == "measured":
        return [f"The mean cosine between the gradients of two public users is {cosines}, as measured."]
    return [
        f"The mean cosine between the gradients of two users is taken to be {cosines}: --measure finds it on public "
        "users, and what is best depends on it."
    ]


def _caveats(best: Plan, bests: dict[str, Allocation], sizes: UserSizes) -> list[str]:
    lines = []
    if best.steps == ROUNDS[0]:
        lines.append(
            f"{ROUNDS[0]} rounds are the fewest that are advised: noise is what limits, but a model that takes fewer "
            "steps falls behind what is predicted of it. The next ones of the table may do as well."
        )
    if best.steps == ROUNDS[-1]:
        lines.append(f"{ROUNDS[-1]} rounds are the most that are looked at: noise hardly limits, more may be better.")
    for way in bests.values():
        plan = way.plan
        if not plan.redraws and (share := sizes.kept(plan.group_size) / sizes.kept(int(sizes.sizes[-1]))) < 0.9:
            lines.append(
                f"{plan.title} with G = {plan.group_size} keeps {share:.0%} of the examples for the whole run; what "
                "the others would have taught is not counted here."
            )
    return lines


def _learning_rate(optimizer: str) -> str:
    """What is still to be chosen, and how it moves with the cohort."""
    moved = (
        "Adam's steps keep their size whatever the noise, so that a larger cohort, whose steps hold more signal, and "
        "fewer rounds ask for a larger one."
        if optimizer == "adam"
        else "A larger cohort carries less noise into each step and so bears a larger one; fewer rounds need it."
    )
    return f"The learning rate is left to tune, on public users: {moved}"


def print_allocations(result: dict[str, Any]) -> None:
    """The table and the advice on the terminal."""
    console, best = Console(), result["best"]
    table = Table(title="Ways to spend the total, by the rounds without noise that they are worth")
    for heading in ("", "rounds", "units a round", "G", "bands", "σ", "worth"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, ways in result["allocations"].items():
        for way in ways[:SHOWN]:
            worth = f"{way['effective_rounds']:.3g}"
            chosen = name == best["algorithm"] and way is ways[0]
            table.add_row(
                ALGORITHMS[name].title,
                str(way["rounds"]),
                f"{way['units_per_round']:,.0f}",
                str(way["group_size"]),
                str(way["bands"]),
                f"{way['noise_multiplier']:.3f}",
                f"[bold]{worth} *[/bold]" if chosen else worth,
            )
    console.print(table)
    target, users = result["target"], result["users"]
    console.print(
        f"{users['num_users']:,} users, median {users['median_examples']} examples ({users['source']}); "
        f"{target['total_gradients']:,.0f} gradients in all, {result['trainable_parameters']:,} trainable parameters; "
        f"ε = {target['epsilon']:g}, δ = {target['delta']:g}.",
        highlight=False,
    )
    for line in result["in_words"]:
        console.print("• " + line, highlight=False)
    print(f"train it: {best['flags']}")
