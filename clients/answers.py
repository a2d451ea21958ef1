"""A Flower ClientApp that answers with a worker, whatever that is; it needs no model's libraries itself."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.shard import Shard, Trains
from fedsim.engine.evaluation_messages import EvaluateReply, EvaluateRequest
from fedsim.engine.kept import KeptParameters
from fedsim.engine.messages import TrainReply, TrainRequest, refusal_record
from fedsim.engine.same_inputs import InputsDiffer
from fedsim.engine.shard_messages import CommitRequest, TakeRequest, TellRequest
from fedsim.engine.slices import TrialRequest, timed
from fedsim.engine.work import HeldOutDone, HeldOutWork


class Computes(Trains, Protocol):
    """What computes for an app: `clients.worker.Worker`, `clients.group.Group`, or a mock."""

    def evaluate(self, request: HeldOutWork) -> HeldOutDone:
        """Losses of the request's rows."""

    def work(self, max_tokens: int) -> int:
        """A micro-batch of that size, for a trial; returns its tokens."""


def app_of(worker_for: Callable[[Mapping[str, Any]], Computes]) -> ClientApp:
    """A ClientApp that answers with a worker.

    Args:
        worker_for: The worker for a run configuration; called at every message.
    """
    client = ClientApp()
    shard = Shard()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        """The clipped sum of the updates of the units that the message names."""
        worker = worker_for(context.run_config)

        def reply(asked: RecordDict) -> TrainReply:
            request = TrainRequest.from_record(asked)
            if isinstance(request.parameters, KeptParameters):
                return shard.train(worker, request)
            return TrainReply.of(worker.train(request))

        return _answer(message, reply)

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        """Losses of held-out rows."""
        worker = worker_for(context.run_config)
        return _answer(message, lambda asked: EvaluateReply.of(worker.evaluate(EvaluateRequest.from_record(asked))))

    @client.query("trial")
    def trial(message: Message, context: Context) -> Message:
        """How fast this worker gets through micro-batches of a size."""
        reply = timed(worker_for(context.run_config).work, TrialRequest.from_record(message.content))
        return Message(reply.to_record(), reply_to=message)

    @client.query("take")
    def take(message: Message, context: Context) -> Message:
        """A version of parameters and state, and a place among the workers that form sums."""
        told = shard.take(TakeRequest.from_record(message.content))
        return Message(told.to_record(), reply_to=message)

    @client.query("commit")
    def commit(message: Message, context: Context) -> Message:
        """A round's sum, its noise and its step, together with the other workers."""
        committed = shard.commit(CommitRequest.from_record(message.content))
        return Message(committed.to_record(), reply_to=message)

    @client.query("tell")
    def tell(message: Message, context: Context) -> Message:
        """What this worker holds of its coordinates."""
        told = shard.tell(TellRequest.from_record(message.content))
        return Message(told.to_record(), reply_to=message)

    return client


def _answer(message: Message, work: Callable[[RecordDict], TrainReply | EvaluateReply]) -> Message:
    """The reply to a message: what the work gives, or that the worker refuses it."""
    try:
        record = work(message.content).to_record()
    except InputsDiffer as refusal:
        record = refusal_record(refusal)
    return Message(record, reply_to=message)
