"""The study's figures."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from benchmarks.regime.outcomes import Lead, Results, Setting, at_25_rounds, by_diversity, leads
from experiments.report.figures.style import COLOURS, GREY, OTHER_COLOURS, blank, finish, save
from experiments.sweep.points import ARM_TITLES

LOSS = "loss on held-out users (nats)"
PANELS = (9.0, 3.6)
"""Of a figure of two panels, inches."""
KINDS = {"alike": "alike", "": "its own", "mixed": "anybody's"}
"""What a user's examples are, by the end of a corpus's name."""


def draw(results: Results, folder: Path) -> list[Path]:
    """Every figure for which there are results, as PNG; returns their paths."""
    drawn = [
        _against_epsilon(results, folder / "regime_epsilon.png"),
        _against_compute(results, folder / "regime_compute.png"),
        _group_sizes(results, folder / "regime_group_sizes.png"),
        _allocation(results, folder / "regime_allocation.png"),
        _diversity(results, folder / "regime_diversity.png"),
    ]
    return [path for path in drawn if path is not None]


def _against_epsilon(results: Results, path: Path) -> Path | None:
    found = leads(results, study="shakespeare-epsilon")
    if len(found) < 2:
        return None
    figure, (left, right) = blank(1, 2, size=PANELS)
    _outcomes(left, found, lambda setting: setting.epsilon, results.pretrained["shakespeare"])
    left.set(
        xscale="log", xlabel="user-level ε (certified)", ylabel=LOSS, title="1,098 users, 1,024 gradients a round"
    )
    _leads(right, found, lambda setting: setting.epsilon)
    right.set(xscale="log", xlabel="user-level ε (certified)", title="lead of ULS")
    _places(left, right, values=[one.uls.epsilon for one in found])
    return save(figure, path)


def _against_compute(results: Results, path: Path) -> Path | None:
    found = at_25_rounds(results)
    if len(found) < 2:
        return None
    figure, (left, right) = blank(1, 2, size=PANELS)
    _outcomes(left, found, lambda setting: setting.place.gradients, results.pretrained["shakespeare"])
    left.set(xscale="log", xlabel="gradient evaluations a round", ylabel=LOSS, title="1,098 users, ε = 2, 25 rounds")
    _leads(right, found, lambda setting: setting.place.gradients)
    right.set(xscale="log", xlabel="gradient evaluations a round", title="lead of ULS")
    for axes in (left, right):
        axes.axvline(1098, color=GREY, linestyle=":", linewidth=1)
    _places(left, right, values=[one.uls.place.gradients for one in found])
    return save(figure, path)


def _group_sizes(results: Results, path: Path) -> Path | None:
    settings = list(results.of(study="shakespeare-epsilon"))
    epsilons = sorted({one.epsilon for one in settings})
    if not epsilons:
        return None
    figure, panels = blank(1, len(epsilons), size=(2.6 * len(epsilons) + 1, 3.4), squeeze=False)
    for axes, epsilon in zip(panels[0], epsilons, strict=True):
        for arm in ("uls", "els"):
            own = sorted((s for s in settings if s.epsilon == epsilon and s.arm == arm), key=lambda s: s.group_size)
            axes.plot(
                [s.group_size for s in own], [s.loss for s in own], "o-", color=COLOURS[arm], label=ARM_TITLES[arm]
            )
        axes.set(xscale="log", xlabel="group size G", title=f"ε = {epsilon:g}")
        sizes = sorted({s.group_size for s in settings})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        finish(axes, legend=axes is panels[0][0])
    panels[0][0].set_ylabel(LOSS)
    return save(figure, path)


def _allocation(results: Results, path: Path) -> Path | None:
    settings = list(results.of(study="irc-allocation"))
    if len({one.place for one in settings}) < 2:
        return None
    figure, axes = blank()
    names = {"1": "independent noise", "auto": "correlated noise"}
    for bands, colour in zip(names, (COLOURS["uls"], OTHER_COLOURS[0]), strict=True):
        own = sorted((s for s in settings if s.bands == bands), key=lambda s: s.place.rounds)
        axes.errorbar(
            [s.place.rounds for s in own],
            [s.loss for s in own],
            yerr=[s.half or 0 for s in own],
            fmt="o-",
            color=colour,
            capsize=3,
            label=names[bands],
        )
    title = "Ubuntu IRC, ε = 8, G = 1, 6,400 gradients"
    axes.set(xscale="log", xlabel="rounds (learning rate of public users)", ylabel=LOSS, title=title)
    rates = {s.place.rounds: s.rate for s in settings}
    axes.set_xticks(list(rates), [f"{rounds}\n({rate:g})" for rounds, rate in rates.items()])
    axes.minorticks_off()
    finish(axes)
    return save(figure, path)


def _diversity(results: Results, path: Path) -> Path | None:
    texts = {"shakespeare": "Shakespeare by role", "synthetic": "20,000 synthetic users"}
    by_title = {title: by_diversity(results, text) for text, title in texts.items()}
    found = {title: some for title, some in by_title.items() if len(some) > 1}
    if not found:
        return None
    width = PANELS[0] * len(found) / len(texts)
    figure, panels = blank(1, len(found), size=(width, PANELS[1]), sharey=True, squeeze=False)
    for axes, (title, some) in zip(panels[0], found.items(), strict=True):
        axes.errorbar(
            range(len(some)),
            [one.nats for one in some],
            yerr=[one.half or 0 for one in some],
            fmt="o",
            capsize=4,
            color=COLOURS["uls"],
        )
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set_xticks(range(len(some)), [KINDS[one.uls.corpus.partition("-")[2]] for one in some])
        axes.set(xlabel="a user's examples", title=f"{title}, ε = 2, B = 1,024")
        axes.margins(x=0.3)
        finish(axes, legend=False)
    panels[0][0].set_ylabel("lead of ULS (nats)")
    return save(figure, path)


def _outcomes(axes: Axes, found: Sequence[Lead], place: Callable[[Setting], float], pretrained: float) -> None:
    for arm in ("uls", "els"):
        own = [getattr(one, arm) for one in found]
        axes.errorbar(
            [place(s) for s in own],
            [s.loss for s in own],
            yerr=[s.half or 0 for s in own],
            fmt="o-",
            color=COLOURS[arm],
            capsize=3,
            label=f"{ARM_TITLES[arm]}, best group size",
        )
        if arm == "uls":
            for s in own:
                axes.annotate(
                    f"G = {s.group_size}", (place(s), s.loss), textcoords="offset points", xytext=(4, -12), fontsize=7
                )
    axes.axhline(pretrained, color=GREY, linestyle="--", linewidth=1, label="pre-trained")
    finish(axes)


def _leads(axes: Axes, found: Sequence[Lead], place: Callable[[Setting], float]) -> None:
    axes.errorbar(
        [place(one.uls) for one in found],
        [one.nats for one in found],
        yerr=[one.half or 0 for one in found],
        fmt="o-",
        color=COLOURS["uls"],
        capsize=3,
    )
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_ylabel("ELS − ULS (nats)")
    finish(axes, legend=False)


def _places(*panels: Axes, values: Iterable[float]) -> None:
    values = list(values)
    for axes in panels:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
