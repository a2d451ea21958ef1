"""The ledger: what was released, written down before it is released.

One line of JSON a charge, appended and forced to disk before the charge returns. A crash can therefore leave a charge
whose release never happened (over-counting), never a release without a charge. Each line carries a checksum over
itself and the one before, so that a changed, missing or moved line is found when read; it does not stop a forger.
"""

import fcntl
import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from fedsim.errors import Failure, InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.bounds import Bounds
from fedsim.privacy.events import Adjacency, Composed, Event, from_json, to_json
from fedsim.privacy.merged import merged as merged
from fedsim.registry import NotImported
from fedsim.validation import require_at_least

MODEL_UPDATE = "release"
NOTHING = Composed(events=())
"""What a note releases."""
VERSION = 1
HEADER = json.dumps({"format": "fedsim-ledger", "version": VERSION}).encode() + b"\n"


class LedgerDamaged(Failure):
    """A ledger that cannot be trusted: it may lack charges, so nothing may be claimed from it.

    Attributes:
        path: The file.
        line: The first damaged line, from 1.
    """

    def __init__(self, path: Path | str, line: int, reason: str) -> None:
        self.path = Path(path)
        self.line = line
        self.reason = reason
        super().__init__(f"{path}, line {line}: {reason}. Restore the ledger from a copy; do not edit it.")

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.path, self.line, self.reason)


class TornLine(UserWarning):
    """The last line of a ledger was cut off while it was written, and has been dropped."""


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One charge.

    Attributes:
        round: The round or step it belongs to, from 0; a resumed run may charge a round twice.
        purpose: What the release was for (MODEL_UPDATE), or what is noted at no charge.
        event: What was released.
        note: What else belongs to it.
    """

    round: int
    purpose: str
    event: Event
    note: str = ""


class Ledger:
    """An append-only file of charges with one writer. Made by Ledger.open; a context manager that closes it."""

    def __init__(self, path: Path, descriptor: int, entries: list[LedgerEntry], checksum: str) -> None:
        self._path = path
        self._descriptor: int | None = descriptor
        self._entries = tuple(entries)
        self._checksum = checksum

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Replay a ledger and hold it for writing, or begin a new one where there is none.

        A last line without its line break was cut off by a crash: a complete one is kept and counts, a part of one is
        dropped with a TornLine warning (its charge never returned, so its release never left).

        Args:
            path: The file; missing folders are made.

        Raises:
            InvalidInput: When another ledger object, here or in another process, holds the file, or a release in it
                is of a kind whose module was not imported.
            LedgerDamaged: When any other line is not what was written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _lock(descriptor, path)
            data = path.read_bytes()
            entries, checksum, end = _replay(path, data)
            if data[end:]:
                checksum = _recover(path, descriptor, data[end:], entries, checksum, end)
            if not data.startswith(HEADER):
                _append(descriptor, HEADER)
            _sync_folder(path.parent)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, entries, checksum)

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """All charges, in the order in which they were made."""
        return self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def charge(self, event: Event, *, round: int, purpose: str = MODEL_UPDATE, note: str = "") -> LedgerEntry:
        """Write down a release that is about to happen. The release may leave once this has returned.

        Args:
            event: What will be released.
            round: The round or step it belongs to, at least 0.
            purpose, note: As in LedgerEntry.

        Raises:
            InvalidInput: For a negative round, or a ledger that is closed.
            OSError: When the charge could not be forced to disk. The ledger is closed then, and the release must not
                leave; opening the ledger again may find the charge, and counts it.
        """
        require_at_least("round", round, 0)
        if self._descriptor is None:
            raise InvalidInput("ledger", str(self._path), "open", "Open it again with Ledger.open.")
        values = {"round": int(round), "purpose": purpose, "event": to_json(event)} | ({"note": note} if note else {})
        line, checksum = _encode(values, self._checksum)
        entry, _ = _decode(line, self._checksum)
        try:
            _append(self._descriptor, line)
        except BaseException:
            self.close()
            raise
        self._entries = (*self._entries, entry)
        self._checksum = checksum
        return entry

    def event(self) -> Composed:
        """Everything charged so far as one event; equal events are merged into Repeated, in order of appearance.

        Merging changes no bound: privacy-loss distributions compose in any order.
        """
        return merged(entry.event for entry in self._entries)

    def epsilon(self, delta: float, adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER) -> Bounds:
        """Certified bounds on the user-level ε at delta of everything charged so far.

        Raises:
            InvalidInput: For a δ outside (0, 1).
        """
        return epsilon_bounds(self.event(), delta, adjacency=adjacency)

    def close(self) -> None:
        """Let go of the file; what was charged can still be read from this object."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()


