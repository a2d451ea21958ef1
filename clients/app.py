"""The Flower ClientApp: the same on Ray actors, in this process, and under `flwr run`."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.worker import resident_worker
from fedsim.engine.evaluation_messages import EvaluateRequest
from fedsim.engine.messages import TrainRequest
from fedsim.engine.slices import TrialRequest, timed

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """The clipped sum of the updates of the units that the message names."""
    reply = resident_worker(context.run_config).train(TrainRequest.from_record(message.content))
    return Message(reply.to_record(), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Losses of held-out rows."""
    reply = resident_worker(context.run_config).evaluate(EvaluateRequest.from_record(message.content))
    return Message(reply.to_record(), reply_to=message)


@app.query("trial")
def trial(message: Message, context: Context) -> Message:
    """How fast this worker gets through micro-batches of a size."""
    worker = resident_worker(context.run_config)
    reply = timed(worker.work, TrialRequest.from_record(message.content))
    return Message(reply.to_record(), reply_to=message)
