"""How messages go to the actors of a RayGrid, and large vectors beside them."""

import contextlib
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from flwr.app import ArrayRecord, Message, Metadata, RecordDict

from fedsim.engine.arrays import OwnArray, array_record, stored_bytes
from fedsim.engine.broadcast import INLINE_BYTES, Broadcasts
from fedsim.engine.messages import FLAT, TOTAL, TRAIN
from fedsim.engine.node_sums import NodeSums, StoredVector, SummingActors
from fedsim.engine.segments import Segments, SharedVector
from fedsim.engine.sums import ServerSum, Sums

LARGE_REPLY_BYTES = 64 << 20
REACH_SECONDS = 10.0
"""How long a worker that is not computing may take to say whether segments reach it; after it they do not."""


@dataclass(frozen=True)
class Carried:
    """A message that an actor has.

    Attributes:
        reply: What Ray gives for the answer.
        total: The answer's sum, where it stays on the actor's node.
        room: Where the sum is written, where that is a segment of this process.
        copies: The message's large records: their segments are not lent to others before it is answered.
    """

    reply: "ray.ObjectRef[Any]"
    total: "ray.ObjectRef[np.ndarray] | None" = None
    room: SharedVector | None = None
    copies: tuple[Any, ...] = ()


class Transport:
    """Carries messages to actors and their replies back.

    Parameters go through segments of this process to actors on this machine, and through Ray's object store to others.
    Sums come back by the same ways; or they stay where they were made, for `NodeSums` to add.
    """

    def __init__(self) -> None:
        self._segments = Segments()
        self._broadcasts = Broadcasts(self._segments)
        self._summing = SummingActors()
        self._totals_stay, self._total_bytes = False, 0

    def sums(self, on_nodes: bool, size_bytes: int, patience: float) -> Sums:
        """Where the sums of the messages that are carried from now on are formed."""
        self._totals_stay, self._total_bytes = on_nodes, size_bytes
        return NodeSums(self._summing, patience) if on_nodes else ServerSum()

    def reaches(self, actor: Any) -> bool:
        """Whether segments reach an actor, which is on this machine then."""
        if Segments.possible():
            lent, place = self._segments.lend((1,), np.uint8)
            asked = actor.reaches.remote(SharedVector(place, "uint8", lent.shape, lent))
            with contextlib.suppress(ray.exceptions.RayError):
                return bool(ray.get(asked, timeout=REACH_SECONDS))
        return False

    def send(self, message: Message, actor: Any, *, near: bool, busy: bool) -> Carried:
        """Have an actor answer a message.

        Args:
            message: The message.
            actor: A ResidentActor.
            near: Whether segments reach it.
            busy: Whether it has other messages; then no segment waits for its sum meanwhile.
        """
        content, names, copies = self._broadcasts.split(message.content, message.metadata.group_id, near)
        # Written here: Ray's own pickler looks for what others could not import, and there is nothing of the kind.
        light = pickle.dumps(bare_message(message.metadata, content), protocol=pickle.HIGHEST_PROTOCOL)
        if self._totals_stay:
            reply, total = actor.answer_apart.options(num_returns=2).remote(light, names, *copies)
            return Carried(reply, total=total, copies=tuple(copies))
        trains = message.metadata.message_type == TRAIN and self._total_bytes >= INLINE_BYTES
        if near and trains and not busy and (room := self._room()) is not None:
            return Carried(actor.answer_into.remote(room, light, names, *copies), room=room, copies=tuple(copies))
        return Carried(actor.answer.remote(light, names, *copies), copies=tuple(copies))

    def _room(self) -> SharedVector | None:
        """Where a sum may be written; None where the system gives no segment."""
        try:
            lent, place = self._segments.lend((self._total_bytes,), np.uint8)
        except OSError:
            return None
        return SharedVector(place, "uint8", lent.shape, lent)

    def receive(self, carried: Carried) -> Message:
        """The reply, which is there.

        Raises:
            ray.exceptions.RayError: The actor failed.
        """
        if carried.total is not None:
            reply, place = ray.get(carried.reply)
            if place is not None:
                reply.content[TOTAL] = array_record(**{FLAT: StoredVector(carried.total, *place)})
        elif carried.room is not None:
            reply, written = ray.get(carried.reply)
            if written is not None:
                reply.content[TOTAL] = _own_record(written, carried.room.lent)
        else:
            reply = ray.get(carried.reply)
        received: Message = reply
        return received

    def forget(self, carried: Carried) -> None:
        """Give a message up. Its actor may write a sum after all, before it ends: into nobody else's room."""
        if carried.room is not None:
            self._segments.retire(carried.room.place)

    def close(self) -> None:
        """End the summing actors and free what is shared."""
        self._broadcasts.clear()
        self._segments.clear()
        self._summing.close()


def is_large(reply: Message) -> bool:
    """Whether a reply brought so much from an object store that it pays to wait until its worker has let go of it."""
    records = reply.content.values() if reply.has_content() else ()
    arrays = [record for record in records if isinstance(record, ArrayRecord)]
    stored = [one for one in arrays if not any(isinstance(a, OwnArray) or _stays(a) for a in one.values())]
    return sum(map(stored_bytes, stored)) >= LARGE_REPLY_BYTES


def bare_message(metadata: Metadata, content: RecordDict | None = None) -> Message:
    """A message that exists already, with other content, or with none."""
    # Flower's own constructor for such; its overloads name the public ones alone.
    bare: Message = Message(RecordDict() if content is None else content, metadata=metadata)  # type: ignore[call-overload]
    return bare


def _stays(array: Any) -> bool:
    return isinstance(getattr(array, "held", None), StoredVector)


def _own_record(written: SharedVector, room: np.ndarray | None) -> ArrayRecord:
    """The sum that a worker wrote into its room."""
    assert room is not None
    size = int(np.prod(written.shape)) * np.dtype(written.dtype).itemsize
    record = ArrayRecord()
    record[FLAT] = OwnArray(room[:size].view(written.dtype).reshape(written.shape))
    return record
