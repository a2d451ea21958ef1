"""Clients that compute nothing, so that what remains is the engine."""

import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim.engine.messages import TrainReply, TrainRequest


def fedsim_app() -> ClientApp:
    """Answers with an array of the model's size, made anew (which counts as its computation)."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        began = time.perf_counter()
        request = TrainRequest.from_record(message.content)
        total = np.full(request.parameters.shape, 1e-9, dtype=np.float32)
        seconds = time.perf_counter() - began
        reply = TrainReply(round=request.round, units=request.units, total=total, statistics={"seconds": seconds})
        return Message(reply.to_record(), reply_to=message)

    return app


stock_app = ClientApp()


@stock_app.train()
def train(message: Message, context: Context) -> Message:
    """The same as a Flower user would write it: Flower's own arrays, one user a message."""
    flat = message.content.array_records["parameters"]["flat"].numpy()
    update = np.full(flat.shape, 1e-9, dtype=np.float32)
    return Message(RecordDict({"update": ArrayRecord({"flat": Array(update)})}), reply_to=message)
