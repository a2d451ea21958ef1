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
        round: Round (ULS) or step (ELS), from 0.
        units: int64 [n]; user indices into the training split (ULS), or indices of kept examples (ELS).
        clip_norm: Bound on one unit's update.
        parameters: Record with the one array "flat": the trainable parameters end to end, float32 [P]. The same
            record object is shared by all requests of a round, so that an engine can move it once.
        settings: Further public values of this round (per-block scales of a mechanism, say), by name.
    """

    round: int
    units: np.ndarray
    clip_norm: float
    parameters: ArrayRecord
    settings: dict[str, float]

    def to_record(self) -> RecordDict:
        return RecordDict(
            {
                "parameters": self.parameters,
                "units": ArrayRecord({"units": Array(np.ascontiguousarray(self.units, dtype=np.int64))}),
                "request": ConfigRecord({"round": self.round, "clip_norm": self.clip_norm}),
                "settings": ConfigRecord({name: float(value) for name, value in self.settings.items()}),
            }
        )

    @classmethod
    def from_record(cls, record: RecordDict) -> "TrainRequest":
        request = record.config_records["request"]
        return cls(
            round=int(request["round"]),  # type: ignore[arg-type]
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


def parameters_record(flat: np.ndarray) -> ArrayRecord:
    """The record that carries trainable parameters, float32 [P]."""
    return ArrayRecord({"flat": Array(flat)})
