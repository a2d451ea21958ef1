"""A disk that is full from some write on, below one folder: it opens, writes, forces, renames and makes nothing."""

import builtins
import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SAVES = (
    "server.checkpoint.save_file",
    "fedsim.release.log.save_file",
    "fedsim.models.export.save_file",
    "transformers.modeling_utils.safe_save_file",
)
"""Where files are written by code that is not Python's."""


class FullDisk:
    """Counts writes below a folder, and refuses them from one of them on.

    Args:
        folder: Where.
        first: The first write that is refused, from 0.
        last: The last one.
    """

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self.folder, self.first, self.last = os.path.abspath(folder), first, last
        self.writes = 0
        self._lock = threading.Lock()

    @property
    def refused(self) -> bool:
        """Whether any write was."""
        return self.writes > self.first

    def write(self, path: Any, refusal: Callable[[str], Exception] | None = None) -> None:
        """A write is about to happen: refused, if the disk is full by then."""
        name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.path.abspath(os.fspath(path))
        if not (name + "/").startswith(self.folder + "/"):
            return
        with self._lock:
            number, self.writes = self.writes, self.writes + 1
        if self.first <= number <= self.last:
            said = os.strerror(errno.ENOSPC)
            raise OSError(errno.ENOSPC, said, name) if refusal is None else refusal(f"I/O error: {said} (os error 28)")


class _File:
    """A file opened for writing, whose first write may be refused when it is open already."""

    def __init__(self, file: Any, disk: FullDisk, path: Any) -> None:
        self._file, self._disk, self._path, self._written = file, disk, path, False

    def write(self, content: Any) -> Any:
        if not self._written:
            self._written = True
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            self._disk.write(self._path)
            return self._file.write(content[len(content) // 2 :])
        return self._file.write(content)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()


@contextmanager
def full_disk(folder: Path, first: int, last: int = 10**9) -> Iterator[FullDisk]:
    """Within it the disk is full below a folder, from one write on to another."""
    disk = FullDisk(folder, first, last)
    with pytest.MonkeyPatch.context() as patched:
        plain_open, plain_os_open, plain_write = builtins.open, os.open, os.write

        def open_file(path: Any, mode: str = "r", *rest: Any, **further: Any) -> Any:
            if isinstance(path, int) or not set(mode) & set("wax+"):
                return plain_open(path, mode, *rest, **further)
            disk.write(path)
            return _File(plain_open(path, mode, *rest, **further), disk, path)

        def os_open(path: Any, flags: int, *rest: Any, **further: Any) -> int:
            if flags & WRITES:
                disk.write(path)
            return plain_os_open(path, flags, *rest, **further)

        def write(descriptor: int, content: bytes) -> int:
            try:
                disk.write(descriptor)
            except OSError:
                plain_write(descriptor, content[: len(content) // 2])
                raise
            return plain_write(descriptor, content)

        def before(call: Callable[..., Any]) -> Callable[..., Any]:
            def checked(path: Any, *rest: Any, **further: Any) -> Any:
                disk.write(path)
                return call(path, *rest, **further)

            return checked

        def saved(call: Callable[..., Any]) -> Callable[..., Any]:
            def checked(arrays: Any, path: Any, *rest: Any, **further: Any) -> Any:
                disk.write(path, SafetensorError)
                return call(arrays, path, *rest, **further)

            return checked

        for module in (builtins, io):
            patched.setattr(module, "open", open_file)
        patched.setattr(os, "open", os_open)
        patched.setattr(os, "write", write)
        patched.setattr(os, "fsync", disk.write)  # what no machine loses in a test need not be forced
        for name in ("mkdir", "rename", "replace"):
            patched.setattr(os, name, before(getattr(os, name)))
        for name in SAVES:
            module, _, attribute = name.rpartition(".")
            patched.setattr(name, saved(getattr(__import__(module, fromlist=["_"]), attribute)))
        yield disk
