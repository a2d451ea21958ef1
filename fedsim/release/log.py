"""Releases, kept from before they leave until no resumed run can need them.

Noise that is correlated over rounds cannot be drawn anew for a round that was lost: a second release of the round with
other noise would be one row more than the mechanism has, and one with the same noise of another sum would give both
away. So each release is on disk before it leaves, and a run that goes on repeats what it released, bit for bit. A
round that was charged and is not here has released nothing.

Where releases were lost the run can still end its chain of correlated noise and begin another, a composition of its
own, charged on top; it says so, and does so only when it is told to.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedsim.errors import Failure

CHAINS = "chains.json"
PARTIAL = ".partial"


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
    """Rounds whose noise is correlated.

    Attributes:
        number: Which chain of the run, from 0.
        begins: Its first round.
        charges: Entries of the ledger that are of chains before it.
    """

    number: int
    begins: int
    charges: int


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
        self._chains = [Chain(number=0, begins=0, charges=0)]
        if (folder / CHAINS).exists():
            written = json.loads((folder / CHAINS).read_text(encoding="utf-8"))
            self._chains = [Chain(**values) for values in written]

    def chain(self, round: int) -> "Chain":
        """The chain of noise that a round belongs to."""
        return max((chain for chain in self._chains if chain.begins <= round), key=lambda chain: chain.number)

    def restart(self, round: int, charges: int) -> None:
        """Begin a new chain with a round; what was kept of it and later ones belongs to the chain before.

        Args:
            round: The round.
            charges: Entries that the ledger has.
        """
        chain = Chain(number=1 + max(one.number for one in self._chains), begins=round, charges=charges)
        self._chains = [one for one in self._chains if one.begins < round] + [chain]
        self._write(CHAINS, json.dumps([asdict(one) for one in self._chains]).encode())
        for path in self._files():
            if int(path.stem) >= round:
                path.unlink()

    def keep(self, round: int, kept: Kept) -> None:
        """Set a release down, on disk when this returns; only then may it leave."""
        if not self.keeps:
            return
        self._make()
        path = self._path(round)
        partial = path.with_name(path.name + PARTIAL)
        arrays = {"mean": kept.mean, **{f"state/{name}": np.asarray(value) for name, value in kept.state.items()}}
        partial.unlink(missing_ok=True)
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, partial)
            partial.chmod(0o600)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        _sync(partial)
        partial.replace(path)
        _sync(self.folder)

    def find(self, round: int) -> Kept | None:
        """What a round released; None where it released nothing.

        Raises:
            ReleasesLost: Its file cannot be read.
        """
        path = self._path(round)
        if not path.exists():
            return None
        try:
            arrays = load_file(path)
            state = {name.removeprefix("state/"): value for name, value in arrays.items() if name != "mean"}
            return Kept(mean=arrays["mean"], state=state)
        except (OSError, KeyError, SafetensorError) as error:
            raise ReleasesLost(round, f"{path} cannot be read ({error})") from error

    def forget(self, before: int) -> None:
        """Remove releases of rounds before this one: no checkpoint that is left lacks them."""
        for path in self._files():
            if int(path.stem) < before:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove everything: the run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return [path for path in self.folder.glob("*.safetensors") if path.stem.isdigit()]

    def _path(self, round: int) -> Path:
        return self.folder / f"{round:08d}.safetensors"

    def _make(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)

    def _write(self, name: str, data: bytes) -> None:
        self._make()
        partial = self.folder / (name + PARTIAL)
        partial.write_bytes(data)
        _sync(partial)
        partial.replace(self.folder / name)
        _sync(self.folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
