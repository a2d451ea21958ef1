"""The planner's picture: predicted noise against group size, for both algorithms."""

from collections.abc import Sequence
from pathlib import Path

from experiments.report.figures.style import COLOURS, blank, finish, save
from fedsim.plan import Plan, UserSizes
from fedsim.planner import NormCurve, compare, predicted_noise

STYLES = {"measured": "-", "assumed": "-", "aligned": "--", "orthogonal": ":"}


def plot_plan(plans: Sequence[Plan], sizes: UserSizes, curves: Sequence[NormCurve], path: Path) -> Path:
    """Noise of the released mean, in units of one example's gradient norm, on logarithmic axes."""
    figure, axes = blank(size=(6.4, 4.2))
    verdicts = [compare(plans, sizes, curve) for curve in curves]
    els = [plan for plan in plans if plan.name == "els"]
    axes.plot(
        [plan.group_size for plan in els],
        [predicted_noise(plan, curves[0], sizes.median) for plan in els],
        color=COLOURS["els"],
        marker="o",
        label="ELS",
    )
    uls = [plan for plan in plans if plan.name == "uls"]
    for curve in curves:
        axes.plot(
            [plan.group_size for plan in uls],
            [predicted_noise(plan, curve, sizes.median) for plan in uls],
            color=COLOURS["uls"],
            linestyle=STYLES[curve.name],
            marker="o",
            markersize=4,
            label=f"ULS, gradients {curve.name}" if curve.name != "measured" else "ULS, norms measured",
        )
    for verdict in verdicts:
        for name, plan in verdict.plans.items():
            axes.plot(plan.group_size, verdict.noise[name], marker="*", markersize=13, color=COLOURS[name])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({plan.group_size for plan in plans})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("group size G (star: recommended)")
    axes.set_ylabel("predicted noise of the released mean")
    if sizes.private:
        axes.set_title("not private: made of users' sizes, without noise", fontsize=9)
    finish(axes)
    return save(figure, path)
