"""One round's units, sent to the workers of any Flower Grid, and their clipped updates' sum."""

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedsim.engine.cohort import Cohort
from fedsim.engine.grid import WaitingGrid
from fedsim.engine.kept import KeptParameters, KeptSums
from fedsim.engine.messages import TRAIN, TrainReply, TrainRequest, refusal_in
from fedsim.engine.replies import check_answer, read_reply
from fedsim.engine.sums import NotIn, Sums, SumsWanted, server_sum
from fedsim.engine.totals import BadReply, Expected
from fedsim.engine.work import NO_UNITS, Gathered, Work
from fedsim.errors import Failure, InvalidInput
from fedsim.gradient_paths import PathsHeard
from fedsim.phases import WORKER_SECONDS
from server.packing import Roster, Speeds, chunks, pack

log = logging.getLogger(__name__)

LONGEST_PAUSE = 0.1
"""Seconds between two looks for replies on a grid that cannot wait for them (stock Flower)."""
GRACE = 5.0
"""Seconds that a grid gets to declare a message expired before the server does so itself."""


class RoundFailed(Failure):
    """Some units' updates could not be had, so the round must not be released."""


class Dispatcher:
    """Splits each round over a grid's workers, and sums what comes back.

    Works on any Flower Grid; on one of ours replies are taken the moment they arrive. Learns the workers' speeds from
    round to round. What a worker fails to deliver is computed by another one; a reply that does not pass
    `fedsim.engine.replies.check_answer`, or whose sum does not pass `fedsim.engine.totals.Expected.check`, is refused
    and its worker left out for the rest of the round. A worker that refuses because it holds other data or another
    base model is left out for good.

    Args:
        grid: Where the workers are.
        units_per_message: At most so many units in a message; None sends one message a worker, 1 is the literal
            one-user-one-message mode.
        timeout: Seconds within which a message must be answered, waiting in line included.
        attempts: How often a unit is asked for before the round fails.
        roster: Who can be asked; by default all of the grid's workers.
        heard: Told what each reply says of the way that gradients take; None where nobody asks.
        sums: Where sums are formed (`fedsim.engine.sums`): by the server, or on the workers' nodes where it has them.

    Raises:
        InvalidInput: An option out of range, or sums that this grid cannot form.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        units_per_message: int | None = None,
        timeout: float = 3600.0,
        attempts: int = 3,
        roster: Roster | None = None,
        heard: PathsHeard | None = None,
        sums: SumsWanted = "auto",
    ) -> None:
        if units_per_message is not None and units_per_message < 1:
            raise InvalidInput("units_per_message", units_per_message, "at least 1, or none for one message a worker")
        if not timeout > 0:
            raise InvalidInput("timeout", timeout, "a number of seconds above 0")
        if attempts < 1:
            raise InvalidInput("attempts", attempts, "at least 1")
        if sums not in get_args(SumsWanted):
            hint = "Workers keep their sums where a request names parameters that they keep."
            raise InvalidInput("sums", sums, f"one of {', '.join(get_args(SumsWanted))}", hint)
        self.grid = grid
        self.units_per_message = units_per_message
        self.timeout = timeout
        self.attempts = attempts
        self.roster = Roster(grid) if roster is None else roster
        self.heard = heard
        self.sums = sums
        self.sums_for(0)  # refused here rather than in a round
        self.speeds = Speeds()
        self._planned: _Announced | None = None

    def gather(
        self,
        request: Work,
        costs: np.ndarray,
        *,
        next_units: np.ndarray | None = None,
        next_costs: np.ndarray | None = None,
    ) -> Gathered:
        """The clipped sum over the request's units.

        Args:
            request: What to compute for the whole round: `units` are all different, and may be none, in which case
                nothing is sent.
            costs: float [units], at least 0: predicted cost of each unit (its tokens).
            next_units: The next round's units, if known already: each worker is told which of them it will be asked
                for, so that it can fetch their rows ahead.
            next_costs: Their predicted costs.

        Raises:
            InvalidInput: A unit occurs twice, or costs do not match units.
            RoundFailed: Some unit's update could not be had; says which workers failed and how.
        """
        units = np.ascontiguousarray(request.units, dtype=np.int64)
        if len(np.unique(units)) != len(units):
            raise InvalidInput("units", f"an array of {len(units)}", "all different", "A unit must be counted once.")
        if len(costs) != len(units):
            raise InvalidInput("costs", f"an array of {len(costs)}", f"as long as units ({len(units)})")
        self.roster.training = True
        message = request if isinstance(request, TrainRequest) else TrainRequest.of(request)
        gathering = _Gathering(self, message, units, np.asarray(costs, dtype=np.float64))
        parts = self._split(units, gathering.costs, gathering.workers)
        hints = self._plan_next(next_units, next_costs, gathering.workers)
        return gathering.run(parts, hints)

    def sums_for(self, size_bytes: int) -> Sums:
        """Where a round's sum of so many bytes is formed."""
        if isinstance(self.grid, WaitingGrid):
            return self.grid.sums(self.sums, size_bytes, self.timeout)
        return server_sum(self.sums)

    def _split(self, units: np.ndarray, costs: np.ndarray, workers: list[int]) -> list[np.ndarray]:
        """Each worker's positions into `units`: as announced in the round before, if that still fits."""
        planned, self._planned = self._planned, None
        if planned is not None and planned.workers == workers and np.array_equal(planned.units, units):
            return planned.parts
        return pack(costs, self.speeds.of(workers)) if workers else []

    def _plan_next(self, units: np.ndarray | None, costs: np.ndarray | None, workers: list[int]) -> list[np.ndarray]:
        """Each worker's units of the next round, remembered so that it will really get them."""
        if units is None or not workers:
            return [NO_UNITS for _ in workers]
        units = np.ascontiguousarray(units, dtype=np.int64)
        weights = np.ones(len(units)) if costs is None else np.asarray(costs, dtype=np.float64)
        parts = pack(weights, self.speeds.of(workers))
        self._planned = _Announced(units, workers, parts)
        return [units[positions] for positions in parts]


