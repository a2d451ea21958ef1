"""Lines of JSON that a cell writes as soon as it knows something, and what earlier lines tell of it."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]
FINISHED, IN_PART, OUT_OF_TIME, SKIPPED, FAILED = "finished", "in part", "out of time", "skipped", "failed"
"""How a cell ends: all was done; what was asked of it was; its share of the time was over; something it needs is not
there; an error."""


class Absent(Exception):
    """Something that is not on this machine."""


class Findings:
    """Where a cell's findings go: standard output, a line each.

    Args:
        cell: Its name, which every line has.
        device: What it runs on, in words.
        seconds: After so many it begins nothing more.
        known: Lines of an earlier run, of which this one goes on.
    """

    def __init__(self, cell: str, device: str, seconds: float, known: Iterable[Line] = ()) -> None:
        self.cell, self.device = cell, device
        self.cut = False
        self._end = time.monotonic() + seconds
        self._complete = set(_complete(cell, device, known))

    def say(self, **line: object) -> None:
        """One finding."""
        print(json.dumps({"cell": self.cell} | line), flush=True)

    def time_is_over(self) -> bool:
        """Whether nothing more is to be begun; from then on the cell counts as cut."""
        self.cut = self.cut or time.monotonic() >= self._end
        return self.cut

    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._end - time.monotonic())

    def complete(self, part: str) -> None:
        """A part of the cell is done, and needn't be done again."""
        if not self.cut:
            self.say(complete=part)

    def is_complete(self, part: str) -> bool:
        """Whether an earlier run did this part on a device of this name."""
        return part in self._complete


def _complete(cell: str, device: str, known: Iterable[Line]) -> Iterable[str]:
    here = False
    for line in known:
        if line.get("cell") == cell:
            here = line.get("device", device) == device if "started" in line else here
            if here and "complete" in line:
                yield line["complete"]


def read_lines(path: Path) -> list[Line]:
    """The lines of a file; one that was cut off in the middle is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def endings(lines: Iterable[Line]) -> dict[str, Line]:
    """The last ending of each cell that began."""
    return {line["cell"]: line for line in lines if "ended" in line}


def in_a_line(error: BaseException) -> str:
    """What went wrong."""
    text = str(error).strip()
    if isinstance(error, Absent):
        return text
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
