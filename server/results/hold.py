"""A run's folder, held by one process at a time: who comes second is told so before anything is written."""

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from fedsim.errors import InvalidInput

NAME = "run.lock"
LOOK_SECONDS = 0.001
"""What one that takes waits while another only looks, which is over at once."""


class Hold:
    """A lock on a folder, there while a process works in it. It ends with the process, however that ends, and where
    this is used as a context, with that.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.let_go()

    def take(self, field: str) -> None:
        """Hold the folder, which is made where it is not there; nothing happens where this holds it already.

        Args:
            field: What the person named it by.

        Raises:
            InvalidInput: Another holds it.
        """
        while self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # whoever held it has just removed the folder
                continue
            if not _locked(descriptor, fcntl.LOCK_EX):
                held = not _locked(descriptor, fcntl.LOCK_SH)  # beside one that looks there is room for another look
                os.close(descriptor)
                if held:
                    raise self._held(field)
                time.sleep(LOOK_SECONDS)
            elif _is(descriptor, self.path):
                self._descriptor = descriptor
            else:  # it was let go of, and removed, between the two
                os.close(descriptor)

    def require_free(self, field: str) -> None:
        """Refuse a folder that another holds; nothing is made, and others that look are not in the way of each other.

        Raises:
            InvalidInput: Another holds it.
        """
        if self._descriptor is not None:
            return
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError:
            return
        try:
            if not _locked(descriptor, fcntl.LOCK_SH):
                raise self._held(field)
        finally:
            os.close(descriptor)

    def let_go(self) -> None:
        """Hold it no longer, and leave no lock in it."""
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _held(self, field: str) -> InvalidInput:
        hint = "Wait for that process to end, or name another folder."
        return InvalidInput(field, str(self.path.parent), "a folder in which no other process is at work", hint)


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
