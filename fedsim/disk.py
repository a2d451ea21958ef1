"""File systems: how much room they have, and what they said when something could not be written."""

import errno
import os
import re
import tempfile
from pathlib import Path

from fedsim.errors import InvalidInput


def os_error(error: BaseException) -> OSError | None:
    """The operating system's refusal behind an exception; None where it is about something else.

    What is written in Rust (safetensors, tokenizers) passes the refusal on in words alone: "… (os error 28)".
    """
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def free_bytes(path: Path) -> int:
    """Bytes that may still be written where a path is, or is to be."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    status = os.statvfs(there)
    return status.f_bavail * status.f_frsize


def require_writable(folder: Path, field: str = "output") -> None:
    """Refuse a folder that could not be written, or not be made, and leave nothing behind that tells of the question.

    Args:
        folder: It need not be there, nor need the folders that it is in.
        field: What the person named it by.

    Raises:
        InvalidInput: It is a file, or in one, or the operating system refuses a file where it is to be.
    """
    if (reason := _refusal(folder)) is not None:
        raise InvalidInput(field, str(folder), "a folder that can be written", f"{reason}.")


def require_writable_file(file: Path, field: str = "output") -> None:
    """The same of a file whose folder is, or will be made, beside it; one that is there is written over.

    Raises:
        InvalidInput: It is a folder, or cannot be written where it is to be.
    """
    reason = "There is a folder of that name" if file.is_dir() else _refusal(file.parent)
    if reason is not None:
        raise InvalidInput(field, str(file), "a file that can be written", f"{reason}.")


def _refusal(folder: Path) -> str | None:
    try:
        place, missing = folder.absolute(), []
        while not os.path.lexists(place):
            missing.append(place.name)
            place = place.parent
        if not place.is_dir():
            return f"There is a file, {place}"
        longest = os.pathconf(place, "PC_NAME_MAX")
        if any(len(os.fsencode(name)) > longest for name in missing):
            return os.strerror(errno.ENAMETOOLONG)
        if "\0" in str(folder):
            return "No name has a character of value 0"
        with tempfile.TemporaryFile(dir=place):  # without a name, where the file system can: gone however this ends
            return None
    except OSError as error:
        return error.strerror or str(error)


def gigabytes(size: int) -> str:
    """A number of bytes for people: "1.3 GB", "20.1 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def force(folder: Path) -> None:
    """Force a folder and everything in it to disk."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
