"""What the server checks of a worker's reply before it adds it to the round's sum."""

import math

import numpy as np
from flwr.app import RecordDict

from fedsim.engine.messages import TrainReply, TrainRequest
from fedsim.engine.work import Vector
from fedsim.gradient_paths import GradientPaths

NORM_TOLERANCE, NORM_TOLERANCE_PER_UNIT = 1e-5, 2.0**-24
"""Relative. A float32 sum of n clipped updates may exceed n × bound by rounding: once in all, and in each addition."""
CHUNK = 1 << 16


class BadReply(Exception):
    """A reply that must not enter the sum."""


def read_reply(record: RecordDict) -> TrainReply:
    """The typed reply in a message.

    Raises:
        BadReply: The record is not laid out as a TrainReply.
    """
    try:
        reply = TrainReply.from_record(record)
        if reply.paths:
            GradientPaths.from_json(reply.paths)
        return reply
    except (KeyError, TypeError, ValueError) as failure:
        raise BadReply(f"it is no training reply ({type(failure).__name__}: {failure})") from failure


def check_reply(reply: TrainReply, request: TrainRequest, size: int) -> None:
    """Compare a reply with what was asked.

    Args:
        reply: What came.
        request: What was asked.
        size: Number of parameters P.

    Raises:
        BadReply: It is of another round, stands for other units, has another shape or type, holds a value that is
            not finite, counts more units than were asked for or tells of more norms, or is longer than so many
            clipped updates can be together; or what it says of its gradients' paths cannot be read.
    """
    if reply.round != request.round:
        raise BadReply(f"it answers round {reply.round}, not {request.round}")
    if not np.array_equal(reply.units, request.units):
        raise BadReply(f"it stands for {len(reply.units)} units that are not the {len(request.units)} asked for")
    dtype, found = "int64" if request.resolution else "float32", str(reply.total.dtype).removeprefix("torch.")
    if tuple(reply.total.shape) != (size,) or found != dtype:
        raise BadReply(f"its sum is {found}{list(reply.total.shape)}, not {dtype}[{size}]")
    for name, value in reply.statistics.items():
        if not math.isfinite(value):
            raise BadReply(f"its statistic {name} is {value}")
    count, clipped = len(request.units), reply.statistics.get("clipped_units", 0.0)
    if reply.norms.ndim != 1 or len(reply.norms) > count or not np.isfinite(reply.norms).all():
        raise BadReply(f"its norms are not at most {count} finite numbers")
    if not 0 <= clipped <= count:
        raise BadReply(f"its statistic clipped_units is {clipped:g}, of {count} units")
    bound = count * request.clip.bound * (1 + NORM_TOLERANCE + count * NORM_TOLERANCE_PER_UNIT)
    norm = norm_within(reply.total, bound / (request.resolution or 1.0)) * (request.resolution or 1.0)
    if not norm <= bound:
        what = "holds values that are not finite" if not math.isfinite(norm) else f"has norm {norm:.6g}"
        raise BadReply(f"its sum {what}; {count} clipped updates have at most {bound:.6g}")


def norm_within(values: Vector, bound: float) -> float:
    """The L2 norm, to float32 accuracy where it is clearly below `bound` and to float64 accuracy otherwise.

    One pass over memory in the usual case; of a tensor always in float64, where it is. NaN or infinity in, NaN or
    infinity out.
    """
    if not isinstance(values, np.ndarray):
        return math.sqrt(sum(float(part.double().square().sum()) for part in values.split(1 << 24)))
    if values.dtype == np.float32:
        with np.errstate(over="ignore", invalid="ignore"):
            quick = math.sqrt(sum(float(np.dot(part, part)) for part in _parts(values)))
        # A dot product of 2^16 float32 terms is off by at most 2^16 × 2^-24 = 0.4 %.
        if quick < 0.99 * bound:
            return quick
    wide = (part.astype(np.float64) for part in _parts(values))
    return math.sqrt(sum(float(np.dot(part, part)) for part in wide))


def _parts(values: np.ndarray) -> list[np.ndarray]:
    return [values[start : start + CHUNK] for start in range(0, len(values), CHUNK)]
