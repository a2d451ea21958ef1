"""What a worker holds of a run whose workers form the sums: all parameters, and the optimizer of its own coordinates.

A round is two messages. The first asks for units' updates, as ever; their sum stays here. The second commits: the
workers add up each other's sums, each its own coordinates (reduce-scatter), noise them, take the step and share the
new parameters (all-gather). Nobody goes on with what a commit made before the server has heard that all of them have
the same: what it made lies beside what was there, and the next message says by its version which of the two stands.
So a worker that dies in between leaves the others a whole state, before the round or after it.

**Noise.** Noise is drawn only once the workers know among themselves that no part of the sum is missing. Where a
commit fails after that, what some of them had made is dropped where it was made: nobody but them has seen it, so
nothing was released, and the round's charge stands for the one release that follows. With exact sums that is the same
sum, whoever computed the units of a worker that is gone, and it gets the same noise. A sum of floats differs in its
last bits; the server gives it noise of its own (`Release.noise_key`), so that no two different sums are ever given the
same.

**Copies.** Each worker keeps the state of the worker before it, too, as it was after the same step: it costs the
memory and the way of one share of the optimizer's state, and one that dies takes nothing with it.
"""

import time
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch

from fedsim.config import OptimizerConfig
from fedsim.engine.collective import Peers
from fedsim.engine.kept import KeptParameters, KeptPart, KeptSum
from fedsim.engine.messages import TrainReply, TrainRequest
from fedsim.engine.shard_messages import PARAMETERS, CommitRequest, Committed, TakeRequest, TellRequest, Told
from fedsim.engine.totals import Expected
from fedsim.engine.work import Done, Work, on_host
from fedsim.errors import Failure
from fedsim.optimizer import ServerOptimizer
from fedsim.phases import NOISE, OPTIMIZER
from fedsim.release import CoordinateNoise

CHECKED = 1 << 26
"""Bytes whose checksum is taken at once."""


class NotHeld(Failure):
    """A message speaks of what this worker does not hold: it was started after the others, or they met anew."""


class OthersGone(Failure):
    """What workers do together has failed."""


