"""File systems: how much room they have, and what they said when something could not be written."""

import os
import re
from pathlib import Path


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
