"""What server and clients say to each other about held-out users."""

from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedsim.engine.arrays import array_record, arrays, scalars
from fedsim.engine.same_inputs import Inputs


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """Measure the model on some rows of held-out users.

    Attributes:
        split: "validation" or "test".
        rows: int64 [R], row indices into that split.
        parameters, inputs: As in TrainRequest.
    """

    split: str
    rows: np.ndarray
    parameters: ArrayRecord
    inputs: Inputs | None = None

    def to_record(self) -> RecordDict:
        inputs = "" if self.inputs is None else self.inputs.to_json()
        return RecordDict(
            {
                "parameters": self.parameters,
                "rows": array_record(rows=np.ascontiguousarray(self.rows, dtype=np.int64)),
                "request": ConfigRecord({"split": self.split, "inputs": inputs}),
            }
        )

    @classmethod
    def from_record(cls, record: RecordDict) -> "EvaluateRequest":
        request = scalars(record, "request")
        return cls(
            split=str(request["split"]),
            rows=arrays(record, "rows")["rows"].numpy(),
            parameters=arrays(record, "parameters"),
            inputs=Inputs.from_json(str(request["inputs"])) if request["inputs"] else None,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateReply:
    """What was measured, row by row, so that the server can average by user.

    Attributes:
        rows: The request's rows, echoed.
        loss_sum: float64 [R], sum of the losses of a row's predicted tokens (nats), or the row's class loss.
        label_count: int64 [R], predicted tokens (1 for classification).
        correct: int64 [R], how many of them were predicted right.
    """

    rows: np.ndarray
    loss_sum: np.ndarray
    label_count: np.ndarray
    correct: np.ndarray

    def to_record(self) -> RecordDict:
        arrays = {
            "rows": np.ascontiguousarray(self.rows, dtype=np.int64),
            "loss_sum": np.ascontiguousarray(self.loss_sum, dtype=np.float64),
            "label_count": np.ascontiguousarray(self.label_count, dtype=np.int64),
            "correct": np.ascontiguousarray(self.correct, dtype=np.int64),
        }
        return RecordDict({"measured": array_record(**arrays)})

    @classmethod
    def from_record(cls, record: RecordDict) -> "EvaluateReply":
        measured = arrays(record, "measured")
        return cls(**{name: measured[name].numpy() for name in ("rows", "loss_sum", "label_count", "correct")})
