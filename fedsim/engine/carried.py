"""Folders that every node of a cluster needs: found there by the same path, or carried there through Ray, once."""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedsim.disk import gigabytes
from fedsim.engine.environment import Whereabouts
from fedsim.errors import Failure, InvalidInput
from fedsim.terminal import say

MOST_BYTES = 4 << 30
"""What is larger is for a folder that nodes share, or for rsync."""
CHUNK_BYTES = 32 << 20
ANSWER_SECONDS = 600.0
"""That a node gets for one step: a piece written, or a copy compared."""
PLACE = "carried"
"""Sub-folder of a node's cache."""
PARTIAL = ".partial"
"""How the folder ends that something is received into."""
RECEIVING = ".receiving"
"""A file in it, locked while its receiver lives."""
STALE_SECONDS = 24 * 3600.0
"""Since it was begun, after which what nobody can have locked is given up."""


@dataclass(frozen=True)
class Folder:
    """A folder by the name that workers are given.

    Attributes:
        field: The option that names it.
        name: Its path, absolute.
        files: Path within it and bytes of each file.
        digest: Of its content; empty while nobody had to ask.
    """

    field: str
    name: str
    files: tuple[tuple[str, int], ...]
    digest: str = ""

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(size for _, size in self.files)

    def there(self, path: Path) -> bool:
        """Whether a folder has these files, of these sizes. (Workers compare what is in them, by fingerprint.)"""
        return path.is_dir() and set(self.files) <= set(files_of(path))

    def whole(self, path: Path) -> bool:
        """Whether a folder has these files, with the content that the digest is of."""
        return self.there(path) and _digest(path, self.files) == self.digest

    def on_this_node(self, cache: Path) -> str | None:
        """Where it lies on this machine; None where it does not.

        What lies in the cache is compared in size; by content it was when the run began (`_looked`).

        Args:
            cache: The node's cache.
        """
        places = [Path(self.name), *([cache / PLACE / self.digest] if self.digest else [])]
        return next((str(place) for place in places if self.there(place)), None)


def files_of(path: Path) -> tuple[tuple[str, int], ...]:
    """Path within a folder and bytes of every file in it, in order."""
    found = (one for one in path.rglob("*") if one.is_file())
    return tuple(sorted((one.relative_to(path).as_posix(), one.stat().st_size) for one in found))


class NotHere(Failure):
    """A worker's node lacks what the worker needs."""


def placed(config: Mapping[str, Any], folders: tuple[Folder, ...], driver: Whereabouts) -> dict[str, Any]:
    """A run's flat configuration, with each folder by where it lies on this node.

    Raises:
        NotHere: It does not.
    """
    made = dict(config)
    for folder in folders:
        place = folder.on_this_node(driver.cache())
        if place is None:
            address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            told = f"node {address} has no {folder.field} at {folder.name}"
            raise NotHere(f"{told}: copy it there, or lay it on a folder that all nodes share")
        made[folder.field] = place
    return made


def carry(folders: Mapping[str, tuple[str, Path]], driver: Whereabouts) -> tuple[Folder, ...]:
    """See to it that every node of the cluster that this process has joined has these folders.

    A node that does not have one at the same path gets it into its cache, where the next run finds it by its content.

    Args:
        folders: By option, the path that workers are given, and where the folder lies here.
        driver: Where this process stands.

    Returns:
        What workers need to know, for `placed`.

    Raises:
        InvalidInput: A node lacks one that is too large to be sent; names the node, the path and what to do.
        Failure: It could not be sent.
    """
    made = {field: Folder(field, name, files_of(here)) for field, (name, here) in folders.items()}
    nodes = _other_nodes()
    for field in made:
        lacking = _lacking(made[field], nodes, driver)
        if not lacking:
            continue
        if made[field].size > MOST_BYTES:
            allowed = f"a folder that every node has, or one of at most {gigabytes(MOST_BYTES)}, which is sent"
            hint = (
                f"Node {', '.join(lacking.values())} has none of {gigabytes(made[field].size)} there: copy it to the "
                "same path (rsync), or lay it on a folder that all nodes share."
            )
            raise InvalidInput(field, made[field].name, allowed, hint)
        here = folders[field][1]
        made[field] = replace(made[field], digest=_digest(here, made[field].files))
        if lacking := _lacking(made[field], lacking, driver):
            say(f"Sending {made[field].name} ({gigabytes(made[field].size)}) to {', '.join(lacking.values())}")
            _send(made[field], here, lacking, driver)
    return tuple(made.values())


def require_there(field: str, path: Path, hint: str, driver: Whereabouts) -> None:
    """See to it that every node of the cluster has a folder that is not sent, at the same path.

    Raises:
        InvalidInput: A node lacks it; names the node.
    """
    folder = Folder(field, str(path), files_of(path))
    if lacking := _lacking(folder, _other_nodes(), driver):
        told = f"Node {', '.join(lacking.values())} has none there: {hint}"
        raise InvalidInput(field, folder.name, "a folder that every node has", told)


def _other_nodes() -> dict[str, str]:
    """Address of each node by id, but for the driver's own."""
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    # By the client this machine need not be a node.
    by_client = ray.util.client.ray.is_connected()  # type: ignore[no-untyped-call]
    own = None if by_client else ray.get_runtime_context().get_node_id()
    return {node["NodeID"]: node["NodeManagerAddress"] for node in alive if node["NodeID"] != own}


