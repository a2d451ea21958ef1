"""Clients whose updates are known in advance: a function of the unit and the round alone."""

import os
import time

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsim.engine.messages import TrainReply, TrainRequest


def update_of(unit: int, round: int, size: int) -> np.ndarray:
    """A small integer-valued float32 update, so that sums are exact in any order."""
    return ((np.arange(size) * 7 + unit * 13 + round * 5) % 11 - 5).astype(np.float32)


def expected_sum(units: np.ndarray, round: int, size: int) -> np.ndarray:
    total = np.zeros(size, dtype=np.float32)
    for unit in units.tolist():
        total += update_of(unit, round, size)
    return total


def answer(message: Message, context: Context) -> Message:
    """Behave as run_config says: sleep, hang or die on a unit, then return the known sum."""
    request = TrainRequest.from_record(message.content)
    size = request.parameters["flat"].shape[0]
    began = time.perf_counter()
    config = context.run_config
    time.sleep(float(config.get("sleep", 0.0)))
    total = expected_sum(request.units, request.round, size)
    reply = TrainReply(
        round=request.round,
        units=request.units,
        total=total,
        statistics={"seconds": time.perf_counter() - began, "rows": len(request.units), "pid": os.getpid()},
    )
    return Message(reply.to_record(), reply_to=message)


def make_app() -> ClientApp:
    made = ClientApp()
    made.train()(answer)
    return made


app = make_app()
