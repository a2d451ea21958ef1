"""Checkpoints: everything a run needs to go on, whole and verified, or not there at all.

A checkpoint is a folder with two files: arrays.safetensors and manifest.json, which holds the checksum of the other
and of itself. It is written under another name, forced to disk, and then renamed, so that a kill at any instant
leaves the checkpoints before it as they were. Nothing in it is ever unpickled.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedsim.disk import free_bytes, gigabytes, os_error
from fedsim.errors import Failure, InvalidInput

log = logging.getLogger(__name__)

FORMAT = "fedsim-checkpoint"
VERSION = 1
ARRAYS = "arrays.safetensors"
MANIFEST = "manifest.json"
PARTIAL = ".partial"


class CheckpointDamaged(Exception):
    """A checkpoint that is not what was written."""

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path, self.reason = Path(path), reason
        super().__init__(f"{path}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run between two rounds.

    Attributes:
        round: Rounds done.
        arrays: Weights, optimizer and mechanism state, by name ("parameters", "optimizer/exp_avg", …).
        values: Everything else, as JSON values: plan, fingerprints, ledger and metrics positions, seconds.
    """

    round: int
    arrays: Mapping[str, np.ndarray]
    values: Mapping[str, Any] = field(default_factory=dict)


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into a folder of checkpoints; it is there completely or not at all.

    Raises:
        OSError: When the disk is full or cannot be written; the checkpoints before it are untouched.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # with correlated secure noise the state is secret
    path = folder / f"{checkpoint.round:08d}"
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        save_file({name: np.asarray(array, order="C") for name, array in checkpoint.arrays.items()}, partial / ARRAYS)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "round": checkpoint.round,
            "values": dict(checkpoint.values),
            "arrays": {"bytes": (partial / ARRAYS).stat().st_size, "sha256": _file_checksum(partial / ARRAYS)},
        }
        manifest["checksum"] = _checksum(manifest)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")
        for name in (ARRAYS, MANIFEST, ""):
            _sync(partial / name)
        # One of the same round can only be a damaged one, which the run was not resumed from.
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        _sync(folder)
    except SafetensorError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise os_error(error) or OSError(str(error)) from error
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def read(path: Path) -> Checkpoint:
    """Read one checkpoint and verify it.

    Raises:
        CheckpointDamaged: When a file is missing, cut off or changed, or the format is not this version's.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        expected = manifest.pop("checksum")
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise CheckpointDamaged(path, f"not a {FORMAT} of version {VERSION}")
        if _checksum(manifest) != expected:
            raise CheckpointDamaged(path, f"the checksum of {MANIFEST} is wrong")
        written = manifest["arrays"]
        if (path / ARRAYS).stat().st_size != written["bytes"]:
            raise CheckpointDamaged(path, f"{ARRAYS} is not the {written['bytes']} bytes that were written")
        if _file_checksum(path / ARRAYS) != written["sha256"]:
            raise CheckpointDamaged(path, f"the checksum of {ARRAYS} is wrong")
        return Checkpoint(round=int(manifest["round"]), arrays=load_file(path / ARRAYS), values=manifest["values"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointDamaged(path, f"cannot be read ({type(error).__name__}: {error})") from error


def stored(folder: Path) -> list[Path]:
    """The finished checkpoints in a folder, newest first."""
    return sorted((path for path in folder.glob("[0-9]*") if path.name.isdigit() and path.is_dir()), reverse=True)


def read_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is undamaged; None where none was ever written.

    A damaged one is named in a warning, and the one before it is taken: the ledger, not the checkpoint, knows what was
    spent, so that going further back costs work but never privacy.

    Raises:
        InvalidInput: When there are checkpoints, but all of them are damaged.
    """
    damage = []
    for path in stored(folder):
        try:
            return read(path)
        except CheckpointDamaged as error:
            log.warning("checkpoint %s; trying the one before it", error)
            damage.append(error)
    if damage:
        raise InvalidInput(
            "resume", str(folder), "a folder with an undamaged checkpoint", f"The newest: {damage[0].reason}."
        )
    return None