def _on(node: str) -> dict[str, Any]:
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _lacking(folder: Folder, nodes: Mapping[str, str], driver: Whereabouts) -> dict[str, str]:
    """Those of the nodes that have it neither at its path nor in their cache."""
    look = ray.remote(_looked)
    asked = {node: look.options(**_on(node)).remote(folder, driver) for node in nodes}
    return {node: nodes[node] for node, there in asked.items() if not _answer(there, folder, nodes[node])}


def _looked(folder: Folder, driver: Whereabouts) -> bool:
    """Whether this node has it. What lies in its cache is compared by content here, once a run and not by each worker;
    what receivers that were killed have left there goes."""
    carried = driver.cache() / PLACE
    remove_stale(carried)
    found = folder.on_this_node(driver.cache())
    return found is not None and (Path(found).parent != carried or folder.whole(Path(found)))


def remove_stale(carried: Path) -> None:
    """Remove what was being received when its receiver was killed: it may be users' text.

    Args:
        carried: The sub-folder of a cache, which other nodes may be receiving into.
    """
    for partial in carried.glob(f"*{PARTIAL}"):
        try:
            with (partial / RECEIVING).open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial, ignore_errors=True)  # locked, for its receiver may just be making it
            stale = True  # NFS keeps the folder while the file is open
        except BlockingIOError:
            stale = False
        except OSError:  # it was left by an earlier version, or the file system knows no locks
            stale = False
            with suppress(OSError):
                stale = time.time() - partial.stat().st_mtime > STALE_SECONDS
        if stale:
            shutil.rmtree(partial, ignore_errors=True)


def _send(folder: Folder, here: Path, nodes: Mapping[str, str], driver: Whereabouts) -> None:
    """Piece by piece, so that neither shared memory nor this process holds more than a piece."""
    receiver: Any = ray.remote(_Receiver)
    receivers = {node: receiver.options(**_on(node)).remote(folder, driver) for node in nodes}

    def everywhere(method: str, *arguments: Any) -> None:
        for node, reply in {n: getattr(r, method).remote(*arguments) for n, r in receivers.items()}.items():
            _answer(reply, folder, nodes[node])

    try:
        everywhere("make_room")
        for name, _ in folder.files:
            everywhere("begin", name)
            with (here / name).open("rb") as file:
                while piece := file.read(CHUNK_BYTES):
                    everywhere("append", ray.put(piece))
        everywhere("finish")
    finally:
        ray.wait([one.give_up.remote() for one in receivers.values()], num_returns=len(receivers), timeout=10)
        for one in receivers.values():
            ray.kill(one)


def _answer(reply: Any, folder: Folder, address: str) -> Any:
    try:
        return ray.get(reply, timeout=ANSWER_SECONDS)
    except ray.exceptions.GetTimeoutError as late:
        told = f"node {address} did not answer within {ANSWER_SECONDS:g} s when it was asked for {folder.field}"
        raise Failure(f"{told} ({folder.name}): look after its disk and its Ray, or leave it out") from late
    except ray.exceptions.RayError as failure:
        cause = getattr(failure, "cause", None) or failure
        said = str(cause).strip().splitlines()[0]
        raise Failure(f"{folder.field} ({folder.name}) could not be sent to node {address}: {said}") from failure


class _Receiver:
    """Writes what is sent into the node's cache: under another name, until it is whole."""

    def __init__(self, folder: Folder, driver: Whereabouts) -> None:
        self._folder, self._place = folder, driver.cache() / PLACE
        self._partial = self._file = self._place
        self._lock: BinaryIO | None = None

    def make_room(self) -> None:
        self._place.mkdir(parents=True, exist_ok=True, mode=0o700)  # it may hold users' text
        while self._lock is None:
            self._partial = Path(tempfile.mkdtemp(prefix=f"{self._folder.digest}.", suffix=PARTIAL, dir=self._place))
            self._lock = _locked(self._partial / RECEIVING)

    def begin(self, name: str) -> None:
        self._file = self._partial / name
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.touch()

    def append(self, piece: bytes) -> None:
        with self._file.open("ab") as file:
            file.write(piece)

    def finish(self) -> None:
        """Compare, and give it its name.

        Nodes may share the cache, and other runs may be reading there: a folder of that name that is whole is left
        alone, and one that is damaged is mended file by file, never taken away.
        """
        if not self._folder.whole(self._partial):
            raise OSError("what arrived is not what was sent")
        target = self._place / self._folder.digest
        try:
            os.replace(self._partial, target)
            (target / RECEIVING).unlink(missing_ok=True)
        except OSError as there:
            if there.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not self._folder.whole(target):
                for name, _ in self._folder.files:
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(self._partial / name, target / name)

    def give_up(self) -> None:
        """Leave nothing that is not whole."""
        if self._lock is not None:
            self._lock.close()
        if self._partial != self._place:
            shutil.rmtree(self._partial, ignore_errors=True)


def _locked(path: Path) -> BinaryIO | None:
    """A new file, locked where the file system knows locks; None where another was faster, who then removes it."""
    file = path.open("xb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists():
            return file
    except BlockingIOError:
        pass
    except OSError:
        return file
    file.close()
    return None


def _digest(path: Path, files: tuple[tuple[str, int], ...]) -> str:
    """Of files' names and content."""
    digest = hashlib.blake2b(digest_size=16)
    for name, size in files:
        digest.update(f"{name} {size}\n".encode())
        with (path / name).open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
