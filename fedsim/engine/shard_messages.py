"""What the server and workers say to each other where the workers form the sums and take the steps.

A worker *takes* a version of the parameters, the state of its coordinates and its place among the others. After that
training requests name the version. It *commits* a round: the sum, its noise and the step, beside what it holds until
another message names the version after it. And it *tells* of its coordinates what the server asks for.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedsim.engine.arrays import array_record, arrays, scalars
from fedsim.engine.collective import Meeting
from fedsim.engine.kept import KeptParameters

TAKE, COMMIT, TELL = "query.take", "query.commit", "query.tell"
PARAMETERS = "parameters"
OWN, BEFORE = "own", "before"
"""Coordinates of the worker itself, and its copies of those of the worker before it."""
SAID = "said"


@dataclass(frozen=True, kw_only=True)
class TakeRequest:
    """Hold these parameters and this state.

    Attributes:
        kept: What they are called from now on.
        meeting: Where the worker meets the others.
        optimizer: The optimizer's options, as JSON values.
        rounds: Rounds of the whole run.
        parts: Of the sums kept so far, those to keep.
        state: Record with "parameters" and every array of the optimizer's state, whole; the same record for all
            workers, so that an engine moves it once.
    """

    kept: KeptParameters
    meeting: Meeting
    optimizer: Mapping[str, Any]
    rounds: int
    parts: tuple[str, ...] = ()
    state: ArrayRecord = field(repr=False)

    def to_record(self) -> RecordDict:
        said = {
            "kept": dataclasses.asdict(self.kept),
            "meeting": dataclasses.asdict(self.meeting),
            "optimizer": dict(self.optimizer),
            "rounds": self.rounds,
            "parts": self.parts,
        }
        return RecordDict({"state": self.state, SAID: _said(said)})

    @classmethod
    def from_record(cls, record: RecordDict) -> Self:
        said = _heard(record)
        return cls(
            kept=KeptParameters(**said["kept"]),
            meeting=Meeting(**said["meeting"]),
            optimizer=said["optimizer"],
            rounds=int(said["rounds"]),
            parts=tuple(said["parts"]),
            state=arrays(record, "state"),
        )


@dataclass(frozen=True, kw_only=True)
class CommitRequest:
    """Add the parts up, noise the sum, take the step.

    Attributes:
        kept: The parameters that the sum was computed at.
        parts: The sum's parts, of whichever workers.
        dtype: Of the sum: "int64" or "float32".
        noise: What the release does to it, as JSON values (`fedsim.release.CoordinateNoise`). It names the key of one
            release's noise, which whoever reads it could take off: as secret as the text that workers hold.
    """

    kept: KeptParameters
    parts: tuple[str, ...]
    dtype: str
    noise: Mapping[str, Any] = field(repr=False)

    def to_record(self) -> RecordDict:
        return RecordDict({SAID: _said(dataclasses.asdict(self))})

    @classmethod
    def from_record(cls, record: RecordDict) -> Self:
        said = _heard(record)
        return cls(
            kept=KeptParameters(**said["kept"]),
            parts=tuple(said["parts"]),
            dtype=str(said["dtype"]),
            noise=said["noise"],
        )


@dataclass(frozen=True, kw_only=True)
class Committed:
    """What a worker has ready, once it is told to go on with it.

    Attributes:
        parts: The parts that it added.
        checksum: Of the whole new parameters: the same everywhere.
        finite: Whether those of its own coordinates are.
        square: Σ of squares of its coordinates of the released mean.
        seconds: By phase.
    """

    parts: tuple[str, ...]
    checksum: int
    finite: bool
    square: float
    seconds: Mapping[str, float]

    def to_record(self) -> RecordDict:
        return RecordDict({SAID: _said(dataclasses.asdict(self))})

    @classmethod
    def from_record(cls, record: RecordDict) -> Self:
        said = _heard(record)
        return cls(**{**said, "parts": tuple(said["parts"])})


@dataclass(frozen=True, kw_only=True)
class TellRequest:
    """Say what the worker holds.

    Attributes:
        kept: The parameters that it should hold.
        names: Arrays to tell, PARAMETERS or of the optimizer's state; none for all.
        before: Whether to tell the copies of the worker before it, too.
    """

    kept: KeptParameters
    names: tuple[str, ...] = ()
    before: bool = False

    def to_record(self) -> RecordDict:
        return RecordDict({SAID: _said(dataclasses.asdict(self))})

    @classmethod
    def from_record(cls, record: RecordDict) -> Self:
        said = _heard(record)
        return cls(kept=KeptParameters(**said["kept"]), names=tuple(said["names"]), before=bool(said["before"]))


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a worker holds.

    Attributes:
        parts: The parts of sums that it keeps.
        own, before: Arrays by name: of its own coordinates, and of those of the worker before it where asked for.
    """

    parts: tuple[str, ...]
    own: Mapping[str, np.ndarray] = field(default_factory=dict)
    before: Mapping[str, np.ndarray] = field(default_factory=dict)

    def to_record(self) -> RecordDict:
        record = RecordDict({SAID: _said({"parts": self.parts})})
        for whose, values in ((OWN, self.own), (BEFORE, self.before)):
            if values:
                record[whose] = array_record(**values)
        return record

    @classmethod
    def from_record(cls, record: RecordDict) -> Self:
        values = {
            whose: {name: array.numpy() for name, array in arrays(record, whose).items()} if whose in record else {}
            for whose in (OWN, BEFORE)
        }
        return cls(parts=tuple(_heard(record)["parts"]), own=values[OWN], before=values[BEFORE])


def _said(values: Mapping[str, Any]) -> ConfigRecord:
    return ConfigRecord({"json": json.dumps(values)})


def _heard(record: RecordDict) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(str(scalars(record, SAID)["json"]))
    return said
