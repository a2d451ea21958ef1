"""Asking a run to stop: after the round under way, not within it."""

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run was asked to stop, and its state is in a checkpoint, unless the disk refused that.

    Attributes:
        signal: The signal's number.
        round: Rounds done.
        folder: The run's folder.
        lost: Whether the state is in no checkpoint.
    """

    def __init__(self, number: int, round: int, folder: str, lost: bool = False) -> None:
        self.signal, self.round, self.folder, self.lost = number, round, folder, lost
        kept = ", whose state could not be written: rounds since the last checkpoint run again" if lost else ""
        super().__init__(
            f"stopped by {signal.Signals(number).name} after round {round}{kept}; go on with --resume {folder}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.signal, self.round, self.folder, self.lost)

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that ended by this signal."""
        return 128 + self.signal


class StopRequest:
    """Within it, SIGTERM and Ctrl-C ask to stop after the round instead of killing; a second one kills.

    Outside the main thread (Flower's own engine) signals are left alone.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        log.warning("stopping after this round; once more stops at once")

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
