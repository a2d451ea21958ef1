"""What server and clients say to each other about held-out users."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedsim.engine.arrays import array_record, arrays, column, held, scalars
from fedsim.engine.messages import parameters_record
from fedsim.engine.same_inputs import Inputs
from fedsim.engine.work import HeldOutDone, HeldOutWork


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(HeldOutWork):
    """Work on held-out users, as a message carries it.

    Attributes:
        shared: As in TrainRequest.
    """

    shared: ArrayRecord = dataclasses.field(default_factory=ArrayRecord, repr=False)

    def __post_init__(self) -> None:
        if not self.shared:
            object.__setattr__(self, "shared", parameters_record(self.parameters))

    def to_record(self) -> RecordDict:
        inputs = "" if self.inputs is None else self.inputs.to_json()
        return RecordDict(
            {
                "parameters": self.shared,
                "rows": array_record(rows=np.ascontiguousarray(self.rows, dtype=np.int64)),
                "request": ConfigRecord({"split": self.split, "inputs": inputs}),
            }
        )

    @classmethod
    def from_record(cls, record: RecordDict) -> Self:
        request = scalars(record, "request")
        shared = arrays(record, "parameters")
        return cls(
            split=str(request["split"]),
            rows=column(arrays(record, "rows"), "rows", np.int64),
            parameters=held(shared["flat"]),
            shared=shared,
            inputs=Inputs.from_json(str(request["inputs"])) if request["inputs"] else None,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateReply(HeldOutDone):
    """What was measured, as a message carries it."""

    @classmethod
    def of(cls, done: HeldOutDone) -> Self:
        """The same, ready to be sent."""
        return cls(rows=done.rows, loss_sum=done.loss_sum, label_count=done.label_count, correct=done.correct)

    def to_record(self) -> RecordDict:
        arrays = {
            "rows": np.ascontiguousarray(self.rows, dtype=np.int64),
            "loss_sum": np.ascontiguousarray(self.loss_sum, dtype=np.float64),
            "label_count": np.ascontiguousarray(self.label_count, dtype=np.int64),
            "correct": np.ascontiguousarray(self.correct, dtype=np.int64),
        }
        return RecordDict({"measured": array_record(**arrays)})

    @classmethod
    def from_record(cls, record: RecordDict) -> Self:
        measured = arrays(record, "measured")
        counts = {name: column(measured, name, np.int64) for name in ("rows", "label_count", "correct")}
        return cls(**counts, loss_sum=column(measured, "loss_sum", np.float64))
