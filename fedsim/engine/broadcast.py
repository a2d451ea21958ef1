"""Large records go to workers once a round however many they are: in shared memory, or in Ray's object store."""

import weakref
from typing import Any, TypeAlias

import ray
from flwr.app import ArrayRecord, RecordDict

from fedsim.engine.arrays import HeldArray, LentArray, stored_bytes
from fedsim.engine.segments import Segments, SharedVector

SharedRecord: TypeAlias = dict[str, SharedVector]
"""A record whose arrays lie in this process's segments."""
StoredRecord: TypeAlias = "ray.ObjectRef[ArrayRecord] | SharedRecord"
"""A record's copy: in Ray's object store, or in segments. In quotes: at run time Ray's reference takes no type."""

INLINE_BYTES = 100 * 1024
"""Records below this size go inside the message, as Ray does with small arguments."""


class Broadcasts:
    """Remembers which records are already where workers can read them.

    A record is known by its identity and its round (Flower's group id), as long as somebody holds it; after that its
    shared copy is freed. A record put twice for two rounds is stored twice, so that changing it in between is safe.

    Workers on this machine read a record of lent arrays in a segment of this process, whose pages serve again in later
    rounds: once the record is gone, and every message with it was answered or given up. Any other record, which its
    receiver may go on to read, is Ray's to keep until nobody holds it. A worker whose message was given up may go on
    and read the parameters of two rounds at once; its reply is then never taken.

    Args:
        segments: Where copies for workers on this machine lie.
    """

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self._stored: dict[tuple[int, bool], tuple[weakref.ref[ArrayRecord], str, Any]] = {}

    def split(self, content: RecordDict, group: str, near: bool) -> tuple[RecordDict, list[str], list[StoredRecord]]:
        """Content without its large array records, their names, and where their copies are.

        Args:
            content: Of a message.
            group: Its round.
            near: Whether the worker can read this process's segments.
        """
        small, names, copies = content.copy(), [], []
        for name, record in content.items():
            if isinstance(record, ArrayRecord) and stored_bytes(record) >= INLINE_BYTES:
                names.append(name)
                copies.append(self._copy(record, group, near and _is_lent(record)))
                del small[name]
        return small, names, copies

    def _copy(self, record: ArrayRecord, group: str, near: bool) -> StoredRecord:
        key = (id(record), near)
        known = self._stored.get(key)
        if known is not None and known[0]() is record and known[1] == group:
            found: StoredRecord = known[2]
            return found
        self._stored.pop(key, None)  # of another round: its segment serves again if nobody reads it
        copy = self._shared(record) if near else self._put(record)
        self._stored[key] = (weakref.ref(record, lambda _: self._stored.pop(key, None)), group, copy)
        return copy

    def _shared(self, record: ArrayRecord) -> StoredRecord:
        try:
            return self._share(record)
        except OSError:  # no descriptor or no memory is left for a segment
            return self._put(record)

    def _share(self, record: ArrayRecord) -> SharedRecord:
        shared = {}
        for name, array in record.items():
            values = array.numpy()
            lent, place = self._segments.lend(values.shape, values.dtype)
            lent[...] = values
            shared[name] = SharedVector(place, str(values.dtype), values.shape, lent)
        return shared

    def _put(self, record: ArrayRecord) -> StoredRecord:
        reference = ray.put(record)
        # From now on the driver reads the shared copy too, and its private one can be freed.
        for name, shared in ray.get(reference).items():
            array = record[name]
            if isinstance(array, HeldArray):
                array.adopt(shared.numpy())
        return reference

    def clear(self) -> None:
        """Free every shared copy."""
        self._stored.clear()


def _is_lent(record: ArrayRecord) -> bool:
    return all(isinstance(array, LentArray) for array in record.values())
