"""The study in words: tables and figures, between two marks of a page."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.marked import replace_between_marks
from benchmarks.regime.figures import draw
from benchmarks.regime.outcomes import Lead, Results, Setting, at_25_rounds, by_diversity, growth, leads
from benchmarks.regime.rates import Rates
from benchmarks.regime.scores import Score
from experiments.report.markdown import table
from experiments.sweep.points import ARM_TITLES

BEGIN, END = "<!-- the regime -->", "<!-- the end of the regime -->"
"""Between these lines of a page stands what the study wrote."""
LEADS = ("corpus", "ε", "B", "T", "ULS", "G", "ELS", "G", "ELS − ULS", "ahead")
SETTINGS = ("corpus", "ε", "B", "T", "", "G", "bands", "learning rate", "σ", "test loss", "± 95 %", "seeds")
SCORES = (
    *("corpus", "ε", "gradients in all", "settings", "rank correlation", "ranked first", "did best"),
    *("regret, nats", "of a random choice"),
)
GROWTHS = ("question", "from", "to", "lead grows by", "answer")


def write_page(output: Path, results: Results, rates: Rates, scores: Sequence[Score], page: Path | None) -> None:
    """Write regime.md and the figures into the study's folder and, where a page is named, its part of that: all but
    the table of every setting, which fills pages.

    Args:
        output: The study's folder.
        results: What is finished.
        rates: The learning rates.
        scores: Of the planner as a predictor.
        page: A page that has BEGIN and END, each on a line; figures go to the folder figures beside it.
    """
    text = "\n\n".join(sections(results, rates, scores))
    every = "Every setting:\n\n" + table(SETTINGS, [_setting_row(one) for one in results.settings])
    (output / "regime.md").write_text(f"{text}\n\n{every}\n", encoding="utf-8")
    draw(results, output / "figures")
    if page is not None:
        replace_between_marks(page, BEGIN, END, text)
        draw(results, page.parent / "figures")
    print(f"{_duration(results)}: {output / 'regime.md'}")


def sections(results: Results, rates: Rates, scores: Sequence[Score]) -> Iterator[str]:
    """What the page gets: a sentence on all points, and the tables."""
    days = " to ".join(dict.fromkeys((results.dates[0], results.dates[-1])))
    of = ", ".join(results.versions)
    yield f"{_duration(results)}; {days}; {of}."
    yield "Learning rates, chosen on public users:\n\n" + table(("B", "T", "ε", "learning rate"), list(rates.rows()))
    yield "The best setting of each algorithm, independent noise:\n\n" + table(
        LEADS, [_lead_row(one) for one in _all_leads(results)]
    )
    yield "Whether the lead grows:\n\n" + table(GROWTHS, list(_growth_rows(results)))
    if scores:
        yield "What the planner ranked first, by effective rounds:\n\n" + table(
            SCORES, [_score_row(one) for one in scores]
        )


def _duration(results: Results) -> str:
    said = f"{results.took} added up, pilots among them, and a sweep runs one on each core"
    return said + (f"; {results.longer} more in longer studies and their pilots" if results.longer.points else "")


def _all_leads(results: Results) -> Iterator[Lead]:
    for corpus in results.pretrained:
        yield from leads(results, corpus=corpus)


def _lead_row(one: Lead) -> list[str]:
    uls, els = one.uls, one.els
    return [
        *(uls.corpus, f"{uls.epsilon:g}", f"{uls.place.gradients:,}", str(uls.place.rounds)),
        *(_loss(uls), str(uls.group_size), _loss(els), str(els.group_size)),
        f"{one.nats:+.3f}" + ("" if one.half is None else f" ± {one.half:.3f}"),
        one.decided,
    ]


def _growth_rows(results: Results) -> Iterator[list[str]]:
    by_epsilon = leads(results, study="shakespeare-epsilon")
    if len(by_epsilon) > 1:
        yield _growth("stronger privacy", by_epsilon[-1], by_epsilon[0], lambda one: f"ε = {one.epsilon:g}")
    by_compute = at_25_rounds(results)
    if len(by_compute) > 1:
        yield _growth("more compute", by_compute[0], by_compute[-1], lambda one: f"B = {one.place.gradients:,}")
    for text in ("shakespeare", "synthetic"):
        by_kind = by_diversity(results, text)
        if len(by_kind) > 1:
            yield _growth("more diverse users", by_kind[0], by_kind[-1], lambda one: one.corpus)


def _growth(question: str, first: Lead, second: Lead, place: Callable[[Setting], str]) -> list[str]:
    nats, half = growth(first, second)
    answer = "undecided" if half is None or abs(nats) <= half else ("yes" if nats > 0 else "it shrinks")
    return [
        question,
        place(first.uls),
        place(second.uls),
        f"{nats:+.3f}" + ("" if half is None else f" ± {half:.3f}"),
        answer,
    ]


def _score_row(one: Score) -> list[str]:
    first = one.settings[0]
    return [
        *(first.corpus, f"{first.epsilon:g}"),
        *(f"{first.place.gradients * first.place.rounds:,}", str(len(one.settings)), f"{one.rank:+.2f}"),
        *(" or ".join(map(_named, one.first)), _named(one.best), f"{one.regret:.3f}", f"{one.chance:.3f}"),
    ]


def _named(one: Setting) -> str:
    bands = "" if one.bands == "1" else f", bands {one.bands}"
    return f"{ARM_TITLES[one.arm]} G = {one.group_size}, {one.place.gradients:,} × {one.place.rounds}{bands}"


def _setting_row(one: Setting) -> Sequence[str]:
    return [
        *(one.corpus, f"{one.epsilon:g}"),
        *(f"{one.place.gradients:,}", str(one.place.rounds), ARM_TITLES[one.arm], str(one.group_size), one.bands),
        *(f"{one.rate:g}", f"{one.noise_multiplier:.3f}", f"{one.loss:.4f}"),
        *("–" if one.half is None else f"{one.half:.4f}", str(len(one.losses))),
    ]


def _loss(one: Setting) -> str:
    return f"{one.loss:.3f}" + ("" if one.half is None else f" ± {one.half:.3f}")
