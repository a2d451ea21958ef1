"""What the server checks of a worker's reply before it adds it to the round's sum."""

import math

import numpy as np
from flwr.app import RecordDict

from fedsim.engine.kept import KeptParameters, KeptSum
from fedsim.engine.messages import TrainReply, TrainRequest
from fedsim.engine.totals import BadReply
from fedsim.gradient_paths import GradientPaths


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
    except Exception as failure:  # whatever reading it raises: numpy alone raises several kinds for damaged bytes
        raise BadReply(f"it is no training reply ({type(failure).__name__}: {failure})") from failure


def check_answer(answer: TrainReply, request: TrainRequest, units: np.ndarray) -> None:
    """Compare a reply with what was asked, but for its sum, which is checked where it is added (`Expected.check`).

    Args:
        answer: What came.
        request: What was asked of all workers.
        units: What this one was asked for.

    Raises:
        BadReply: It is of another round, stands for other units, counts more units than were asked for, tells of more
            norms, or of numbers that are not finite; or its worker keeps its sum where it was to come, or the reverse.
    """
    if answer.round != request.round:
        raise BadReply(f"it answers round {answer.round}, not {request.round}")
    if not np.array_equal(answer.units, units):
        raise BadReply(f"it stands for {len(answer.units)} units that are not the {len(units)} asked for")
    if isinstance(answer.total, KeptSum) != isinstance(request.parameters, KeptParameters):
        raise BadReply("its sum stays where it was to come, or comes where it was to stay")
    for name, value in answer.statistics.items():
        if not math.isfinite(value):
            raise BadReply(f"its statistic {name} is {value}")
    count, clipped = len(units), answer.statistics.get("clipped_units", 0.0)
    if len(answer.norms) > count or not np.isfinite(answer.norms).all():
        raise BadReply(f"its norms are not at most {count} finite numbers")
    if not 0 <= clipped <= count:
        raise BadReply(f"its statistic clipped_units is {clipped:g}, of {count} units")