@dataclass(frozen=True)
class _Announced:
    """Who computes what in the next round."""

    units: np.ndarray
    workers: list[int]
    parts: list[np.ndarray]


@dataclass(frozen=True)
class _Asked:
    """A message under way."""

    worker: int
    positions: np.ndarray
    units: np.ndarray
    attempt: int
    expires: float


class _Gathering:
    """One round under way: what has been asked of whom, and the sum so far."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        request: TrainRequest,
        units: np.ndarray,
        costs: np.ndarray,
    ) -> None:
        self.dispatcher = dispatcher
        self.request = request
        self.units = units
        self.costs = costs
        self.workers = dispatcher.roster.workers(wanted=len(units) > 0)
        self.expected = Expected.of(request)
        kept = isinstance(request.parameters, KeptParameters)  # and so is the sum
        self.sums = KeptSums(self.expected) if kept else dispatcher.sums_for(self.expected.nbytes)
        self.asked: dict[str, _Asked] = {}
        self.accepted: dict[str, tuple[_Asked, TrainReply]] = {}
        self.refused: set[int] = set()
        self.doubted: set[int] = set()  # whose node lost its sum, and may be gone: others are asked first
        self.failures: list[str] = []
        self.messages = 0
        self.told: dict[int, list[Mapping[str, float]]] = {}

    def run(self, parts: list[np.ndarray], hints: list[np.ndarray]) -> Gathered:
        """Send, receive, send again what failed, until every unit is in the sum."""
        began = time.monotonic()
        if len(self.units) and not self.workers:
            raise RoundFailed(f"round {self.request.round}: no worker is left, or none has come up{self._lost()}")
        for worker, positions, hint in zip(self.workers, parts, hints, strict=len(self.units) > 0):
            self._send(worker, positions, attempt=1, next_units=hint)
        while self.asked:
            for reply in self._arrivals():
                self._take(reply)
            if not self.asked:
                self._take_back(self.sums.settle())
        total = self.sums.total()
        if total is None:
            total = np.zeros(self.expected.size, dtype=self.expected.dtype)
        counted = np.concatenate([NO_UNITS, *(asked.units for asked, _ in self.accepted.values())])
        if not np.array_equal(np.sort(counted), np.sort(self.units)):
            raise RoundFailed(f"round {self.request.round}: the sum does not stand for exactly the units asked for")
        if self.failures:
            first = self.failures[0].splitlines()[0]
            log.warning(
                "%d of %d messages were computed anew; the first: %s", len(self.failures), self.messages, first
            )
        busiest = self._busiest()
        cohort = Cohort()
        for _, answer in self.accepted.values():
            cohort.add(answer)
        return Gathered(
            total=total,
            statistics=cohort.statistics,
            units=len(counted),
            messages=self.messages,
            failures=tuple(self.failures),
            seconds=time.monotonic() - began,
            compute_seconds=busiest.pop("seconds", 0.0),
            phases=busiest,
        )

    def _busiest(self) -> dict[str, float]:
        """The seconds, by kind, of the worker that had most of them; of all where they take turns."""
        grid = self.dispatcher.grid
        if isinstance(grid, WaitingGrid) and grid.in_process:
            told = [one for own in self.told.values() for one in own]
        else:
            told = max(self.told.values(), key=lambda own: sum(one.get("seconds", 0.0) for one in own), default=[])
        kinds = {"seconds": "seconds"} | WORKER_SECONDS if told else {}
        return {kind: sum(one.get(name, 0.0) for one in told) for kind, name in kinds.items()}

    def _send(self, worker: int, positions: np.ndarray, attempt: int, next_units: np.ndarray = NO_UNITS) -> None:
        timeout = self.dispatcher.timeout
        for part in chunks(positions, self.dispatcher.units_per_message):
            units = self.units[part]
            content = self.request.record_for(units, next_units)
            message = Message(content, worker, TRAIN, ttl=timeout, group_id=str(self.request.round))
            self.messages += 1
            asked = _Asked(worker, part, units, attempt, time.monotonic() + timeout)
            sent = list(self.dispatcher.grid.push_messages([message]))
            if sent:
                self.asked[sent[0]] = asked
            else:
                self._resend(asked, "the grid did not take the message")
            next_units = NO_UNITS

    def _arrivals(self) -> Iterable[Message]:
        """Replies as they come. On a grid that cannot wait, look again and again, with growing pauses."""
        grid, pause = self.dispatcher.grid, 0.001
        while True:
            first_to_expire = next(iter(self.asked.values())).expires  # all have as long: the first that was sent
            if isinstance(grid, WaitingGrid):
                replies = grid.wait(self.asked.keys(), timeout=first_to_expire + GRACE - time.monotonic())
            else:
                replies = list(grid.pull_messages(list(self.asked)))
            if replies:
                return replies
            if time.monotonic() > first_to_expire + GRACE:
                self._give_up_on_late()
                return ()
            if not isinstance(grid, WaitingGrid):
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _give_up_on_late(self) -> None:
        """Ask others for what the grid itself should have declared expired. A late reply will not be taken."""
        now = time.monotonic()
        for message_id in [i for i, asked in self.asked.items() if now > asked.expires + GRACE]:
            self._resend(self.asked.pop(message_id), f"no answer in {self.dispatcher.timeout:g} s")

    def _take(self, reply: Message) -> None:
        place = reply.metadata.reply_to_message_id
        asked = self.asked.pop(place, None)
        if asked is None:
            return
        if reply.has_error():
            self._resend(asked, reply.error.reason or f"error {reply.error.code}")
            return
        if (refusal := refusal_in(reply.content)) is not None:
            self.dispatcher.roster.leave_out(asked.worker, refusal)
            self._resend(asked, f"it refuses: {refusal}")
            return
        try:
            answer = read_reply(reply.content)
            check_answer(answer, self.request, asked.units)
            self._add(place, asked, answer)
        except BadReply as reason:
            self._refuse(asked, str(reason))

    def _add(self, place: str, asked: _Asked, answer: TrainReply) -> None:
        self.sums.add(place, answer.total, replace(self.expected, units=len(asked.units)))
        self.accepted[place] = asked, replace(answer, total=NO_UNITS)  # a sum is let go of once it is added
        seconds = answer.statistics.get("seconds", 0.0)
        self.told.setdefault(asked.worker, []).append(answer.statistics)
        if self.dispatcher.heard is not None:
            self.dispatcher.heard.hear(asked.worker, answer.paths)
        self.dispatcher.speeds.learn(asked.worker, float(self.costs[asked.positions].sum()), seconds)

    def _refuse(self, asked: _Asked, reason: str) -> None:
        self.refused.add(asked.worker)
        self._resend(asked, f"its reply was refused: {reason}")

    def _take_back(self, missing: Mapping[str, NotIn]) -> None:
        """Ask again for units whose sums were accepted, and then did not come into the round's."""
        taken = [(*self.accepted.pop(place), why) for place, why in missing.items()]
        self.doubted.update(asked.worker for asked, _, why in taken if not why.refused)
        for asked, _, why in taken:
            (self._refuse if why.refused else self._resend)(asked, why.reason)

    def _resend(self, asked: _Asked, reason: str) -> None:
        """Have other workers compute what one failed to deliver."""
        failure = f"round {self.request.round}: worker {asked.worker} failed on {len(asked.positions)} units: {reason}"
        self.failures.append(failure)
        if asked.attempt >= self.dispatcher.attempts:
            raise RoundFailed(f"{failure} (attempt {asked.attempt} of {self.dispatcher.attempts})")
        willing = [worker for worker in self.dispatcher.roster.workers() if worker not in self.refused]
        others = [worker for worker in willing if worker != asked.worker] or willing
        others = [worker for worker in others if worker not in self.doubted] or others
        if not others:
            raise RoundFailed(f"{failure}; no other worker is left{self._lost()}")
        speeds = self.dispatcher.speeds.of(others)
        owed = [sum(self.costs[a.positions].sum() for a in self.asked.values() if a.worker == w) for w in others]
        parts = pack(self.costs[asked.positions], speeds, busy_until=np.array(owed) * speeds)
        for worker, part in zip(others, parts, strict=True):
            self._send(worker, asked.positions[part], asked.attempt + 1)

    def _lost(self) -> str:
        lost = self.dispatcher.grid.lost if isinstance(self.dispatcher.grid, WaitingGrid) else {}
        reasons = [*lost.values(), *self.dispatcher.roster.left_out]
        return f" ({'; '.join(reasons)})" if reasons else ""
