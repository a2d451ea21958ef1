"""The house's one voice on the terminal: what takes time, and what somebody should know, on standard error.

Bars where someone watches, plain lines where not. Everything goes through one console, which keeps a warning from
tearing a bar that is being drawn. Nothing else in fedsim prints: the rest logs, and `speak` makes that heard.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

CONSOLE = Console(stderr=True, force_jupyter=False)
SPEAKERS = ("fedsim", "server", "clients", "experiments")
"""Loggers that are heard; what other libraries log is theirs to show."""
SECONDS_BETWEEN_LINES = 10.0

Report = Callable[[str, float, float | None], None]
"""Told (what is being done, how much is done, how much there is); see `fedsim.data.sources.Progress`."""


def say(sentence: str) -> None:
    """Print one line, above a bar if one is being drawn."""
    CONSOLE.print(sentence, markup=False, highlight=False, soft_wrap=True)


class _Voice(logging.Handler):
    """Says what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(f"{record.levelname.lower()}: {self.format(record)}")
        except Exception:  # As every handler: what cannot be said must not stop what is being done.
            self.handleError(record)


VOICE = _Voice(logging.WARNING)


def speak() -> None:
    """Print what this house's own modules log, warnings and above, as `warning: …`. For programs, not for libraries.

    May be called again: a warning is said once all the same.
    """
    for name in SPEAKERS:
        logging.getLogger(name).addHandler(VOICE)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what takes a moment: a spinner where someone watches, one line where not."""
    if CONSOLE.is_terminal:
        with CONSOLE.status(what):
            yield
    else:
        say(what)
        yield


@contextmanager
def shown(wanted: bool = True) -> Iterator[Report]:
    """Draws a bar for each thing it is told of; plain lines where nobody watches, nothing where it is not wanted."""
    if not wanted:
        yield _unheard
        return
    if not CONSOLE.is_terminal:
        yield _Lines()
        return
    text = TextColumn("{task.description}", markup=False)
    with Progress(text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=CONSOLE) as bars:
        tasks = {}

        def report(what: str, done: float, total: float | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def _unheard(what: str, done: float, total: float | None) -> None:
    """A report that nobody reads."""


class _Lines:
    """One line when something begins, one when it ends, and one every ten seconds between."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def __call__(self, what: str, done: float, total: float | None) -> None:
        now = time.monotonic()
        finished = total is not None and done >= total
        if what in self._last and not finished and now < self._last[what] + SECONDS_BETWEEN_LINES:
            return
        if finished and self._last.get(what) == float("inf"):
            return
        self._last[what] = float("inf") if finished else now
        share = f" {done / total:.0%}" if total else ""
        say(f"{what}{share}")


class RoundProgress:
    """Shows round, held-out loss, ε spent and time left: a bar at the foot of the terminal, below a line for each
    evaluation, or the lines alone where nobody watches.

    Args:
        title: What is running ("ULS").
        rounds: Rounds of the whole run.
        loss: The held-out loss that is known already; None where there is none yet.
    """

    def __init__(self, title: str, rounds: int, loss: float | None = None) -> None:
        self._title = title
        self._rounds = rounds
        self._bar: Progress | None = None
        if CONSOLE.is_terminal:
            # The bar takes what the words leave, in a window of any width; words are never cut before it is gone.
            self._bar = Progress(
                TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=3)),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)),
                TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
                console=CONSOLE,
                expand=True,
            )
            self._task = self._bar.add_task(title, total=rounds, note=_known(loss))
        self._loss = loss

    def __enter__(self) -> "RoundProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def evaluated(self, round: int, loss: float, accuracy: float, epsilon: float) -> None:
        """A new held-out loss is known."""
        self._loss = loss
        say(
            f"{self._title} round {round}/{self._rounds}: held-out loss {loss:.4f}, "
            f"accuracy {accuracy:.4f}, ε spent {epsilon:.3f}"
        )
        self.advanced(round, epsilon)

    def changed(self, round: int, change: float, std: float, epsilon: float) -> None:
        """How the held-out loss changed is known, with noise of this standard deviation."""
        say(
            f"{self._title} round {round}/{self._rounds}: held-out loss {change:+.4f} since before training "
            f"(with noise of standard deviation {std:.4f}), ε spent {epsilon:.3f}"
        )
        self.advanced(round, epsilon)

    def advanced(self, round: int, epsilon: float) -> None:
        """Another round is done."""
        if self._bar:
            self._bar.update(self._task, completed=round, note=f"{_known(self._loss)}ε {epsilon:.2f}")

    def stopped(self, round: int, limit: float) -> None:
        """The budget is spent before the planned rounds are done."""
        say(f"{self._title} stopped after {round} of {self._rounds} rounds: another would exceed ε = {limit:g}.")


def _known(loss: float | None) -> str:
    """A loss as bars show it."""
    return "" if loss is None else f"loss {loss:.3f} "