class NotKept(Failure):
    """Checkpoints can no longer be written, so nothing more is charged: what came of it could be lost.

    Attributes:
        round: Rounds done.
        good: Round of the last good checkpoint; None where there is none.
        reason: What the operating system said.
        folder: Where checkpoints go.
        needed: Bytes of one.
    """

    def __init__(self, round: int, good: int | None, reason: str, folder: Path | str, needed: int) -> None:
        self.round, self.good, self.reason, self.folder, self.needed = round, good, reason, Path(folder), needed
        if round == 0:
            kept = "Nothing is charged"
        elif good is None:
            kept = f"No state is kept: the {round} rounds so far will run again, and be charged again"
        else:
            kept = f"The state of round {good} is kept"
        super().__init__(
            f"round {round}: no checkpoint can be written ({reason}), so nothing more is charged. {kept}. Make room "
            f"in {folder} ({gigabytes(needed)} needed, {gigabytes(free_bytes(self.folder))} free), then go on with "
            f"--resume {self.folder.parent}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.round, self.good, self.reason, self.folder, self.needed)


class CheckpointWriter:
    """Writes checkpoints while the next round computes, at most one at a time, and keeps the newest few.

    One that the disk does not take is written again once older ones have made room, then warned of: the last good one
    stays usable, and `insist` is for what must be kept.

    Args:
        folder: Where to.
        rounds: Write after every so many rounds; 0 for never.
        minutes: Write when so many minutes have passed since the last; 0 for never.
        keep: How many to keep.
        good: Round of the checkpoint that the run was resumed from, if it was.
        forget: Called with the round of the oldest checkpoint left: no resumed run needs anything of rounds before it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rounds: int,
        minutes: float,
        keep: int,
        good: int | None = None,
        forget: Callable[[int], None] | None = None,
    ) -> None:
        self.folder = folder
        self.failure: OSError | None = None
        self._rounds, self._seconds, self._keep = rounds, minutes * 60, keep
        self._last = time.monotonic()
        self._good = good
        self._forget = forget
        self._thread: threading.Thread | None = None

    @property
    def on(self) -> bool:
        """Whether any are written while training."""
        return self._rounds > 0 or self._seconds > 0

    def due(self, round: int) -> bool:
        """Whether a checkpoint is to be written after so many rounds."""
        by_rounds = self._rounds > 0 and round % self._rounds == 0
        return by_rounds or (self._seconds > 0 and time.monotonic() - self._last >= self._seconds)

    def write(self, checkpoint: Checkpoint, *, wait: bool = False) -> None:
        """Start writing; the arrays must not change until it is done.

        Args:
            checkpoint: What to write.
            wait: Return only when it is on disk, or has failed.
        """
        self.join()
        self._last = time.monotonic()
        if checkpoint.round == self._good:
            self.failure = None
            return  # It is on disk already: replacing it would put it at risk.
        self._thread = threading.Thread(target=self._write, args=(checkpoint,), name="checkpoint")
        self._thread.start()
        if wait:
            self.join()

    def insist(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint now, unless the one under way turns out well.

        Raises:
            OSError: It cannot be written.
        """
        self.join()
        if self.failure is not None:
            self.write(checkpoint, wait=True)
        if self.failure is not None:
            raise self.failure

    def not_kept(self, checkpoint: Checkpoint) -> NotKept:
        """What to say where a checkpoint was insisted on in vain."""
        needed = sum(array.nbytes for array in checkpoint.arrays.values())
        reason = "" if self.failure is None else self.failure.strerror or str(self.failure)
        return NotKept(checkpoint.round, self._good, reason, self.folder, needed)

    def join(self) -> None:
        """Wait for the write under way, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            try:
                write(self.folder, checkpoint)
            except OSError:
                for path in stored(self.folder)[1:]:
                    shutil.rmtree(path, ignore_errors=True)
                write(self.folder, checkpoint)
        except OSError as error:
            self.failure = error
            good = "there is none yet" if self._good is None else f"the one of round {self._good} stays usable"
            log.warning(
                "no checkpoint of round %d (%s); %s: %s", checkpoint.round, error.strerror or error, good, self.folder
            )
            return
        self.failure, self._good = None, checkpoint.round
        self._rotate(checkpoint.round)

    def _rotate(self, newest: int) -> None:
        """Remove what is older than the newest few, and what is ahead of them (of a run that was set back)."""
        for path in stored(self.folder):
            if int(path.name) > newest:
                shutil.rmtree(path, ignore_errors=True)
        for path in stored(self.folder)[self._keep :]:
            shutil.rmtree(path, ignore_errors=True)
        if self._forget is not None:
            self._forget(int(stored(self.folder)[-1].name))
        for path in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
