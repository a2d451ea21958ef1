"""A Flower Array that keeps its values, so that engines can move it without serialising it."""

from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedsim.engine.work import Vector, dtype_name


class HeldArray(Array):
    """A Flower Array over a numpy array or a tensor that is turned into bytes only if somebody asks for bytes.

    Flower's own Array holds the bytes of `np.save`: two copies to write and one to read. This one holds the values
    themselves. In one process they are handed over as they are, a tensor on its device. Ray moves them through shared
    memory with one copy in and none out; stock Flower asks for `data` and gets exactly the bytes that Flower's own
    Array would hold, so the receiver sees an ordinary Array.

    Args:
        values: The values. They are not copied: do not write to them while the record is in use.
    """

    def __init__(self, values: Vector) -> None:
        self.__dict__.update(
            dtype=dtype_name(values.dtype),
            shape=tuple(values.shape),
            stype="numpy.ndarray",
            _held=values,
        )

    def numpy(self) -> np.ndarray:
        """The values as a read-only view; nothing is copied, unless they are on another device."""
        values = self.held
        view = values.view() if isinstance(values, np.ndarray) else values.detach().cpu().numpy()
        view.flags.writeable = False
        return view

    @property
    def held(self) -> Vector:
        """The values themselves."""
        # In __dict__, because Flower's Array is frozen.
        values: Vector = self.__dict__["_held"]
        return values

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return int(self.held.nbytes)

    def adopt(self, values: np.ndarray) -> None:
        """Hold this array of equal values from now on (a copy in shared memory) and let go of the one before."""
        self.__dict__["_held"] = values

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The values as `np.save` writes them, made on first use."""
        if "_bytes" not in self.__dict__:
            buffer = BytesIO()
            np.save(buffer, self.numpy(), allow_pickle=False)
            self.__dict__["_bytes"] = buffer.getvalue()
        written: bytes = self.__dict__["_bytes"]
        return written

    def deflate(self) -> bytes:
        """What stock Flower sends, which names the class: the receiver shall find Flower's own Array."""
        return Array(self.dtype, self.shape, self.stype, self.data).deflate()

    def __reduce__(self) -> tuple[Any, ...]:
        return HeldArray, (self.numpy(),)

    def __repr__(self) -> str:
        return f"HeldArray(dtype={self.dtype}, shape={self.shape})"


class LentArray(HeldArray):
    """One that its receivers may read until they have answered: afterwards its memory may hold another round's."""


class OwnArray(HeldArray):
    """One whose values came for its receiver alone, who may write to them."""


def held(array: Array) -> Vector:
    """An array's values: a tensor or the receiver's own as they are, anything else read-only; nothing is copied."""
    if isinstance(array, OwnArray):
        return array.held
    if isinstance(array, HeldArray) and not isinstance(array.held, np.ndarray):
        return array.held
    return array.numpy()


def array_record(**arrays: Vector) -> ArrayRecord:
    """A record of the named arrays, none of them copied."""
    record = ArrayRecord()
    for name, values in arrays.items():
        # Not ArrayRecord({...}): that would turn every array into bytes.
        record[name] = HeldArray(values)
    return record


def stored_bytes(record: ArrayRecord) -> int:
    """Bytes that a record's arrays hold; nothing is serialised to find out."""
    return sum(array.nbytes if isinstance(array, HeldArray) else len(array.data) for array in record.values())


def arrays(content: RecordDict, name: str) -> ArrayRecord:
    """The array record of that name.

    Not `content.array_records[name]`: what that property returns refers to itself, so that it keeps every array of
    the message in memory until Python next looks for cycles. With large models that is several copies too many.

    Raises:
        KeyError: There is none of that name.
        TypeError: It is a record of another kind.
    """
    record = content[name]
    if not isinstance(record, ArrayRecord):
        raise TypeError(f"the record {name} holds no arrays")
    return record


def column(record: ArrayRecord, name: str, dtype: type[np.generic]) -> np.ndarray:
    """The array of that name, [·].

    Raises:
        KeyError: There is none of that name.
        TypeError: It is of another type, or has another number of dimensions.
    """
    values = record[name].numpy()
    if values.ndim != 1 or values.dtype != dtype:
        raise TypeError(f"the array {name} is {values.dtype}{list(values.shape)}, not {dtype.__name__}[·]")
    return values


def scalars(content: RecordDict, name: str) -> ConfigRecord:
    """The configuration record of that name; see `arrays`."""
    record = content[name]
    if not isinstance(record, ConfigRecord):
        raise TypeError(f"the record {name} holds no scalars")
    return record
