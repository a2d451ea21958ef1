"""One round's units, sent to the workers of any Flower Grid, and their clipped updates' sum."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from fedsim.engine.messages import NO_UNITS, TRAIN, TrainReply, TrainRequest
from fedsim.errors import InvalidInput
from server.packing import Speeds, chunks, pack
from server.replies import BadReply, check_reply

LONGEST_PAUSE = 0.1
"""Seconds between two looks for replies on a grid that cannot wait for them (stock Flower)."""


class RoundFailed(RuntimeError):
    """Some units' updates could not be had, so the round must not be released."""


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What the workers made of one round.

    Attributes:
        total: Sum over exactly the units asked for, each once: float32 [P], or int64 [P] in exact mode. Writable.
        statistics: The replies' statistics, summed. Private unless noised.
        units: Number of units in the sum.
        messages: Messages sent, those that failed included.
        failures: What went wrong and was made good, one sentence each; names the worker.
        seconds: Wall-clock seconds from the first message to the sum.
        compute_seconds: The busiest worker's own seconds; `seconds` minus this is what the engine costs.
    """

    total: np.ndarray
    statistics: dict[str, float]
    units: int
    messages: int
    failures: tuple[str, ...]
    seconds: float
    compute_seconds: float


@dataclass
class _Asked:
    """A message under way."""

    worker: int
    positions: np.ndarray
    request: TrainRequest
    attempt: int
    expires: float


class Dispatcher:
    """Splits each round over a grid's workers, and sums what comes back.

    Works on any Flower Grid; on one of ours replies are taken the moment they arrive. Learns the workers' speeds from
    round to round. What a worker fails to deliver is computed by another one; a reply that does not pass
    `server.replies.check_reply` is refused and its worker left out for the rest of the round.

    Args:
        grid: Where the workers are.
        units_per_message: At most so many units in a message; None sends one message a worker, 1 is the literal
            one-user-one-message mode.
        timeout: Seconds within which a message must be answered, waiting in line included.
        attempts: How often a unit is asked for before the round fails.
        worker_timeout: Seconds to wait for the first worker to appear.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        units_per_message: int | None = None,
        timeout: float = 3600.0,
        attempts: int = 3,
        worker_timeout: float = 60.0,
    ) -> None:
        if units_per_message is not None and units_per_message < 1:
            raise InvalidInput("units_per_message", units_per_message, "at least 1, or none for one message a worker")
        if not timeout > 0:
            raise InvalidInput("timeout", timeout, "a number of seconds above 0")
        if attempts < 1:
            raise InvalidInput("attempts", attempts, "at least 1")
        self._grid = grid
        self._units_per_message = units_per_message
        self._timeout = timeout
        self._attempts = attempts
        self._worker_timeout = worker_timeout
        self._speeds = Speeds()
        self._planned: _Plan | None = None

    def gather(
        self,
        *,
        round: int,
        units: np.ndarray,
        costs: np.ndarray,
        clip_norm: float,
        parameters: ArrayRecord,
        settings: Mapping[str, float] | None = None,
        resolution: float = 0.0,
        unit_bound: float | None = None,
        next_units: np.ndarray | None = None,
        next_costs: np.ndarray | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Gathered:
        """The clipped sum over `units`.

        Args:
            round: Number of the round, from 0.
            units: int64 [n], all different; may be empty, and then nothing is sent.
            costs: float [n], at least 0: predicted cost of each unit (its tokens).
            clip_norm: Bound on one unit's update, as the client clips it.
            parameters: `parameters_record(flat)`, made anew for each round.
            settings: Further public values for the clients.
            resolution: 0, or the step of the fixed-point grid in exact mode (`fedsim.engine.exact`).
            unit_bound: Largest L2 norm of one unit's update as summed, if not clip_norm (per-block scales).
            next_units, next_costs: The next round's units and costs, if known already: each worker is told which of
                them it will be asked for, so that it can fetch their rows ahead.
            on_progress: Called with the number of units that each accepted reply stands for.

        Raises:
            InvalidInput: A unit occurs twice, or costs do not match units.
            RoundFailed: Some unit's update could not be had; says which workers failed and how.
        """
        units = np.ascontiguousarray(units, dtype=np.int64)
        if len(np.unique(units)) != len(units):
            raise InvalidInput("units", f"an array of {len(units)}", "all different", "A unit must be counted once.")
        if len(costs) != len(units):
            raise InvalidInput("costs", f"an array of {len(costs)}", f"as long as units ({len(units)})")
        request = TrainRequest(
            round=round,
            units=NO_UNITS,
            clip_norm=clip_norm,
            parameters=parameters,
            settings=dict(settings or {}),
            resolution=resolution,
        )
        costs = np.asarray(costs, dtype=np.float64)
        attempt = _Round(self, request, units, costs, clip_norm if unit_bound is None else unit_bound, on_progress)
        return attempt.run(next_units, next_costs)
