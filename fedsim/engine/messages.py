"""What server and clients say to each other, as typed records over Flower's RecordDict."""

from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedsim.clip import Clip
from fedsim.engine.arrays import array_record, arrays, scalars
from fedsim.engine.same_inputs import Inputs

TRAIN = "train"
EVALUATE = "evaluate"

NO_UNITS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Compute the clipped sum of some units' updates.

    Attributes:
        round: Round (ULS) or step (ELS), from 0.
        plan: The plan as JSON: clients draw, clip and step as it says, whatever their own configuration.
        sampling_seed: Seed from which a user's rows of the round are drawn, at least 0, of any length.
        units: int64 [n]; user indices into the training split (ULS), or indices of kept examples (ELS).
        clip: What each unit's update is brought to.
        parameters: Record with the one array "flat": the trainable parameters end to end, float32 [P]. The same
            record object is shared by all requests of a round, so that an engine can move it once.
        resolution: 0 for a float32 sum; otherwise the step of the public fixed-point grid, and the reply's total
            is the int64 sum of the units' quantised updates (`fedsim.engine.exact`).
        next_units: int64 [m]; the units that this worker will probably be asked for in the next round, so that it
            can bring their rows into memory while it computes. A hint: it may be ignored, and may turn out wrong.
        inputs: The data and the base model that the units and parameters are of: a worker that holds others refuses.
            None where both are in one process and share them.
    """

    round: int
    units: np.ndarray
    clip: Clip
    parameters: ArrayRecord
    resolution: float = 0.0
    next_units: np.ndarray = field(default_factory=NO_UNITS.copy)
    plan: str = ""
    sampling_seed: int = 0
    inputs: Inputs | None = None

    def to_record(self) -> RecordDict:
        units = np.ascontiguousarray(self.units, dtype=np.int64)
        next_units = np.ascontiguousarray(self.next_units, dtype=np.int64)
        request: dict[str, str | int | float] = {
            "round": self.round,
            "clip": self.clip.to_json(),
            "resolution": float(self.resolution),
            "plan": self.plan,
            "sampling_seed": f"{self.sampling_seed:x}",  # a record's integers have 64 bits
            "inputs": "" if self.inputs is None else self.inputs.to_json(),
        }
        return RecordDict(
            {
                "parameters": self.parameters,
                "units": array_record(units=units, next_units=next_units),
                "request": ConfigRecord(dict(request)),
            }
        )

    @classmethod
    def from_record(cls, record: RecordDict) -> "TrainRequest":
        request = scalars(record, "request")
        units = arrays(record, "units")
        return cls(
            round=int(request["round"]),  # type: ignore[arg-type]
            clip=Clip.from_json(str(request["clip"])),
            units=units["units"].numpy(),
            parameters=arrays(record, "parameters"),
            resolution=float(request["resolution"]),  # type: ignore[arg-type]
            next_units=units["next_units"].numpy(),
            plan=str(request["plan"]),
            sampling_seed=int(str(request["sampling_seed"]), 16),
            inputs=Inputs.from_json(str(request["inputs"])) if request["inputs"] else None,
        )


@dataclass(frozen=True, kw_only=True)
class TrainReply:
    """The clipped sum over exactly the units that the request named.

    Attributes:
        round: The request's round, echoed.
        units: The request's units, echoed: the server checks that each is counted once.
        total: float32 [P], or int64 [P] in exact mode: Σ over units of the clipped update.
        statistics: Sums over the units that are private unless noised: "loss_sum", "clipped_units",
            "nonfinite_units", "empty_units", "rows", "tokens"; and how long it took, which tells how much text the
            units own: "seconds", of them "load_seconds" until rows were there, "compute_seconds" for gradients.
    """

    round: int
    units: np.ndarray
    total: np.ndarray
    statistics: dict[str, float]

    def to_record(self) -> RecordDict:
        return RecordDict(
            {
                "total": array_record(flat=self.total),
                "units": array_record(units=np.ascontiguousarray(self.units, dtype=np.int64)),
                "reply": ConfigRecord({"round": self.round}),
                "statistics": ConfigRecord({name: float(value) for name, value in self.statistics.items()}),
            }
        )

    @classmethod
    def from_record(cls, record: RecordDict) -> "TrainReply":
        return cls(
            round=int(scalars(record, "reply")["round"]),  # type: ignore[arg-type]
            units=arrays(record, "units")["units"].numpy(),
            total=arrays(record, "total")["flat"].numpy(),
            statistics={name: float(value) for name, value in scalars(record, "statistics").items()},  # type: ignore[arg-type]
        )


def parameters_record(flat: np.ndarray) -> ArrayRecord:
    """The record that carries trainable parameters, float32 [P].

    The values are not copied: make a new record for each round and leave `flat` as it is until the round is over.
    """
    return array_record(flat=flat)