def read_entries(path: str | os.PathLike[str]) -> tuple[LedgerEntry, ...]:
    """The charges of a ledger, read without locking or changing it, also while a run writes to it.

    A last line that is not complete yet is left out.

    Raises:
        InvalidInput: When there is no such file, or a release in it is of a kind whose module was not imported.
        LedgerDamaged: When a complete line is not what was written.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidInput("ledger", str(path), "a file that exists")
    return tuple(_replay(path, path.read_bytes())[0])


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InvalidInput(
            "ledger", str(path), "a ledger that no other run writes to", "Wait for that run, or name another folder."
        ) from None


def _replay(path: Path, data: bytes) -> tuple[list[LedgerEntry], str, int]:
    """The entries on complete lines, the last checksum, and where the complete lines end."""
    if not data.startswith(HEADER):
        if HEADER.startswith(data):  # An empty file, or a header cut off while it was written.
            return [], "", 0
        raise LedgerDamaged(path, 1, f"not the header of a version {VERSION} ledger")
    end = data.rfind(b"\n") + 1
    entries, checksum = [], ""
    for number, line in enumerate(data[len(HEADER) : end].split(b"\n")[:-1], start=2):
        try:
            entry, checksum = _decode(line, checksum)
        except NotImported:  # the line is what was written; what it speaks of is not known here
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerDamaged(path, number, f"not what was written ({error})") from error
        entries.append(entry)
    return entries, checksum, end


def _recover(path: Path, descriptor: int, torn: bytes, entries: list[LedgerEntry], checksum: str, end: int) -> str:
    """Keep a last line that lacks only its line break, drop a part of one; returns the checksum then."""
    line = len(entries) + 2
    try:
        entry, after = _decode(torn, checksum)
    except NotImported:
        raise
    except (ValueError, KeyError, TypeError) as error:
        if end and _holds_an_object(torn):
            raise LedgerDamaged(path, line, f"not what was written ({error})") from error
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)
        if end:
            warnings.warn(
                f"{path}, line {line}: cut off while it was written, and dropped. Its charge never returned, so its "
                "release did not leave; if the file was cut off later, one more charge counts than it lists.",
                TornLine,
                stacklevel=3,
            )
        return checksum
    _append(descriptor, b"\n")
    entries.append(entry)
    return after


def _holds_an_object(torn: bytes) -> bool:
    """Whether text begins with a whole JSON object, which no part of a line does."""
    try:
        json.JSONDecoder().raw_decode(torn.decode(errors="replace"))
    except ValueError:
        return False
    return True


def _encode(values: dict[str, Any], before: str) -> tuple[bytes, str]:
    """The line for values, with its line break, and its checksum."""
    body = json.dumps(values, default=_plain_number, allow_nan=False)
    checksum = _chain(before, body)
    return f'{body[:-1]}, "checksum": "{checksum}"}}\n'.encode(), checksum


def _decode(line: bytes, before: str) -> tuple[LedgerEntry, str]:
    """The entry on a line and its checksum; ValueError, KeyError or TypeError when it is not what was written."""
    text = line.decode().removesuffix("\n")
    values = json.loads(text)
    if not isinstance(values, dict):
        raise TypeError("the line holds no object")
    checksum = values.pop("checksum")
    body = text.removesuffix(f', "checksum": "{checksum}"}}') + "}"
    if checksum != _chain(before, body):
        raise ValueError("checksum does not match: the line was changed, or one before it is missing")
    event = from_json(values.pop("event"))
    return LedgerEntry(**values, event=event), checksum


def _chain(before: str, body: str) -> str:
    return hashlib.sha256(f"{before}\n{body}".encode()).hexdigest()[:16]


def _plain_number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} is not JSON")


def _append(descriptor: int, data: bytes) -> None:
    """Write all of data at the end and force it to disk."""
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """Force a new file's name to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
