"""The user store: every user's rows of tokens, memory-mapped, found in constant time."""

import json
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fedsim.data.frame import Frame
from fedsim.data.owners import OwnerSets
from fedsim.errors import InvalidInput
from fedsim.rows import IGNORED_LABEL, SizeCounts, TokenRows

FORMAT = 4
"""1 could hold one person as several users: ids of text files were not compared as numbers. 2 could hold a user "nan":
people whose ids were missing, some of them under their own ids too. 3 could hold rows with labels that lacked special
tokens, cut off with the end of a long text or never put on a later piece."""
EARLIER = {
    1: ": ids that are one user now, or none, may be users in it",
    2: ": ids that are one user now, or none, may be users in it",
    3: ": rows with labels may lack the tokenizer's special tokens in it",
}
"""What may be wrong with a store of an earlier format."""
MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")
VERIFIED_ON_OPENING = 16 << 20
"""Bytes up to which a file's checksum is compared whenever the store is opened; larger ones on request."""


class UserStore:
    """A range of users of a store on disk, and their rows.

    Users are numbered 0..num_users-1 and rows 0..num_rows-1, user by user; a user's rows are in the order of the
    data they came from. A split is such a range too, with numbers of its own. Nothing is read before it is asked
    for: opening and splitting take constant time, and all processes of a machine share one copy in the page cache.
    A pickled store is its path and range.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], columns: dict[str, np.ndarray], start: int, stop: int):
        self.path = path
        self.manifest = manifest
        self._columns = columns
        self._start, self._stop = start, stop
        self._bounds = columns["user_offset"]
        self._first_row = int(self._bounds[start])
        self._last_row = int(self._bounds[stop])

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> "UserStore":
        """Open a finished store.

        Args:
            path: Folder that `build_store` or `prepare` wrote.
            verify: Read everything and compare all checksums. Otherwise sizes, structure, and the checksums of
                files up to 16 MiB.

        Raises:
            InvalidInput: If there is no finished store, it is of another format, or a file of it is damaged.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        columns: dict[str, np.ndarray] = {}
        for name, entry in manifest["files"].items():
            _check_file(path, name, entry, verify)
            if name != "users.arrow":
                columns |= _map_columns(path, name)
        counts = (len(columns["user_offset"]) - 1, int(columns["user_offset"][-1]), len(columns["token"]))
        if counts != tuple(manifest[name] for name in ("num_users", "num_rows", "num_tokens")):
            raise _damaged(path, "its counts differ from those of its manifest")
        return cls(path, manifest, columns, 0, counts[0])

    def __reduce__(self) -> tuple[Callable[..., "UserStore"], tuple[str, str, int, int]]:
        return _reopen, (str(self.path), self.fingerprint, self._start, self._stop)

    def __repr__(self) -> str:
        return f"UserStore({str(self.path)!r}, users={self.num_users}, rows={self.num_rows})"

    @property
    def fingerprint(self) -> str:
        """Hash of the whole store's content, hexadecimal; the same for all its splits."""
        return str(self.manifest["fingerprint"])

    @property
    def num_users(self) -> int:
        """Users in this range."""
        return self._stop - self._start

    @property
    def num_rows(self) -> int:
        """Rows in this range."""
        return self._last_row - self._first_row

    @property
    def num_tokens(self) -> int:
        """Tokens in this range."""
        if not self.num_rows:
            return 0
        start, length = self._columns["start"], self._columns["length"]
        last = self._last_row - 1
        return int(start[last]) + int(length[last]) - int(start[self._first_row])

    @property
    def classes(self) -> list[str]:
        """Names of the classes, by class number; empty where the data has no labels."""
        return list(self.manifest["classes"])

    @property
    def frame(self) -> Frame | None:
        """The special tokens around every row; None where they stand around texts, or the store does not say."""
        found = self.manifest["recipe"].get("frame")
        return None if found is None else Frame(**{part: tuple(tokens) for part, tokens in found.items()})

    @cached_property
    def user_offsets(self) -> np.ndarray:
        """int64 [num_users + 1]: user u owns rows user_offsets[u] to user_offsets[u + 1] - 1."""
        bounds = self._bounds[self._start : self._stop + 1]
        return bounds - self._first_row if self._first_row else bounds

    @cached_property
    def size_counts(self) -> SizeCounts | None:
        """How many users own how many rows; None where the store does not say, or this range is no split of it."""
        for name, bounds in self.manifest["splits"].items():
            said = self.manifest.get("users_by_rows", {}).get(name)
            if said is not None and bounds == [self._start, self._stop]:
                pairs = np.array([(int(size), users) for size, users in said.items()], dtype=np.int64).reshape(-1, 2)
                counts = SizeCounts(sizes=pairs[:, 0], users=pairs[:, 1])
                if (counts.num_users, counts.kept(counts.largest)) != (self.num_users, self.num_rows):
                    raise _damaged(self.path, f"its manifest counts other users of {name} than there are")
                return counts
        return None

    @cached_property
    def longest_row(self) -> int:
        """Tokens of the longest row of the whole store, 0 without rows."""
        said = self.manifest.get("longest_row")
        return int(self._columns["length"].max(initial=0)) if said is None else int(said)

    @cached_property
    def largest_token(self) -> int:
        """The largest token of the whole store, 0 without tokens."""
        said = self.manifest.get("largest_token")
        return int(self._columns["token"].max(initial=0)) if said is None else int(said)

    @cached_property
    def owner_sets(self) -> OwnerSets | None:
        """Who owns the examples of each user, where these are sets of owners; None where each is one person."""
        kept = self.manifest.get("recipe", {}).get("data", {}).get("several_owners") == "keep"
        return OwnerSets.of_names(self.user_ids()) if kept else None

    @property
    def row_lengths(self) -> np.ndarray:
        """int32 [num_rows]: tokens in each row (a view of the file)."""
        return self._columns["length"][self._first_row : self._last_row]

    def split(self, name: str) -> "UserStore":
        """The users of "train", "validation" or "test", in constant time.

        Raises:
            InvalidInput: For another name.
        """
        if name not in self.manifest["splits"]:
            raise InvalidInput("split", name, "one of " + ", ".join(self.manifest["splits"]))
        start, stop = self.manifest["splits"][name]
        return UserStore(self.path, self.manifest, self._columns, start, stop)

    def rows_of(self, user: int) -> tuple[int, int]:
        """First row of the user and the row after its last.

        Raises:
            IndexError: If there is no such user in this range.
        """
        if not 0 <= user < self.num_users:
            raise IndexError(f"user {user} of {self.num_users}")
        place = self._start + user
        return int(self._bounds[place]) - self._first_row, int(self._bounds[place + 1]) - self._first_row

    def take(self, row_indices: np.ndarray) -> TokenRows:
        """Rows by number, in the order asked for; repeats are allowed.

        Args:
            row_indices: Integers of shape [rows], each in 0..num_rows-1.

        Returns:
            Their tokens as int64; labels where the store masks tokens from the loss; classes where it has labels.

        Raises:
            IndexError: If a row is not in this range.
        """
        rows = np.asarray(row_indices, dtype=np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < self.num_rows):
            raise IndexError(f"rows must be at least 0 and below {self.num_rows}")
        rows = rows + self._first_row
        starts, lengths = self._columns["start"][rows], self._columns["length"][rows]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        places = np.repeat(starts - offsets[:-1], lengths)
        places += np.arange(offsets[-1])
        tokens = self._columns["token"][places].astype(np.int64)
        labels, classes = None, None
        if "ignored_prefix" in self._columns:
            within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
            ignored = within < np.repeat(self._columns["ignored_prefix"][rows], lengths)
            labels = np.where(ignored, IGNORED_LABEL, tokens)
        if "scored" in self._columns:
            labels = np.where(self._columns["scored"][places], tokens, IGNORED_LABEL)
        if "class" in self._columns:
            classes = self._columns["class"][rows].astype(np.int64)
        return TokenRows(tokens=tokens, offsets=offsets, labels=labels, classes=classes)

    @property
    def token_type(self) -> np.dtype:
        """Integer type of the tokens on disk."""
        return self._columns["token"].dtype

    def names(self) -> pa.Table:
        """Column "user": the users' names in the data, by number, mapped from the disk."""
        with pa.memory_map(str(self.path / "users.arrow")) as source:
            return pa.ipc.open_file(source).read_all().slice(self._start, self.num_users)

    def user_ids(self) -> list[str]:
        """The users' names in the data, by number. They stay on disk until this is called; training never does."""
        names: list[str] = self.names().column("user").to_pylist()
        return names


