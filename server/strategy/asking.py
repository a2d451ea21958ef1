"""A round's nodes asked for their updates, and the sum of what counts."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedsim.clip import CLIP_MARGIN, Clip
from fedsim.engine.exact import quantise, resolution_for
from fedsim.engine.grid import WaitingGrid
from fedsim.engine.node_messages import NodeReply, NodeRequest
from fedsim.engine.totals import BadReply
from fedsim.engine.work import Gathered, Vector, Work
from fedsim.errors import Failure
from server.strategy.nodes import Nodes

log = logging.getLogger("flwr")

LONGEST_PAUSE = 0.5
"""Seconds between two looks for replies on a grid that cannot wait for them (stock Flower)."""
TOO_LONG = 1e-5
"""Relative excess over the clip's limit beyond which a node has not clipped."""
REHEARSAL = -1
"""The round of which nothing is released."""
REHEARSED = 3
"""Nodes that are asked, one after the other, for an update that nobody uses, until one succeeds."""


def replies_to(grid: Grid, messages: Sequence[Message], timeout: float) -> Iterator[tuple[int, Message | None]]:
    """Each node's reply as it comes, the first where there are several; None from nodes that are late or unreachable.

    A reply to any other message, one of an earlier round say, is never among them: replies are asked for by the ids
    of these messages, which are forgotten when the time is over.

    Args:
        grid: Where the nodes are.
        messages: One for each node.
        timeout: Seconds for all of them together.
    """
    nodes = [message.metadata.dst_node_id for message in messages]
    sent = list(grid.push_messages(messages)) if messages else []
    sent += [""] * (len(nodes) - len(sent))  # Flower names no ids where it takes no messages, and None for single ones
    waiting = {identity: node for identity, node in zip(sent, nodes, strict=True) if identity}
    unreachable = [node for identity, node in zip(sent, nodes, strict=True) if not identity]
    end, pause = time.monotonic() + timeout, 0.01
    while waiting and (left := end - time.monotonic()) > 0:
        arrived = _arrived(grid, list(waiting), left)
        for reply in arrived:
            node = waiting.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                yield node, reply
        if not arrived and isinstance(grid, WaitingGrid):
            break
        if not arrived:
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)
    for node in [*unreachable, *waiting.values()]:
        yield node, None


def _arrived(grid: Grid, identities: list[str], timeout: float) -> list[Message]:
    if isinstance(grid, WaitingGrid):
        return grid.wait(identities, timeout)
    return list(grid.pull_messages(identities))


def update_in(reply: Message, request: NodeRequest, node: int, size: int) -> np.ndarray:
    """The update in a node's reply, float32 [P], finite.

    Raises:
        BadReply: It is an error (of which the last line is told, where Flower puts what was raised), or of another
            round or node, or has another shape or type, or is not finite.
    """
    if reply.has_error():
        lines = (reply.error.reason or f"error {reply.error.code}").split("\n")
        raise BadReply(next((line.strip(" '>") for line in reversed(lines) if line.strip(" '>")), "an error"))
    if reply.metadata.src_node_id != node:
        raise BadReply(f"it comes from node {reply.metadata.src_node_id}")
    answer = NodeReply.from_record(reply.content)
    if answer.round != request.round:
        raise BadReply(f"it answers round {answer.round}, not {request.round}")
    update = answer.update
    if update.dtype != np.float32 or update.shape != (size,):
        raise BadReply(f"its update is {update.dtype}{list(update.shape)}, not float32[{size}]")
    if not np.isfinite(update).all():
        raise BadReply("its update is not finite")
    return update


