"""Examples that several users own: kept under one name for all owners, and read again as who owns what.

In a store that keeps such examples a "user" is a set of owners: an example of ann and bob lies once, under the name of
both. So the rows of an example share its owners, and what is owned by the same people is grouped, split and found as a
user's examples are. Such a name is held together by characters that no id may have.
"""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.data.config import DataConfig
from fedsim.data.records import BadRecord

BEGINS, BETWEEN = "\x1e", "\x1f"
"""What the name of several owners begins with, and what stands between them (record and unit separator)."""
MIXED = "owners in different splits"
"""Why an example is left out: it is trained on only where all its owners are in training, and held out likewise."""
NOT_AN_ID = "user or owner with a separator (the characters 30 and 31) in the id"


def keeps_several(config: DataConfig) -> bool:
    """Whether examples of several owners are kept."""
    return config.several_owners == "keep"


def joint_name(owners: Collection[str]) -> str:
    """The name of a set of owners: one owner's own name, or all of them in order."""
    return BEGINS + BETWEEN.join(sorted(owners)) if len(owners) > 1 else next(iter(owners))


def owners_in(name: str) -> list[str]:
    """The owners that a name stands for, sorted."""
    return name[1:].split(BETWEEN) if name.startswith(BEGINS) else [name]


def split_of(key: bytes, config: DataConfig) -> int:
    """In which split a user with this keyed hash is: 0 train, 1 validation, 2 test; as `ingest` divides a store."""
    high = int.from_bytes(key[:8], "big")
    train = 1 - config.validation_fraction - config.test_fraction
    first, second = (min(int(share * 2**64), 2**64 - 1) for share in (train, train + config.validation_fraction))
    if not config.test_fraction and not config.validation_fraction:
        return 0
    if high < first:
        return 0
    return 1 if high < second or not config.test_fraction else 2


@dataclass(frozen=True)
class Joiner:
    """Makes one name of an example's owners.

    Attributes:
        key: The keyed hash of an owner.
        config: How users are split.
    """

    key: Callable[[str], bytes]
    config: DataConfig

    def __call__(self, owners: Collection[str]) -> str:
        """The name of these owners.

        Raises:
            BadRecord: They are in different splits, or an id could be taken for several.
        """
        if any(BEGINS in owner or BETWEEN in owner for owner in owners):
            raise BadRecord(NOT_AN_ID)
        if len({split_of(self.key(owner), self.config) for owner in owners}) > 1:
            raise BadRecord(MIXED)
        return joint_name(owners)


@dataclass(frozen=True, kw_only=True)
class OwnerSets:
    """Who owns the examples of each user of a store whose users are sets of owners.

    Attributes:
        offsets: int64 [sets + 1]: set s is owners[offsets[s]:offsets[s + 1]].
        owners: int64: owners of each set, end to end, numbered from 0 in the order in which they come.
        hashes: uint64 [sets]: of each set's name alone, whatever other sets there are.
        num_owners: How many there are.
    """

    offsets: np.ndarray
    owners: np.ndarray
    hashes: np.ndarray
    num_owners: int

    @classmethod
    def of_names(cls, names: Sequence[str]) -> "OwnerSets":
        """Those that names stand for."""
        numbers: dict[str, int] = {}
        owners: list[int] = []
        offsets = np.zeros(len(names) + 1, dtype=np.int64)
        for place, name in enumerate(names):
            owners += [numbers.setdefault(owner, len(numbers)) for owner in owners_in(name)]
            offsets[place + 1] = len(owners)
        hashes = np.frombuffer(b"".join(map(_hash, names)), dtype="<u8")
        return cls(offsets=offsets, owners=np.array(owners, dtype=np.int64), hashes=hashes, num_owners=len(numbers))

    def sizes(self, rows_per_set: np.ndarray) -> np.ndarray:
        """Rows that each owner owns, alone or with others, int64 [num_owners]; of integers [sets], rows of each."""
        of_sets = np.repeat(rows_per_set, np.diff(self.offsets))
        return np.bincount(self.owners, weights=of_sets, minlength=self.num_owners).astype(np.int64)


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), key=b"fedsim several owners", digest_size=8).digest()


def owner_sets_of(view: Any) -> OwnerSets | None:
    """The owners of a range of users; None where each user owns their examples alone."""
    found: OwnerSets | None = getattr(view, "owner_sets", None)
    return found
