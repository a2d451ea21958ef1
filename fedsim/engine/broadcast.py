"""Large records travel through Ray's object store, once a round however many workers read them."""

import weakref
from typing import TypeAlias

import ray
from flwr.app import ArrayRecord, RecordDict

from fedsim.engine.arrays import HeldArray, stored_bytes

StoredRecord: TypeAlias = "ray.ObjectRef[ArrayRecord]"
"""A record's copy in Ray's object store. In quotes: at run time Ray's reference takes no type."""

INLINE_BYTES = 100 * 1024
"""Records below this size go inside the message, as Ray does with small arguments."""


class Broadcasts:
    """Remembers which records are already in the object store.

    A record is known by its identity and its round (Flower's group id), as long as somebody holds it; after that its
    shared copy is freed. A record put twice for two rounds is stored twice, so that changing it in between is safe.
    """

    def __init__(self) -> None:
        self._stored: dict[int, tuple[weakref.ref[ArrayRecord], str, StoredRecord]] = {}

    def split(self, content: RecordDict, group: str) -> tuple[RecordDict, list[str], list[StoredRecord]]:
        """Content without its large array records, their names, and references to their stored copies."""
        small, names, references = RecordDict(), [], []
        for name, record in content.items():
            if isinstance(record, ArrayRecord) and stored_bytes(record) >= INLINE_BYTES:
                names.append(name)
                references.append(self._reference(record, group))
            else:
                small[name] = record
        return small, names, references

    def _reference(self, record: ArrayRecord, group: str) -> StoredRecord:
        known = self._stored.get(id(record))
        if known is not None and known[0]() is record and known[1] == group:
            return known[2]
        reference = ray.put(record)
        key = id(record)
        self._stored[key] = (weakref.ref(record, lambda _: self._stored.pop(key, None)), group, reference)
        # From now on the driver reads the shared copy too, and its private one can be freed.
        for name, shared in ray.get(reference).items():
            array = record[name]
            if isinstance(array, HeldArray):
                array.adopt(shared.numpy())
        return reference

    def clear(self) -> None:
        """Free every shared copy."""
        self._stored.clear()
