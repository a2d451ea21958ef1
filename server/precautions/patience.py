"""Writing again what the disk refused: somebody may be making room."""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fedsim.disk import os_error
from fedsim.errors import Failure, InvalidInput
from fedsim.terminal import say

Result = TypeVar("Result")


class Refused(Failure):
    """The disk refused a write that cannot wait: the run ends there, and can go on.

    Attributes:
        path: What was written.
        reason: What the operating system said.
        folder: The run's folder.
    """

    def __init__(self, path: str, reason: str, folder: str) -> None:
        self.path, self.reason, self.folder = path, reason, folder
        super().__init__(
            f"{path} cannot be written ({reason}). What is charged stays charged, and nothing else was released. Make "
            f"room, then go on with --resume {folder}; where that finds no run, give the same command again"
        )

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.path, self.reason, self.folder)


@contextmanager
def refusals_told(folder: Path) -> Iterator[None]:
    """Within it, a refusal of the disk that nobody else answers is told in a sentence.

    Raises:
        Refused: There was one.
    """
    try:
        yield
    except (Failure, InvalidInput):
        raise
    except Exception as error:
        said = os_error(error)
        if said is None or said.errno not in MAY_PASS:
            raise
        raise Refused(str(said.filename or "a file of the run"), said.strerror or str(said), str(folder)) from error


PAUSES = (2.0, 10.0, 30.0, 60.0, 120.0)
"""Seconds between attempts: long enough for a person or a clean-up to make room, short beside a run."""
MAY_PASS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE}
LOOK = 0.2
"""Seconds between two looks at whether to give up."""


def patiently(what: str, write: Callable[[], Result], give_up: Callable[[], bool] = lambda: False) -> Result:
    """What write() returns, tried again for some minutes where the disk refuses.

    Args:
        what: What is written, for people.
        write: Writes it, whole or not at all.
        give_up: Whether to stop waiting.

    Raises:
        Exception: What write() raised last; at once where time does not help.
    """
    for pause in PAUSES:
        try:
            return write()
        except Exception as error:
            said = os_error(error)
            if said is None or said.errno not in MAY_PASS or give_up():
                raise
            say(f"{what} cannot be written ({said.strerror}): make room; trying again in {pause:g} s")
        until = time.monotonic() + pause
        while time.monotonic() < until and not give_up():
            time.sleep(min(LOOK, pause))
    return write()
