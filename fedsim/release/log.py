"""Releases, kept from before they leave until no resumed run can need them.

Noise that is correlated over rounds cannot be drawn anew for a round that was lost: a second release of the round with
other noise would be one row more than the mechanism has, and one with the same noise of another sum would give both
away. So each release is on disk before it leaves, the ledger notes that it leaves, and a run that goes on repeats what
it released, bit for bit. What the ledger does not note has not left.

Where a release was lost the run can still end its chain of correlated noise and begin another, a composition of its
own, charged on top; it says so, and does so only when it is told to. Chains are lines of the ledger too: it is what no
run goes on without.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedsim.disk import os_error
from fedsim.errors import Failure
from fedsim.privacy.ledger import MODEL_UPDATE, LedgerEntry

CHAIN, LEFT = "new chain of noise", "left"
"""Purposes of a ledger's notes: a chain begins with a round; a release leaves, its digest noted."""
PARTIAL = ".partial"
MEAN, STATE = "mean", "state/"


class ReleasesLost(Failure):
    """A round may have been released, and what it released is not known.

    Attributes:
        round: The round.
        reason: Why it is not known.
    """

    def __init__(self, round: int, reason: str) -> None:
        self.round, self.reason = round, reason
        super().__init__(
            f"round {round} may have been released, and {reason}: correlated noise cannot go on from there. Resume "
            "with --noise.lost-releases restart: a new chain of noise begins at the last checkpoint, and the rounds "
            "that run again are charged again."
        )

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.round, self.reason)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Rounds whose noise is correlated, as a ledger tells of them.

    Attributes:
        number: Which chain of the run, from 0; no two share a number.
        begins: Its first round.
        charged: Rounds of it that were charged.
        left: Digests of what left, by round.
    """

    number: int
    begins: int
    charged: frozenset[int]
    left: Mapping[int, str]

    @classmethod
    def of(cls, entries: Sequence[LedgerEntry], round: int) -> Self:
        """The chain that a round belongs to: the last that began with it or before."""
        number, begins, start = 0, 0, 0
        chains = ((place, entry) for place, entry in enumerate(entries) if entry.purpose == CHAIN)
        for which, (place, entry) in enumerate(chains, start=1):
            if entry.round <= round:
                number, begins, start = which, entry.round, place
        own = [entry for entry in entries[start:] if entry.round >= begins]
        return cls(
            number=number,
            begins=begins,
            charged=frozenset(entry.round for entry in own if entry.purpose == MODEL_UPDATE),
            left={entry.round: entry.note for entry in own if entry.purpose == LEFT},
        )


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a round released.

    Attributes:
        mean: The released mean, float32 [P].
        state: What the release must know from then on, by name: the clip norm; secure noise that was added.
    """

    mean: np.ndarray
    state: Mapping[str, np.ndarray]


class ReleaseLog:
    """A folder of releases, a file each, readable by its owner alone.

    Args:
        folder: Where; made when something is written.
        keeps: Whether releases are kept at all: without checkpoints nothing would ever be removed again.
    """

    def __init__(self, folder: Path, *, keeps: bool = True) -> None:
        self.folder = folder
        self.keeps = keeps

    def keep(self, chain: int, round: int, kept: Kept) -> str:
        """Set a release down, on disk when this returns; only then may it leave. Returns its digest.

        Args:
            chain: Number of the chain of noise that it is of.
            round: The round.
            kept: What is released.
        """
        arrays = _arrays(kept)
        if self.keeps:
            self._make()
            path = self._path(chain, round)
            partial = path.with_name(path.name + PARTIAL)
            partial.unlink(missing_ok=True)
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            try:
                save_file(arrays, partial)
                partial.chmod(0o600)
            except SafetensorError as error:
                raise os_error(error) or OSError(str(error)) from error
            _sync(partial)
            partial.replace(path)
            _sync(self.folder)
        return _digest(arrays)

    def find(self, chain: int, round: int) -> tuple[Kept, str] | None:
        """What is kept of a round of a chain, and its digest; None where nothing is.

        Raises:
            ReleasesLost: Its file cannot be read.
        """
        path = self._path(chain, round)
        if not path.exists():
            return None
        try:
            arrays = load_file(path)
            state = {name.removeprefix(STATE): value for name, value in arrays.items() if name.startswith(STATE)}
            return Kept(mean=arrays[MEAN], state=state), _digest(arrays)
        except (OSError, KeyError, SafetensorError) as error:
            raise ReleasesLost(round, f"{path} cannot be read ({error})") from error

    def forget(self, before: int) -> None:
        """Remove releases of rounds before this one: no checkpoint that is left lacks them."""
        for path in self.folder.glob("*-*.safetensors"):
            if int(path.stem.split("-")[1]) < before:
                path.unlink(missing_ok=True)

    def _path(self, chain: int, round: int) -> Path:
        return self.folder / f"{chain:04d}-{round:08d}.safetensors"

    def _make(self) -> None:
        if not self.folder.exists():
            self.folder.mkdir(mode=0o700, parents=True)
            _sync(self.folder.parent)


def _arrays(kept: Kept) -> dict[str, np.ndarray]:
    state = {STATE + name: np.asarray(value, order="C") for name, value in kept.state.items()}
    return {MEAN: np.asarray(kept.mean, order="C"), **state}


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Of names, types and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data if array.size else b"")
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
