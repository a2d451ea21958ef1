"""The Flower ClientApp: the same on Ray actors, in this process, and under `flwr run`."""

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.worker import Worker, resident_worker
from fedsim.engine.evaluation_messages import EvaluateRequest
from fedsim.engine.messages import TrainRequest
from fedsim.engine.slices import TrialRequest, timed


def app_of(worker_for: Callable[[Mapping[str, Any]], Worker]) -> ClientApp:
    """A ClientApp that answers with a worker.

    Args:
        worker_for: The worker for a run configuration; called at every message.
    """
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        """The clipped sum of the updates of the units that the message names."""
        reply = worker_for(context.run_config).train(TrainRequest.from_record(message.content))
        return Message(reply.to_record(), reply_to=message)

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        """Losses of held-out rows."""
        reply = worker_for(context.run_config).evaluate(EvaluateRequest.from_record(message.content))
        return Message(reply.to_record(), reply_to=message)

    @client.query("trial")
    def trial(message: Message, context: Context) -> Message:
        """How fast this worker gets through micro-batches of a size."""
        reply = timed(worker_for(context.run_config).work, TrialRequest.from_record(message.content))
        return Message(reply.to_record(), reply_to=message)

    return client


app = app_of(resident_worker)
