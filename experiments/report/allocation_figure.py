"""Effective rounds against rounds, at one total of gradient evaluations."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.report.figures.style import COLOURS, blank, finish, save
from fedsim.plan import UserSizes
from fedsim.planner import Allocation


def plot_allocations(found: Mapping[str, Sequence[Allocation]], sizes: UserSizes, path: Path) -> Path:
    """What each number of rounds is worth with its best group size and bands.

    Args:
        found: By algorithm, those of most effective rounds first.
        sizes: The users they were found for.
        path: Where the PNG goes.
    """
    figure, axes = blank(size=(6.4, 4.2))
    widths = iter((4.0, 1.5))  # where both are worth as much, one is seen beneath the other
    for place, (name, ways) in enumerate(found.items()):
        best: dict[int, Allocation] = {}
        for way in ways:
            best.setdefault(way.plan.steps, way)
        rounds = sorted(best)
        worth = [best[one].effective_rounds for one in rounds]
        axes.plot(rounds, worth, color=COLOURS[name], linewidth=next(widths), marker="o", label=ways[0].plan.title)
        for one in rounds:
            plan = best[one].plan
            axes.annotate(
                f"{plan.group_size} | {plan.bands}",
                (one, best[one].effective_rounds),
                xytext=(0, (9, -15)[place]),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=COLOURS[name],
            )
        axes.plot(ways[0].plan.steps, ways[0].effective_rounds, marker="*", markersize=13, color=COLOURS[name])
    axes.set_xscale("log")
    axes.set_xticks([25, 50, 100, 200, 400, 800], ["25", "50", "100", "200", "400", "800"])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
    axes.set_xlabel("rounds (beside each point: group size | bands; star: best)")
    axes.set_ylabel("worth as many rounds without noise")
    if sizes.private:
        axes.set_title("not private: made of users' sizes, without noise", fontsize=9)
    finish(axes)
    return save(figure, path)
