"""Signals that come where no round is under way: answered as Ctrl-C is, so that workers end and people are told."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Terminated(KeyboardInterrupt):
    """A signal asked the program to end, and nobody inside answered it in another way.

    Attributes:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


@contextmanager
def ending_by_signals() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise Terminated; those that are ignored stay so (nohup)."""

    def end(number: int, frame: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)  # it ends already; a second one must not tear what it cleans up
        asked.append(number)
        raise Terminated(number)

    before: dict[int, object] = {}
    asked: list[int] = []
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, end)
    try:
        yield
    except KeyboardInterrupt as ended:
        if asked and not isinstance(ended, Terminated):  # Ray, where it waits, makes one of its own
            raise Terminated(asked[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
