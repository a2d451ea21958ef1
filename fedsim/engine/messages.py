"""What server and clients say to each other, as typed records over Flower's RecordDict."""

from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

TRAIN = "train"
EVALUATE = "evaluate"


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Compute the clipped sum of some units' updates.

    Attributes:
        plan: The plan as JSON: clients clip, draw and step as it says, whatever their own configuration.
        round: Round (ULS) or step (ELS), from 0.
        sampling_seed: Seed from which a user's rows of the round are drawn.
        units: int64 [n]; user indices into the training split (ULS), or indices of kept examples (ELS).
        clip_norm: Bound on one unit's update.
        parameters: Record with the one array "flat": the trainable parameters end to end, float32 [P]. The same
            record object is shared by all requests of a round, so that an engine can move it once.
        settings: Further public values of this round (per-block scales of a mechanism, say), by name.
    """

    plan: str
    round: int
    sampling_seed: int
    units: np.ndarray
    clip_norm: float
    parameters: ArrayRecord
    settings: dict[str, float]

    def to_record(self) -> RecordDict:
        return RecordDict(
            {
                "parameters": self.parameters,
                "units": ArrayRecord({"units": Array(np.ascontiguousarray(self.units, dtype=np.int64))}),
                "request": ConfigRecord(
                    {
                        "plan": self.plan,
                        "round": self.round,
                        "sampling_seed": self.sampling_seed,
                        "clip_norm": self.clip_norm,
                    }
                ),
                "settings": ConfigRecord({name: float(value) for name, value in self.settings.items()}),
            }
        )

    @classmethod
    def from_record(cls, record: RecordDict) -> "TrainRequest":
        request = record.config_records["request"]
        return cls(
            plan=str(request["plan"]),
            round=int(request["round"]),  # type: ignore[arg-type]
            sampling_seed=int(request["sampling_seed"]),  # type: ignore[arg-type]
            clip_norm=float(request["clip_norm"]),  # type: ignore[arg-type]
            units=record.array_records["units"]["units"].numpy(),
            parameters=record.array_records["parameters"],
            settings={name: float(value) for name, value in record.config_records["settings"].items()},  # type: ignore[arg-type]
        )


@dataclass(frozen=True, kw_only=True)
class TrainReply:
    """The clipped sum over exactly the units that the request named.

    Attributes:
        round: The request's round, echoed.
        units: The request's units, echoed: the server checks that each is counted once.
        total: float32 [P], or int64 [P] in exact mode: Σ over units of the clipped update.
        statistics: Sums over the units that are private unless noised: "loss_sum", "clipped_units",
            "nonfinite_units", "rows", "tokens", "seconds".
    """

    round: int
    units: np.ndarray
    total: np.ndarray
    statistics: dict[str, float]

    def to_record(self) -> RecordDict:
        return RecordDict(
            {
                "total": ArrayRecord({"flat": Array(self.total)}),
                "units": ArrayRecord({"units": Array(np.ascontiguousarray(self.units, dtype=np.int64))}),
                "reply": ConfigRecord({"round": self.round}),
                "statistics": ConfigRecord({name: float(value) for name, value in self.statistics.items()}),
            }
        )

    @classmethod
    def from_record(cls, record: RecordDict) -> "TrainReply":
        return cls(
            round=int(record.config_records["reply"]["round"]),  # type: ignore[arg-type]
            units=record.array_records["units"]["units"].numpy(),
            total=record.array_records["total"]["flat"].numpy(),
            statistics={name: float(value) for name, value in record.config_records["statistics"].items()},  # type: ignore[arg-type]
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """Measure the model on some rows of held-out users.

    Attributes:
        split: "validation" or "test".
        rows: int64 [R], row indices into that split.
        parameters: As in TrainRequest.
    """

    split: str
    rows: np.ndarray
    parameters: ArrayRecord

    def to_record(self) -> RecordDict:
        return RecordDict(
            {
                "parameters": self.parameters,
                "rows": ArrayRecord({"rows": Array(np.ascontiguousarray(self.rows, dtype=np.int64))}),
                "request": ConfigRecord({"split": self.split}),
            }
        )

    @classmethod
    def from_record(cls, record: RecordDict) -> "EvaluateRequest":
        return cls(
            split=str(record.config_records["request"]["split"]),
            rows=record.array_records["rows"]["rows"].numpy(),
            parameters=record.array_records["parameters"],
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
        return RecordDict({"measured": ArrayRecord({name: Array(array) for name, array in arrays.items()})})

    @classmethod
    def from_record(cls, record: RecordDict) -> "EvaluateReply":
        measured = record.array_records["measured"]
        return cls(**{name: measured[name].numpy() for name in ("rows", "loss_sum", "label_count", "correct")})


def parameters_record(flat: np.ndarray) -> ArrayRecord:
    """The record that carries trainable parameters, float32 [P]."""
    return ArrayRecord({"flat": Array(flat)})
