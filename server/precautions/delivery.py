"""What a finished training leaves: written where it belongs as soon as there is room, or else somewhere else."""

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedsim.disk import os_error
from fedsim.errors import Failure
from server.checkpoint import Checkpoint, read_latest
from server.checkpoint import write as write_checkpoint
from server.precautions.patience import patiently
from server.results.run_folder import RunFolder

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


class Undelivered(Failure):
    """A run is trained, and its folder cannot take what it leaves.

    Attributes:
        folder: The run's folder.
        what: What could not be written.
        reason: What the operating system said.
        elsewhere: The folder that was taken instead, with the model, its ledger and its statement in it; "" where none
            could be written either.
        round: Round of the newest checkpoint there is, here or there; None where there is none.
    """

    def __init__(self, folder: str, what: str, reason: str, elsewhere: str, round: int | None) -> None:
        self.folder, self.what, self.reason, self.elsewhere, self.round = folder, what, reason, elsewhere, round
        state = "no state is kept, and the rounds would be charged again" if round is None else f"from round {round}"
        place = f"The model is in {elsewhere}." if elsewhere else "No other folder could be written either."
        super().__init__(
            f"{what} cannot be written to {folder} ({reason}). {place} Make room, and --resume {folder} goes on "
            f"({state}): a run whose training is done it finishes without training."
        )

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.folder, self.what, self.reason, self.elsewhere, self.round)


def deliver(
    folder: RunFolder,
    pieces: Mapping[str, Callable[[], object]],
    state: Callable[[], Checkpoint | None],
    take_away: Callable[[Path], object],
) -> None:
    """Write the pieces of a run's outcome, one after the other.

    Args:
        folder: The run's folder.
        pieces: What writes each, by what it is called.
        state: The final state, where no checkpoint in the folder holds it.
        take_away: Writes the model, with what tells what was spent on it, into another folder.

    Raises:
        Undelivered: The disk refused one for minutes; model and final state are in another folder then, if any can
            be written.
    """
    for what, write in pieces.items():
        try:
            patiently(what, write)
        except Exception as error:
            said = os_error(error)
            elsewhere = _elsewhere(folder, state, None if said is None else take_away)
            if said is None:
                raise
            latest = newest(folder)
            where = "" if elsewhere is None else str(elsewhere)
            reason = said.strerror or str(said)
            round = None if latest is None else latest.round
            raise Undelivered(str(folder.path), what, reason, where, round) from error


def newest(folder: RunFolder) -> Checkpoint | None:
    """The newest checkpoint of a run: in its folder, or in another that was taken because its own was full."""
    found = [read_latest(folder.checkpoints), *(read_latest(place / CHECKPOINTS) for place in _taken(folder))]
    return max((one for one in found if one is not None), key=lambda one: one.round, default=None)


def forget(folder: RunFolder) -> None:
    """Remove the states of a run that is finished from other folders; a model that lies there stays."""
    for place in _taken(folder):
        shutil.rmtree(place / CHECKPOINTS, ignore_errors=True)
        with contextlib.suppress(OSError):
            place.rmdir()


def _elsewhere(
    folder: RunFolder, state: Callable[[], Checkpoint | None], take_away: Callable[[Path], object] | None
) -> Path | None:
    """The first other folder that takes what is to be kept; None where nothing is, or none does.

    Whatever goes wrong here comes after what went wrong first, which is what is to be told.
    """
    try:
        final = state()
        if final is None and take_away is None:
            return None
        places = list(_places(folder))
    except Exception as error:
        logger.warning("nothing can be kept in another folder: %s: %s", type(error).__name__, error)
        return None
    for place in places:
        new = not os.path.lexists(place)
        try:
            place.mkdir(mode=0o700, exist_ok=True)
            if not _own(place):
                continue
            if final is not None:
                write_checkpoint(place / CHECKPOINTS, final)
            if take_away is not None:
                take_away(place)
            return place
        except Exception as error:
            logger.warning("%s does not take the model or its state: %s: %s", place, type(error).__name__, error)
            if new:
                shutil.rmtree(place, ignore_errors=True)
            forget(folder)
    return None


def _places(folder: RunFolder) -> Iterator[Path]:
    """Folders of a run beside its own, in the temporary folder and the user's home: named so that the run finds them
    again, and no other run does, not even a later one in the same folder."""
    secret = folder.secret.read_bytes() if folder.secret.exists() else b""
    name = hashlib.sha256(str(folder.path.resolve()).encode() + b"\0" + secret).hexdigest()[:16]
    roots = (os.environ.get("TMPDIR"), tempfile.gettempdir(), Path.home())
    for root in dict.fromkeys(Path(root).absolute() for root in roots if root):
        yield root / f"fedsim-{folder.path.resolve().name}-{name}"


def _taken(folder: RunFolder) -> list[Path]:
    return [place for place in _places(folder) if _own(place)]


def _own(place: Path) -> bool:
    """Whether it is a folder of this user's that nobody else could have written to."""
    try:
        status: Any = place.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