def checksum(path: Path) -> str:
    """CRC-32 of a file's content, eight hexadecimal digits: finds damage, not forgery."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """CRC-32 of what a manifest says, without its own checksum."""
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"


def _reopen(path: str, fingerprint: str, start: int, stop: int) -> UserStore:
    """Unpickle: another process, perhaps another machine with a store of its own at that path."""
    store = UserStore.open(path)
    if store.fingerprint != fingerprint:
        raise _damaged(Path(path), f"its fingerprint is {store.fingerprint}, where {fingerprint} was expected")
    return UserStore(store.path, store.manifest, store._columns, start, stop)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        hint = "Build it with: python -m experiments.run prepare."
        if path.with_name(path.name + ".partial").exists():
            hint = "A build of it was interrupted: run the same prepare command again and it will go on."
        raise InvalidInput("data.path", str(path), f"a folder with a finished user store ({MANIFEST})", hint)
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found, expected = manifest["format"], manifest.pop("crc32")
    except (ValueError, KeyError, TypeError):
        raise _damaged(path, f"{MANIFEST} is not valid") from None
    if found != FORMAT:
        hint = f"Build it again{EARLIER.get(found, '')}."
        raise InvalidInput("data.path", str(path), f"of format {FORMAT} (this one is {found})", hint)
    if manifest_checksum(manifest) != expected:
        raise _damaged(path, f"the checksum of {MANIFEST} is wrong")
    return manifest


def _check_file(path: Path, name: str, entry: dict[str, Any], verify: bool) -> None:
    file = path / name
    if not file.is_file():
        raise _damaged(path, f"{name} is missing")
    if file.stat().st_size != entry["bytes"]:
        raise _damaged(path, f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}")
    if (verify or entry["bytes"] <= VERIFIED_ON_OPENING) and checksum(file) != entry["crc32"]:
        raise _damaged(path, f"the checksum of {name} is wrong")


def _map_columns(path: Path, name: str) -> dict[str, np.ndarray]:
    """The columns of one Arrow file as arrays over the file's pages."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path / name)))
        batch = reader.get_batch(0)
    except (pa.ArrowInvalid, pa.ArrowIndexError, OSError) as error:
        raise _damaged(path, f"{name} cannot be read ({error})") from None
    return {column: batch.column(column).to_numpy(zero_copy_only=True) for column in batch.schema.names}


def _damaged(path: Path, what: str) -> InvalidInput:
    return InvalidInput(
        "data.path", str(path), "an undamaged user store", f"{what[0].upper()}{what[1:]}: build it again."
    )
