"""Effective rounds against rounds, at one total of gradient evaluations."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.report.figures.style import COLOURS, blank, finish, save
from fedsim.plan import UserSizes
from fedsim.planner import Allocation


def plot_allocations(found: Mapping[str, Sequence[Allocation]], sizes: UserSizes, path: Path) -> Path:
    """What each number of rounds is worth with its best group size and bands, on logarithmic axes.

    Args:
        found: By algorithm, those of most effective rounds first.
        sizes: The users they were found for.
        path: Where the PNG goes.
    """
    figure, axes = blank(size=(6.4, 4.2))
    for place, (name, ways) in enumerate(found.items()):
        best: dict[int, Allocation] = {}
        for way in ways:
            best.setdefault(way.plan.steps, way)
        rounds = sorted(best)
        worth = [best[one].effective_rounds for one in rounds]
        axes.plot(rounds, worth, color=COLOURS[name], marker="o", markersize=4, label=ways[0].plan.title)
        for one in rounds:
            plan = best[one].plan
            axes.annotate(
                f"{plan.group_size} | {plan.bands}",
                (one, best[one].effective_rounds),
                xytext=(0, (7, -13)[place % 2]),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=COLOURS[name],
            )
        axes.plot(ways[0].plan.steps, ways[0].effective_rounds, marker="*", markersize=13, color=COLOURS[name])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("rounds (beside each point: group size | bands; star: best)")
    axes.set_ylabel("worth as many rounds without noise")
    if sizes.private:
        axes.set_title("not private: made of users' sizes, without noise", fontsize=9)
    finish(axes)
    return save(figure, path)
