"""Progress of building a store, shown on the terminal."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def shown() -> Iterator:
    """A `fedsim.data.sources.Progress` that draws bars on standard error; plain lines where it is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    text = TextColumn("{task.description}")
    with Progress(text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: float, total: float | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


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
        print(f"{what}{share}", file=sys.stderr, flush=True)
