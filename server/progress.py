"""How a run looks on the terminal: a bar where someone watches, plain lines where not."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what takes a moment: a spinner where someone watches, one line where not."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        print(what, file=sys.stderr, flush=True)
        yield


class RoundProgress:
    """Shows round, held-out loss, ε spent and time left.

    Args:
        title: What is running ("ULS").
        rounds: Rounds of the whole run.
    """

    def __init__(self, title: str, rounds: int) -> None:
        self._title = title
        self._rounds = rounds
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(title, total=rounds, note="")
        self._loss = float("nan")

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
        if not self._bar:
            print(
                f"{self._title} round {round}/{self._rounds}: held-out loss {loss:.4f}, "
                f"accuracy {accuracy:.4f}, ε spent {epsilon:.3f}",
                file=sys.stderr,
                flush=True,
            )

    def advanced(self, round: int, epsilon: float) -> None:
        """Another round is done."""
        if self._bar:
            note = f"loss {self._loss:.3f}  ε {epsilon:.2f}"
            self._bar.update(self._task, completed=round, note=note)

    def stopped(self, round: int, limit: float) -> None:
        """The budget is spent before the planned rounds are done."""
        self._console.print(
            f"{self._title} stopped after {round} of {self._rounds} rounds: another would exceed ε = {limit:g}.",
            highlight=False,
        )
