"""Where a run's time goes: seconds by phase, on a clock that never goes back.

How long a phase takes depends on which units a round drew and how many tokens they own, and no noise hides that: these
seconds are as private as a training loss, and are kept, shown and left out where that is.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

LOAD, COMPUTE, TRANSPORT = "load", "compute", "transport"
"""Rows from the store; clipped gradients; parameters out, sums back, checked, added up, and waits for the slowest."""
NOISE, OPTIMIZER = "noise", "optimizer"
"""The noised mean and what the mechanism learns from it; the step, the average of the weights, and their check."""
SAMPLING, CHARGE = "sampling", "charge"
CHECKPOINT, EVALUATION = "checkpoint", "evaluation"
OTHER = "other"
PHASES = (LOAD, COMPUTE, TRANSPORT, NOISE, OPTIMIZER, SAMPLING, CHARGE, CHECKPOINT, EVALUATION, OTHER)
"""In the order in which they are told."""
WORKER_SECONDS = {LOAD: "load_seconds", COMPUTE: "compute_seconds"}
"""Of each phase that workers measure: what a reply calls its seconds."""
SMALLEST_SHARE = 0.005
"""Phases below it are not worth a word."""


@dataclass
class _Open:
    """A phase that has not ended: when it began, and the seconds that phases within it took."""

    phase: str
    began: float
    within: float = 0.0


class Phases:
    """Seconds by phase of one thread, and of work that other threads do beside it.

    Phases nest; the seconds of an inner one are not the outer one's. So all together are the wall-clock seconds of the
    outermost, which is OTHER where everything else that is measured lies within it.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: list[_Open] = []
        self._beside = 0.0

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Within it, time is of this phase, errors or not."""
        self._open.append(_Open(phase, time.monotonic()))
        try:
            yield
        finally:
            ended = self._open.pop()
            took = time.monotonic() - ended.began
            self._add(phase, took - ended.within)
            if self._open:
                self._open[-1].within += took

    def divide(self, phase: str, seconds: float, parts: Mapping[str, float]) -> None:
        """Part of a phase was others, which were measured elsewhere, such as in other processes.

        Args:
            phase: The phase, ended.
            seconds: How many of its seconds are to be divided.
            parts: Seconds of each other phase in them; shortened alike where they are more than there were.
        """
        whole = sum(parts.values())
        share = min(1.0, seconds / whole) if whole > 0 else 0.0
        for part, measured in parts.items():
            self._add(part, measured * share)
        self._add(phase, -whole * share)

    def beside(self, seconds: float) -> None:
        """Noise was drawn for so many seconds in a thread of its own, while workers computed."""
        self._beside += seconds

    def so_far(self) -> "Times":
        """What is known now, phases that have not ended included."""
        seconds, now = dict(self._seconds), time.monotonic()
        inner = now
        for entry in reversed(self._open):  # the innermost first: up to its beginning, time is of the one around it
            seconds[entry.phase] = seconds.get(entry.phase, 0.0) + inner - entry.began - entry.within
            inner = entry.began
        return Times(seconds={phase: seconds[phase] for phase in PHASES if phase in seconds}, beside=self._beside)

    def load(self, times: "Times") -> None:
        """Go on from these times, of a run that was interrupted."""
        self._seconds, self._beside = dict(times.seconds), times.beside

    def _add(self, phase: str, seconds: float) -> None:
        if phase not in PHASES:
            raise ValueError(f"{phase} is no phase; there are {', '.join(PHASES)}")
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of some rounds.

    Attributes:
        seconds: By phase, in the order of PHASES; together the wall-clock seconds.
        beside: Seconds for which noise was drawn in the background; no part of the others.
        rounds: How many rounds they are of.
    """

    seconds: Mapping[str, float]
    beside: float = 0.0
    rounds: int = 0

    @property
    def whole(self) -> float:
        """Wall-clock seconds."""
        return sum(self.seconds.values())

    def of_rounds(self, rounds: int) -> "Times":
        """The same, of so many rounds."""
        return replace(self, rounds=rounds)

    def since(self, before: "Times") -> "Times":
        """What was added to earlier times."""
        seconds = {phase: value - before.seconds.get(phase, 0.0) for phase, value in self.seconds.items()}
        return Times(seconds=seconds, beside=self.beside - before.beside, rounds=self.rounds - before.rounds)

    def added(self, other: "Times") -> "Times":
        """Both together."""
        phases = [phase for phase in PHASES if phase in self.seconds or phase in other.seconds]
        seconds = {phase: self.seconds.get(phase, 0.0) + other.seconds.get(phase, 0.0) for phase in phases}
        return Times(seconds=seconds, beside=self.beside + other.beside, rounds=self.rounds + other.rounds)

    def in_words(self) -> str:
        """What a round took, the longest phases first: "A round took 1.2 s: compute 88 %, noise 4 %."

        Evaluations, which not every round has, are told apart from it.
        """
        own = {phase: seconds for phase, seconds in self.seconds.items() if phase != EVALUATION}
        whole = sum(own.values())
        if not self.rounds or not whole > 0:
            return "No round was run."
        shares = sorted(((seconds / whole, phase) for phase, seconds in own.items()), reverse=True)
        told = ", ".join(f"{phase} {100 * share:.0f} %" for share, phase in shares if share >= SMALLEST_SHARE)
        words = f"A round took {_seconds(whole / self.rounds)}: {told}"
        if self.beside:
            words += f"; beside it noise was drawn for {_seconds(self.beside / self.rounds)}"
        if evaluation := self.seconds.get(EVALUATION, 0.0):
            words += f"; evaluations took {_seconds(evaluation)} in all"
        return words + "."

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return {"rounds": self.rounds, "seconds": dict(self.seconds), "noise_beside": self.beside}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "Times":
        """What to_json wrote."""
        seconds = {str(phase): float(value) for phase, value in dict(values["seconds"]).items()}  # type: ignore[call-overload]
        return cls(seconds=seconds, beside=float(values["noise_beside"]), rounds=int(values["rounds"]))  # type: ignore[call-overload,arg-type]


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
