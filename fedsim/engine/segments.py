"""Shared memory that a process keeps for the whole run, for others on the same machine to read and write.

An object store hands out pages that nobody has touched before, or that another process must map anew: page faults then
cost several times the copy. Here the same pages serve round after round, mapped once on either side. A segment has no
name in any folder (Linux's memfd), so that nothing is left behind by a crash and no limit of /dev/shm applies; others
find it as a file that the owner has open.
"""

import mmap
import os
import secrets
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

HEADER_BYTES = 4096
"""Before the values: a token by which one who maps a segment knows that it is the one that is meant."""
TOKEN_BYTES = 16


@dataclass(frozen=True)
class Place:
    """Where a segment is, for other processes.

    Attributes:
        path: Of the file that its owner has open.
        token: What its header says.
        size: Bytes of the file.
    """

    path: str
    token: bytes
    size: int


class _Segment:
    """One segment, mapped here."""

    def __init__(self, nbytes: int) -> None:
        self.capacity, self.fd = nbytes, -1
        self.fd = os.memfd_create("fedsim")
        size = HEADER_BYTES + nbytes
        os.ftruncate(self.fd, size)
        self.memory = mmap.mmap(self.fd, size)
        token = secrets.token_bytes(TOKEN_BYTES)
        self.memory[:TOKEN_BYTES] = token
        self.place = Place(f"/proc/{os.getpid()}/fd/{self.fd}", token, size)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)  # arrays over it live on: they hold the mapping


class Segments:
    """This process's segments. One is lent as an array, and free again once that and all views of it are gone."""

    def __init__(self) -> None:
        self._free: list[_Segment] = []
        self._retired: set[bytes] = set()
        self._closed = False

    @staticmethod
    def possible() -> bool:
        """Whether this system has them, and lets this process have one."""
        if not (hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")):
            return False
        try:
            _Segment(1)
        except OSError:  # refused by a sandbox or by vm.memfd_noexec
            return False
        return True

    def lend(self, shape: tuple[int, ...], dtype: Any) -> "tuple[np.ndarray, Place]":
        """An array of arbitrary values in a segment of its own, and where others find that.

        Raises:
            OSError: The system has no descriptor or no memory for a new one.
        """
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        fitting = [segment for segment in self._free if nbytes <= segment.capacity <= 2 * nbytes + HEADER_BYTES]
        segment = min(fitting, key=lambda one: one.capacity) if fitting else _Segment(nbytes)
        if fitting:
            self._free.remove(segment)
        lent = np.frombuffer(segment.memory, dtype, int(np.prod(shape)), offset=HEADER_BYTES).reshape(shape)
        # A view's base is the array that frombuffer made, so that one lives as long as any of its views.
        weakref.finalize(lent.base if isinstance(lent.base, np.ndarray) else lent, self._take_back, segment)
        return lent, segment.place

    def retire(self, place: Place) -> None:
        """Never lend a segment again: somebody may write to it, nobody knows when."""
        self._retired.add(place.token)

    def _take_back(self, segment: _Segment) -> None:
        if segment.place.token not in self._retired and not self._closed:
            self._free.append(segment)

    def clear(self) -> None:
        """Let go of those that are free; others follow when their arrays do."""
        self._free, self._closed = [], True


class Mapped:
    """Other processes' segments, mapped here once each."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[bytes, mmap.mmap]] = {}

    def values(self, place: Place, shape: tuple[int, ...], dtype: str, *, write: bool = False) -> np.ndarray:
        """An array over a segment's first values; read-only unless it is to be written to.

        Raises:
            OSError, ValueError: The segment is out of reach: on another machine, in another container, or gone.
        """
        token, memory = self._known.get(place.path, (b"", None))
        if memory is None or token != place.token:
            file = os.open(place.path, os.O_RDWR)
            try:
                memory = mmap.mmap(file, place.size)
            finally:
                os.close(file)
            if memory[:TOKEN_BYTES] != place.token:
                raise ValueError("another process's file")
            self._known[place.path] = place.token, memory
        values = np.frombuffer(memory, dtype, int(np.prod(shape)), offset=HEADER_BYTES).reshape(shape)
        values.flags.writeable = write
        return values


@dataclass(frozen=True)
class SharedVector:
    """A vector in a segment, as a message names it.

    Attributes:
        place: Where it is.
        dtype, shape: Of the vector.
        lent: The owner's array, which keeps the segment from being lent again; none where it was received.
    """

    place: Place
    dtype: str
    shape: tuple[int, ...]
    lent: np.ndarray | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedVector, (self.place, self.dtype, self.shape)