@dataclass
class Tally:
    """The sum of a round's updates, and what became of the nodes that were asked.

    Attributes:
        clip: What each update is brought to here, whatever its node has done.
        sizes: Values of each array by name.
        resolution: Step of the public grid that updates are rounded to, toward zero: sums are exact.
        total: int64 [P], in steps.
        counts: Nodes by what became of them: private.
        reasons: Why updates did not count, one sentence each: private.
    """

    clip: Clip
    sizes: dict[str, int]
    resolution: float
    total: np.ndarray = field(init=False)
    counts: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.total = np.zeros(sum(self.sizes.values()), dtype=np.int64)

    def take(self, replies: Iterable[tuple[int, Message | None]], request: NodeRequest) -> None:
        """Add up each node's update; one that is not there, or is none, adds zero."""
        for node, reply in replies:
            if reply is None:
                self._without(node, "late", "it did not answer in time, or could not be reached")
                continue
            try:
                self._add(update_in(reply, request, node, len(self.total)))
            except BadReply as reason:
                self._without(node, "failed" if reply.has_error() else "refused", str(reason))

    def _add(self, update: np.ndarray) -> None:
        reach = self.clip.reach(update.astype(np.float64), self.sizes)
        if reach > 1 + TOO_LONG:
            self.counts["too_long"] += 1
            update = self.clip.applied(update, self.sizes)
        self.total += quantise(update, self.clip, self.sizes, self.resolution)
        self.counts["counted"] += 1
        self.counts["clipped_units"] += reach > 1 - 2 * CLIP_MARGIN

    def _without(self, node: int, why: str, reason: str) -> None:
        self.counts[why] += 1
        self.reasons.append(f"node {node}: {reason}")


class Asking:
    """How a round's updates are had from nodes: the round's `Gather`.

    Args:
        grid: Where the nodes are.
        nodes: Which stands where.
        sizes: Values of each array by name.
        messages: The messages of a request, with these parameters [P], to these nodes.
        timeout: Seconds for the nodes of a round to answer.
        told: Whether what went wrong, which is private, may be logged.

    Attributes:
        reasons: Why updates of the last round did not count.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Nodes,
        sizes: dict[str, int],
        messages: Callable[[NodeRequest, Vector, list[int]], Sequence[Message]],
        timeout: float,
        *,
        told: bool,
    ) -> None:
        self.grid, self.nodes, self.sizes, self.timeout, self.told = grid, nodes, sizes, timeout, told
        self._messages = messages
        self.reasons: list[str] = []

    def gather(
        self,
        request: Work,
        costs: np.ndarray,
        *,
        next_units: np.ndarray | None = None,
        next_costs: np.ndarray | None = None,
    ) -> Gathered:
        """The exact sum over the request's units; a unit whose node has no update to give adds zero."""
        began = time.monotonic()
        asked = NodeRequest(round=request.round, clip=request.clip)
        tally = Tally(clip=request.clip, sizes=self.sizes, resolution=request.resolution)
        messages = self._ask(tally, asked, request.parameters, self.nodes.at(request.units))
        absent = len(request.units) - messages
        if absent:
            tally.counts["absent"] = absent
        self.reasons = tally.reasons
        if self.told and tally.reasons:
            log.warning(
                "%d of %d nodes asked count as zero (not private); the first: %s",
                len(tally.reasons), messages, tally.reasons[0],
            )  # fmt: skip
        return Gathered(
            total=tally.total,
            statistics={name: float(count) for name, count in tally.counts.items()},
            units=tally.counts["counted"],
            messages=messages,
            failures=tuple(tally.reasons),
            seconds=time.monotonic() - began,
            compute_seconds=0.0,
        )

    def rehearse(self, clip: Clip, parameters: Vector, places: int) -> None:
        """Have a node compute an update that nobody uses, before anything is charged.

        Args:
            clip: As in the rounds.
            parameters: The first, float32 [P].
            places: The size of the population.

        Raises:
            Failure: None of those that were asked could.
        """
        request, resolution = NodeRequest(round=REHEARSAL, clip=clip), resolution_for(clip, places)
        for node in self.nodes.at(np.arange(min(REHEARSED, len(self.nodes)))):
            tally = Tally(clip=clip, sizes=self.sizes, resolution=resolution)
            self._ask(tally, request, parameters, [node])
            if tally.counts["counted"]:
                return
            self.reasons = tally.reasons
        raise Failure(
            f"no node can train, so nothing is charged: {self.reasons[-1] if self.reasons else 'there is none'}"
        )

    def _ask(self, tally: Tally, request: NodeRequest, parameters: Vector, nodes: list[int]) -> int:
        """Ask these nodes, and take what they answer; how many there were.

        Raises:
            Failure: Messages to others were made, or two to one node.
        """
        messages = list(self._messages(request, parameters, nodes)) if nodes else []
        if sorted(message.metadata.dst_node_id for message in messages) != sorted(nodes):
            raise Failure(f"round {request.round}: configure_train must address each node that was drawn, once")
        tally.take(replies_to(self.grid, messages, self.timeout), request)
        return len(messages)
