"""What a strategy for stock Flower and the mod on its nodes say to each other, beside what their app says."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedsim.clip import Clip
from fedsim.engine.arrays import arrays, scalars
from fedsim.engine.totals import BadReply
from fedsim.errors import InvalidInput

CLIP, ROUND = "fedsim.clip", "fedsim.round"
"""Where a request says how to clip, and for which round: keys of the app's own configuration record."""
UPDATE, REPLY = "fedsim.update", "fedsim.reply"
"""The two records of an answer."""


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """The floating-point arrays of a record, end to end in one vector; arrays of other types are never changed.

    Attributes:
        shapes: Of each array by name, in the order of the vector.
    """

    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, record: ArrayRecord) -> Self:
        """The layout of a record.

        Raises:
            InvalidInput: There is nothing to train in it, or complex numbers, or a type that numpy does not know.
        """
        try:
            kinds = {name: np.dtype(array.dtype).kind for name, array in record.items()}
        except TypeError as unknown:
            raise InvalidInput("initial_arrays", str(unknown), "arrays of types that numpy knows") from None
        if "c" in kinds.values():
            raise InvalidInput("initial_arrays", "complex numbers", "real numbers")
        shapes = {name: tuple(array.shape) for name, array in record.items() if kinds[name] == "f"}
        if not sum(int(np.prod(shape)) for shape in shapes.values()):
            raise InvalidInput("initial_arrays", sorted(record), "arrays of floating-point numbers to train")
        return cls(shapes=shapes)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Values of each array by name, in the order of the vector."""
        return {name: int(np.prod(shape)) for name, shape in self.shapes.items()}

    def flatten(self, record: Mapping[str, Array]) -> np.ndarray:
        """The values end to end, float64 [P].

        Raises:
            BadReply: An array is missing, or has another shape.
        """
        parts = []
        for name, shape in self.shapes.items():
            if name not in record:
                raise BadReply(f"the array {name!r} is missing")
            values = record[name].numpy()
            if values.shape != shape:
                raise BadReply(f"the array {name!r} has shape {list(values.shape)}, not {list(shape)}")
            parts.append(values.astype(np.float64).ravel())
        return np.concatenate(parts)

    def filled(self, record: ArrayRecord, vector: np.ndarray) -> ArrayRecord:
        """The record with these values, [P], each array in its own type; other arrays are as they were."""
        parts = np.split(vector, np.cumsum(list(self.sizes.values()))[:-1])
        made = {
            name: Array(part.reshape(shape).astype(record[name].dtype))
            for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }
        return ArrayRecord({name: made.get(name, array) for name, array in record.items()})


@dataclass(frozen=True, kw_only=True)
class NodeRequest:
    """What a node is told beside the arrays and its app's configuration.

    Attributes:
        round: The round, from 0.
        clip: What the node's update is brought to.
    """

    round: int
    clip: Clip

    def beside(self, config: ConfigRecord) -> ConfigRecord:
        """A copy of the app's configuration with the request in it."""
        return ConfigRecord({**config, CLIP: self.clip.to_json(), ROUND: self.round})

    @classmethod
    def taken_from(cls, content: RecordDict) -> Self | None:
        """The request in a message, taken out of it so that the app sees its own configuration; None without one."""
        for record in content.values():
            if isinstance(record, ConfigRecord) and CLIP in record:
                return cls(clip=Clip.from_json(str(record.pop(CLIP))), round=int(str(record.pop(ROUND))))
        return None


@dataclass(frozen=True, kw_only=True)
class NodeReply:
    """A node's update: clipped(arrays sent − arrays made of them), as one that is subtracted.

    Attributes:
        round: The round, echoed.
        update: float32 [P].
    """

    round: int
    update: np.ndarray

    def to_record(self) -> RecordDict:
        return RecordDict(
            {UPDATE: ArrayRecord({"flat": Array(self.update)}), REPLY: ConfigRecord({"round": self.round})}
        )

    @classmethod
    def from_record(cls, content: RecordDict) -> Self:
        """The reply in a message.

        Raises:
            BadReply: It is laid out otherwise.
        """
        if REPLY not in content:
            raise BadReply("it did not pass user_level_clip_mod: the node's app needs ClientApp(mods=[…])")
        try:
            update = arrays(content, UPDATE)["flat"].numpy()
            return cls(round=int(str(scalars(content, REPLY)["round"])), update=update)
        except Exception as failure:  # bytes that are no array raise what they like
            raise BadReply(f"it is no update ({type(failure).__name__}: {failure})") from failure
