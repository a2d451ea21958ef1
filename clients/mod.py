"""The mod that makes a node's training, whatever it is, one clipped update. Needs numpy and flwr, no torch."""

from collections.abc import Callable

from flwr.app import ArrayRecord, Context, Message, RecordDict

from fedsim.engine.node_messages import ArrayLayout, NodeReply, NodeRequest
from fedsim.errors import InvalidInput

TRAIN = "train"


def user_level_clip_mod(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """A Flower mod for nodes that train under `UserLevelDP`: `ClientApp(mods=[user_level_clip_mod])`.

    It runs the app's own train function, takes the difference of the arrays that came and those that the function
    returns, and clips it, all arrays together, to the L2 norm that the server names; norms are computed in float64,
    and an update that is not finite becomes zero (`fedsim.clip.Clip.applied`). The clipped difference is all that
    leaves: the function's metrics ("num-examples" among them) and any other records of its reply stay on the node.
    Arrays of whole numbers, such as counts of batches, are left as the server has them. Messages that do not train
    pass unchanged: what an evaluate function answers is not private.

    Put it first, outside all other mods, so that nothing is added to an update after it was clipped.

    Args:
        message: A message of the server.
        context: The node's.
        call_next: The app, or the next mod.

    Returns:
        The reply: the update, or the app's own error.

    Raises:
        InvalidInput: A message to train that names no clip (the server has another strategy: nothing is trained, and
            nothing leaves), or more or fewer than one record of arrays, on either side. Flower turns exceptions into
            error replies, which count as zero.
        BadReply: An array that the function returned is missing or has another shape.
    """
    if message.metadata.message_type.split(".")[0] != TRAIN:
        return call_next(message, context)
    request = NodeRequest.taken_from(message.content)
    if request is None:
        hint = "The server's strategy must be UserLevelDP; without a clip no update leaves this node."
        raise InvalidInput("message", "to train, without a clip", "of UserLevelDP", hint)
    received = _only_arrays(message.content, "message")
    layout = ArrayLayout.of(received)
    before = layout.flatten(received)  # now: the app may change the arrays in place
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    difference = before - layout.flatten(_only_arrays(reply.content, "reply"))
    update = request.clip.applied(difference, layout.sizes)
    return Message(NodeReply(round=request.round, update=update).to_record(), reply_to=message)


def _only_arrays(content: RecordDict, what: str) -> ArrayRecord:
    """The one record of arrays in a message's content."""
    found = [record for record in content.values() if isinstance(record, ArrayRecord)]
    if len(found) != 1:
        raise InvalidInput(what, f"of {len(found)} array records", "of one: the model, whole")
    return found[0]
