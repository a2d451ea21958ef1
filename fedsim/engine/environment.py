"""What a process' environment says to Ray, and must not: a stranger's cluster, a folder that Ray cannot name."""

import logging
import os
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedsim.cache import CACHE, default_cache
from fedsim.errors import InvalidInput

logger = logging.getLogger(__name__)

HERE = "local"
"""The address that means this machine, to us and to Ray."""
SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
"""How long the name of a socket may be, by the system."""
SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
FLOWERS_SIMULATION = "flwr-simulation"
"""The program in which Flower starts Ray, for `flwr run`."""

FOLDERS = ("HF_HOME", "HF_HUB_CACHE")
"""Where libraries keep what they fetched, beside our own cache."""
SWITCHES = ("HF_HUB_OFFLINE",)

_short: list[tempfile.TemporaryDirectory[str]] = []


def short_folder() -> str | None:
    """A folder for Ray's sockets and logs where the one that the environment names will not do; None where it will.

    Ray keeps sockets some seventy bytes below RAY_TMPDIR or TMPDIR, and a socket's name must be short (Slurm's TMPDIR
    leaves no room for it) and of ASCII letters. The folder is this user's alone, and goes with `forget_short_folder`.

    Raises:
        InvalidInput: There is no other place.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), None)
    if name is None:
        return None
    place = os.environ[name]
    longest = f"{place}/ray/session_2000-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store.1"
    if place.isascii() and len(longest) <= SOCKET_BYTES:
        return None
    for other in SHORT_PLACES:
        if Path(other).is_dir() and os.access(other, os.W_OK | os.X_OK):
            _short.append(tempfile.TemporaryDirectory(prefix="ray-", dir=other, ignore_cleanup_errors=True))
            chosen = _short[-1].name
            why = "too long for the names of Ray's sockets" if place.isascii() else "beyond ASCII, which Ray is not"
            logger.warning("%s is %s: Ray's own files go to %s meanwhile", name, why, chosen)
            return chosen
    allowed = f"a folder of ASCII letters so short that Ray's sockets in it have {SOCKET_BYTES} bytes"
    hint = f"None of {', '.join(SHORT_PLACES)} can be written in its place."
    raise InvalidInput(name, place, allowed, hint)


def forget_short_folder() -> None:
    """Remove what `short_folder` made; Ray must have ended."""
    while _short:
        _short.pop().cleanup()


def stay_alone_under_flower() -> None:
    """Have Flower's own engine start a Ray of its own, in a folder that Ray can name.

    Flower starts Ray without an address. Ray would then join whatever RAY_ADDRESS names, or whoever ran `ray start` on
    this machine, and users' rows would be read there. Does something in the process of `flwr run`'s simulation alone,
    which loads the ClientApp before it starts Ray.
    """
    if Path(sys.argv[0]).name != FLOWERS_SIMULATION:
        return
    if (address := os.environ.get("RAY_ADDRESS") or HERE) != HERE:
        logger.warning(
            "RAY_ADDRESS (%s) is left alone: `flwr run` computes on this machine, on a Ray of its own", address
        )
    os.environ["RAY_ADDRESS"] = HERE
    if (folder := short_folder()) is not None:
        os.environ["RAY_TMPDIR"] = folder


def own_import_paths() -> list[str]:
    """Where this process imports from beside what is installed: the working directory, a clone, PYTHONPATH."""
    installed = {os.path.abspath(place) for place in sysconfig.get_paths().values()}
    paths = dict.fromkeys(os.path.abspath(path or ".") for path in sys.path if os.path.exists(path or "."))
    return [path for path in paths if not any(f"{path}/".startswith(f"{place}/") for place in installed)]


@dataclass(frozen=True)
class Whereabouts:
    """Where a process stands: what relative paths, imports and caches mean to it. Ray's workers stand where their
    node's Ray was started, and have the environment of that.

    Attributes:
        folder: The working directory.
        paths: The import path, absolute.
        environment: Folders of caches, absolute, and switches, by variable.
    """

    folder: str
    paths: tuple[str, ...]
    environment: dict[str, str]

    @classmethod
    def of_this_process(cls) -> Self:
        folders = {CACHE: default_cache()} | {name: Path(os.environ[name]) for name in FOLDERS if os.environ.get(name)}
        switches = {name: os.environ[name] for name in SWITCHES if name in os.environ}
        environment = {name: str(folder.absolute()) for name, folder in folders.items()} | switches
        return cls(os.getcwd(), tuple(os.path.abspath(path or ".") for path in sys.path), environment)

    def cache(self) -> Path:
        """Folder for what is costly to make again, on this machine: the same where it is here, too, or its own."""
        return same if (same := Path(self.environment[CACHE])).is_dir() else default_cache()

    def share(self) -> None:
        """Stand there, too: as far as its folders are on this machine."""
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        sys.path.extend(path for path in self.paths if path not in sys.path)
        for name, value in self.environment.items():
            if name in SWITCHES or os.path.isdir(value):
                os.environ[name] = value
