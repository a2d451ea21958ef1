"""What server and workers ask and answer, whatever carries it: Flower's messages, or nothing within one process.

Vectors may be torch tensors on the device that the workers compute on: between a server and workers of one process
they then never leave it.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from fedsim.clip import Clip
from fedsim.engine.same_inputs import Inputs

Vector: TypeAlias = Any
"""One value for each trainable parameter, [P]: a numpy array, or a torch tensor, which is not named here so that
processes without a model need not load torch; or what names a vector that workers keep (`fedsim.engine.kept`)."""
NO_UNITS = np.zeros(0, dtype=np.int64)
NO_NORMS = np.zeros(0, dtype=np.float32)
PEAKS = ("memory_bytes",)
"""Of statistics, those of which the largest counts rather than the sum."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Compute the clipped sum of some units' updates.

    Attributes:
        round: Round (ULS) or step (ELS), from 0.
        units: int64 [n]; user indices into the training split (ULS), or indices of kept examples (ELS).
        clip: What each unit's update is brought to.
        parameters: The trainable parameters end to end, float32 [P]; left as they are until the round is over. Who
            receives them reads them before answering: afterwards their memory may hold those of another round.
        resolution: 0 for a float32 sum; otherwise the step of the public fixed-point grid, and the reply's total
            is the int64 sum of the units' quantised updates (`fedsim.engine.exact`).
        next_units: int64 [m]; the units that this worker will probably be asked for in the next round, so that it
            can bring their rows into memory while it computes. A hint: it may be ignored, and may turn out wrong.
        plan: The plan as JSON: clients draw, clip and step as it says, whatever their own configuration.
        sampling_seed: Seed from which a user's rows of the round are drawn, at least 0, of any length.
        inputs: The data and the base model that the units and parameters are of: a worker that holds others refuses.
            None where both are in one process and share them.
    """

    round: int
    units: np.ndarray
    clip: Clip
    parameters: Vector
    resolution: float = 0.0
    next_units: np.ndarray = field(default_factory=NO_UNITS.copy)
    plan: str = ""
    sampling_seed: int = 0
    inputs: Inputs | None = None


@dataclass(frozen=True, kw_only=True)
class Done:
    """The clipped sum over exactly the units that were asked for.

    Attributes:
        round: The round, echoed.
        units: The units, echoed: the server checks that each is counted once.
        total: float32 [P], or int64 [P] in exact mode: Σ over units of the clipped update.
        statistics: Sums over the units that are private unless noised: "loss_sum", "clipped_units",
            "nonfinite_units", "empty_units", "rows", "tokens"; and what tells how much text the units own: "seconds",
            of them "load_seconds" until rows were there, "compute_seconds" for gradients, and "memory_bytes", the most
            memory that the worker held: of its GPU for this work, without one of the process since it began.
        norms: float32 [n or fewer], the norms of the updates before the clip, of units whose gradient is finite, in no
            order that matters: 4 bytes a unit, where its id takes 8. As private as the statistics.
        paths: Which way the model's gradients take, `GradientPaths.to_json`: nothing of the rows. Empty where the
            worker has not found out.
    """

    round: int
    units: np.ndarray
    total: Vector
    statistics: dict[str, float]
    norms: np.ndarray = field(default_factory=NO_NORMS.copy)
    paths: str = ""


@dataclass(frozen=True, kw_only=True)
class HeldOutWork:
    """Measure the model on some rows of held-out users.

    Attributes:
        split: "validation" or "test".
        rows: int64 [R], row indices into that split.
        parameters, inputs: As in Work.
    """

    split: str
    rows: np.ndarray
    parameters: Vector
    inputs: Inputs | None = None


@dataclass(frozen=True, kw_only=True)
class HeldOutDone:
    """What was measured, row by row, so that the server can average by user.

    Attributes:
        rows: The rows, echoed.
        loss_sum: float64 [R], sum of the losses of a row's predicted tokens (nats), or the row's class loss.
        label_count: int64 [R], predicted tokens (1 for classification).
        correct: int64 [R], how many of them were predicted right.
    """

    rows: np.ndarray
    loss_sum: np.ndarray
    label_count: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What the workers made of one round.

    Attributes:
        total: Sum over exactly the units asked for, each once: float32 [P], or int64 [P] in exact mode. Writable.
        statistics: The replies' statistics put together (`fedsim.engine.cohort`). Private unless noised.
        units: Number of units in the sum.
        messages: Messages sent, those that failed included.
        failures: What went wrong and was made good, one sentence each; names the worker.
        seconds: Wall-clock seconds from the first message to the sum.
        compute_seconds: The busiest worker's own seconds, or all workers' where they take turns; `seconds` minus this
            is what the engine costs.
        phases: What these seconds went into, by phase, as the workers measured it: rows, gradients. The rest of
            `seconds` is transport.
    """

    total: Vector
    statistics: dict[str, float]
    units: int
    messages: int
    failures: tuple[str, ...]
    seconds: float
    compute_seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)


@functools.lru_cache(maxsize=64)
def dtype_name(dtype: Any) -> str:
    """What numpy calls a vector's type, also where it is torch's. Numpy makes the name up anew when it is asked."""
    return str(dtype).removeprefix("torch.")


def on_host(vector: Vector) -> np.ndarray:
    """The values as a numpy array: themselves, or a copy of what another device has."""
    host: np.ndarray = vector if isinstance(vector, np.ndarray) else vector.cpu().numpy()
    return host