class Trains(Protocol):
    """What computes the clipped sum of units: `clients.worker.Worker`, or a mock."""

    def train(self, request: Work) -> Done:
        """The clipped sum over the request's units."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """One version of what a worker holds.

    Attributes:
        kept: What it is called.
        parameters: All of them, float32 [P].
        optimizer: Of the worker's own coordinates.
        before: Of the worker before it: arrays of its state, by name.
    """

    kept: KeptParameters
    parameters: torch.Tensor
    optimizer: ServerOptimizer
    before: Mapping[str, torch.Tensor]


class Shard:
    """One worker's part; it holds nothing until it is told to take something."""

    def __init__(self) -> None:
        self._peers: Peers | None = None
        self._now: _State | None = None
        self._next: _State | None = None
        self._sums: dict[str, torch.Tensor] = {}

    def take(self, request: TakeRequest) -> Told:
        """Hold what the request brings, and meet the others; sums that it does not name are forgotten.

        Raises:
            RuntimeError: The others do not come. Then this worker holds no parameters, and its sums still.
        """
        self._now = self._next = None
        if self._peers is not None:
            self._peers.leave()
        self._sums = {name: total for name, total in self._sums.items() if name in request.parts}
        self._peers = peers = Peers(request.meeting, request.kept.size)
        whole = {name: array.numpy() for name, array in request.state.items()}
        parameters = torch.from_numpy(np.array(whole.pop(PARAMETERS)))
        optimizer = ServerOptimizer(
            parameters[peers.own].clone(), OptimizerConfig(**request.optimizer), request.rounds
        )
        optimizer.load_state({name: array[peers.own] if array.ndim else array for name, array in whole.items()})
        before = {
            name: torch.from_numpy(np.array(array[peers.before]))
            for name, array in whole.items()
            if array.ndim and peers.owners > 1
        }
        self._now = _State(kept=request.kept, parameters=parameters, optimizer=optimizer, before=before)
        return Told(parts=tuple(self._sums))

    def train(self, worker: Trains, request: TrainRequest) -> TrainReply:
        """The reply to a training request, whose sum stays here, checked as the server checks those that come to it.

        Raises:
            NotHeld: Other parameters than this worker has are meant.
            BadReply: The sum is none that so many clipped updates can have.
        """
        now = self._at(request.parameters)
        asked = {one.name: getattr(request, one.name) for one in fields(Work)}
        reply = TrainReply.of(worker.train(Work(**{**asked, "parameters": now.parameters})))
        values = on_host(reply.total)
        norm = Expected.of(request).check(values)
        name = uuid.uuid4().hex
        self._sums[name] = torch.from_numpy(values)
        part = KeptPart(name=name, units=reply.units, statistics=reply.statistics, norms=reply.norms)
        total = KeptSum(parts=(part,), size=now.kept.size, dtype=str(values.dtype), norm=norm)
        return replace(reply, total=total)

    def commit(self, request: CommitRequest) -> Committed:
        """The round's step, ready beside what is held: all workers do this at the same time.

        Raises:
            NotHeld: Other parameters are meant; or some part of the sum is nowhere, and nothing has been noised.
            OthersGone: Something failed here, or another worker is gone. Until it takes part in another meeting, this
                worker can do nothing together with others.
        """
        now = self._at(request.kept)
        assert self._peers is not None
        try:
            return self._committed(now, self._peers, request)
        except NotHeld:
            raise  # all of them found the same
        except Exception as failure:
            reason = f"{type(failure).__name__}: {failure}"
        self._peers.leave()  # so that those who wait for this worker give up, too
        raise OthersGone(f"the workers cannot commit together: {reason}")

    def _committed(self, now: _State, peers: Peers, request: CommitRequest) -> Committed:
        threads = torch.get_num_threads()
        parts = tuple(name for name in request.parts if name in self._sums)
        if (found := peers.sum_of(len(parts))) != len(request.parts):
            raise NotHeld(f"of {len(request.parts)} parts of the sum the workers hold {found}")
        dtype = {"int64": torch.int64, "float32": torch.float32}[request.dtype]
        total = peers.reduce_scatter([self._sums[name] for name in parts], dtype)
        began = time.perf_counter()
        mean = CoordinateNoise.from_values(request.noise).mean(total.numpy(), peers.own.start, threads)
        noised = time.perf_counter()
        optimizer = now.optimizer.copy()
        optimizer.step(mean)
        finite = optimizer.finite
        stepped = time.perf_counter()
        parameters = peers.all_gather(torch.from_numpy(optimizer.parameters))
        before = peers.passed_on(_arrays(optimizer))
        kept = replace(now.kept, version=now.kept.version + 1)
        self._next = _State(kept=kept, parameters=parameters, optimizer=optimizer, before=before)
        return Committed(
            parts=parts,
            checksum=_checksum(parameters.numpy()),
            finite=finite,
            square=float(np.square(mean, dtype=np.float64).sum()),
            seconds={NOISE: noised - began, OPTIMIZER: stepped - noised},
        )

    def tell(self, request: TellRequest) -> Told:
        """What this worker holds of its own coordinates, and of those of the worker before it.

        Raises:
            NotHeld: Other parameters are meant.
        """
        now, peers = self._at(request.kept), self._peers
        assert peers is not None

        def named(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: array for name, array in values.items() if not request.names or name in request.names}

        state, flat = now.optimizer.state(), now.parameters.numpy()
        before = {name: array.numpy() for name, array in now.before.items()}
        return Told(
            parts=tuple(self._sums),
            own=named({PARAMETERS: flat[peers.own], **state}),
            before=named({PARAMETERS: flat[peers.before], **before}) if request.before else {},
        )

    def _at(self, kept: KeptParameters) -> _State:
        """The version that a message speaks of; the other one is dropped, and with a step the sums that it took in."""
        if self._next is not None and self._next.kept == kept:
            self._now = self._next
            self._sums.clear()
        self._next = None
        if self._now is None or self._now.kept != kept:
            held = "nothing" if self._now is None else f"version {self._now.kept.version} of {self._now.kept.group}"
            raise NotHeld(f"asked for version {kept.version} of {kept.group}, this worker holds {held}")
        return self._now


def _arrays(optimizer: ServerOptimizer) -> dict[str, torch.Tensor]:
    """The state that each coordinate has a value of."""
    return {name: torch.from_numpy(array) for name, array in optimizer.state().items() if array.ndim}


def _checksum(values: np.ndarray) -> int:
    found, content = 0, values.data.cast("B")
    for start in range(0, len(content), CHECKED):
        found = zlib.crc32(content[start : start + CHECKED], found)
    return found
