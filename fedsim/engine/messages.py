"""What server and clients say to each other, as typed records over Flower's RecordDict."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Self

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedsim.clip import Clip
from fedsim.engine.arrays import LentArray, array_record, arrays, column, held, scalars
from fedsim.engine.kept import KeptParameters, KeptPart, KeptSum
from fedsim.engine.same_inputs import Inputs, InputsDiffer
from fedsim.engine.work import Done, Vector, Work

TRAIN = "train"
EVALUATE = "evaluate"
REFUSAL = "refusal"
TOTAL, FLAT = "total", "flat"
"""Of a reply, the record that holds the sum, and its one array."""
KEPT = "kept"
"""Of a request: the parameters that its worker holds; of a reply: the sum that stays there."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest(Work):
    """Work, as a message carries it.

    Attributes:
        shared: Record with the one array "flat", the parameters. The same record object is shared by all requests of a
            round, so that an engine can move it once; made where none is given. Empty where workers hold the
            parameters.
    """

    shared: ArrayRecord = dataclasses.field(default_factory=ArrayRecord, repr=False)

    def __post_init__(self) -> None:
        if not self.shared and not isinstance(self.parameters, KeptParameters):
            object.__setattr__(self, "shared", parameters_record(self.parameters))

    @classmethod
    def of(cls, work: Work) -> Self:
        """The same work, ready to be sent."""
        return cls(**{one.name: getattr(work, one.name) for one in dataclasses.fields(work)})

    def to_record(self) -> RecordDict:
        return self.record_for(self.units, self.next_units)

    def record_for(self, units: np.ndarray, next_units: np.ndarray) -> RecordDict:
        """The record of the same request for these units in place of its own.

        All else is in records that it shares with those for other units: who receives it reads them, no more.

        Args:
            units, next_units: As in Work.
        """
        record = self._common.copy()
        record["units"] = array_record(
            units=np.ascontiguousarray(units, dtype=np.int64),
            next_units=np.ascontiguousarray(next_units, dtype=np.int64),
        )
        return record

    @functools.cached_property
    def _common(self) -> RecordDict:
        """What does not differ from worker to worker, made once: Flower checks each value that enters a record."""
        request: dict[str, str | int | float] = {
            "round": self.round,
            "clip": self.clip.to_json(),
            "resolution": float(self.resolution),
            "plan": self.plan,
            "sampling_seed": f"{self.sampling_seed:x}",  # a record's integers have 64 bits
            "inputs": "" if self.inputs is None else self.inputs.to_json(),
        }
        record = RecordDict({"request": ConfigRecord(dict(request))})
        if isinstance(kept := self.parameters, KeptParameters):
            record[KEPT] = ConfigRecord({"group": kept.group, "version": kept.version, "size": kept.size})
        else:
            record["parameters"] = self.shared
        return record

    @classmethod
    def from_record(cls, record: RecordDict) -> Self:
        request = scalars(record, "request")
        if not isinstance(request["resolution"], float):  # True is 1.0 to float(), and another grid
            raise TypeError(f"the resolution is {request['resolution']!r}, no float")
        units = arrays(record, "units")
        shared = ArrayRecord() if KEPT in record else arrays(record, "parameters")
        return cls(
            round=int(request["round"]),  # type: ignore[arg-type]
            clip=Clip.from_json(str(request["clip"])),
            units=column(units, "units", np.int64),
            parameters=KeptParameters(**scalars(record, KEPT)) if KEPT in record else held(shared["flat"]),  # type: ignore[arg-type]
            shared=shared,
            resolution=float(request["resolution"]),
            next_units=column(units, "next_units", np.int64),
            plan=str(request["plan"]),
            sampling_seed=int(str(request["sampling_seed"]), 16),
            inputs=Inputs.from_json(str(request["inputs"])) if request["inputs"] else None,
        )


@dataclass(frozen=True, kw_only=True)
class TrainReply(Done):
    """What was done, as a message carries it."""

    @classmethod
    def of(cls, done: Done) -> Self:
        """The same, ready to be sent."""
        return cls(**{one.name: getattr(done, one.name) for one in dataclasses.fields(done)})

    def to_record(self) -> RecordDict:
        record = RecordDict(
            {
                "units": array_record(
                    units=np.ascontiguousarray(self.units, dtype=np.int64),
                    norms=np.ascontiguousarray(self.norms, dtype=np.float32),
                ),
                "reply": ConfigRecord({"round": self.round, "paths": self.paths}),
                "statistics": ConfigRecord({name: float(value) for name, value in self.statistics.items()}),
            }
        )
        if isinstance(kept := self.total, KeptSum):
            record[KEPT] = ConfigRecord(
                {"part": kept.names[0], "size": kept.size, "dtype": kept.dtype, "norm": kept.norm}
            )
        else:
            record[TOTAL] = array_record(**{FLAT: self.total})
        return record

    @classmethod
    def from_record(cls, record: RecordDict) -> Self:
        reply = scalars(record, "reply")
        told = arrays(record, "units")
        units, norms = column(told, "units", np.int64), column(told, "norms", np.float32)
        statistics = {name: float(value) for name, value in scalars(record, "statistics").items()}  # type: ignore[arg-type]
        total: Vector
        if KEPT in record:
            said = scalars(record, KEPT)
            part = KeptPart(name=str(said["part"]), units=units, statistics=statistics, norms=norms)
            total = KeptSum(
                parts=(part,),
                size=int(said["size"]),  # type: ignore[arg-type]
                dtype=str(said["dtype"]),
                norm=float(said["norm"]),  # type: ignore[arg-type]
            )
        else:
            total = held(arrays(record, TOTAL)[FLAT])
        return cls(
            round=int(reply["round"]),  # type: ignore[arg-type]
            units=units,
            norms=norms,
            total=total,
            statistics=statistics,
            paths=str(reply["paths"]),
        )


def parameters_record(flat: Vector) -> ArrayRecord:
    """The record that carries trainable parameters, float32 [P].

    The values are not copied: make a new record for each round and leave `flat` as it is until the round is over. Who
    receives it reads it before answering, and copies what it wants to keep.
    """
    record = ArrayRecord()
    record[FLAT] = LentArray(flat)
    return record


def refusal_record(refusal: InputsDiffer) -> RecordDict:
    """The reply of a worker that refuses."""
    return RecordDict({REFUSAL: ConfigRecord({"reason": str(refusal)})})


def refusal_in(record: RecordDict) -> str | None:
    """Why the worker refused; None for any other reply, and for what is laid out like none."""
    refusal = record.get(REFUSAL)
    return str(refusal["reason"]) if isinstance(refusal, ConfigRecord) and "reason" in refusal else None
