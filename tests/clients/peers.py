"""Processes that hold shards, without Flower or Ray: each does one thing after another as the test says."""

import multiprocessing
import os
import queue
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from clients.shard import Shard
from fedsim.clip import Clip
from fedsim.config import OptimizerConfig
from fedsim.engine.arrays import array_record
from fedsim.engine.collective import Meeting, Peers, Rendezvous
from fedsim.engine.exact import quantise
from fedsim.engine.kept import KeptParameters
from fedsim.engine.messages import TrainRequest
from fedsim.engine.shard_messages import PARAMETERS, TakeRequest, TellRequest
from fedsim.engine.work import Done, Work

CLIP = Clip(norm=1.0)
ROUNDS = 12
SECONDS = 60.0


def update_of(unit: int, round: int, size: int) -> np.ndarray:
    """A unit's update, float32 [size], of length a little below 1: what one coordinate has in no grid."""
    values = np.random.default_rng([unit, round]).standard_normal(size, dtype=np.float32)
    return values / np.float32(1.01 * np.linalg.norm(values))


class Known:
    """A worker whose units' updates are known."""

    def train(self, request: Work) -> Done:
        size = len(request.parameters)
        total = torch.zeros(size, dtype=torch.int64 if request.resolution else torch.float32)
        for unit in request.units.tolist():
            update = update_of(unit, request.round, size)
            if request.resolution:
                update = quantise(update, request.clip, {"all": size}, request.resolution)
            total += torch.from_numpy(update)
        return Done(
            round=request.round, units=request.units, total=total, statistics={"rows": float(len(request.units))}
        )


def whole_sum(units: np.ndarray, round: int, size: int, resolution: float) -> np.ndarray:
    """What one process makes of all units."""
    work = Work(round=round, units=units, clip=CLIP, parameters=torch.zeros(size), resolution=resolution)
    total: np.ndarray = Known().train(work).total.numpy()
    return total


def _serve(asked: Any, answered: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    shard = Shard()
    while True:
        name, arguments = asked.get()
        if name == "die in":
            setattr(Peers, arguments[0], lambda *_: os._exit(1))
            continue
        try:
            answered.put(getattr(shard, name)(*arguments))
        except Exception as failure:  # a process that failed answers like one that did not
            answered.put(f"{type(failure).__name__}: {failure}")


class Processes:
    """Some processes with a shard each, numbered from 0."""

    def __init__(self, count: int, threads: Sequence[int] = ()) -> None:
        context = multiprocessing.get_context("forkserver")
        # What all of them import, once; this module's folder is not on the server's path.
        context.set_forkserver_preload(["clients.shard", "torch._dynamo"])
        self._ends = [(context.Queue(), context.Queue()) for _ in range(count)]
        self.processes = [
            context.Process(target=_serve, args=(*ends, (threads or [1] * count)[number]), daemon=True)
            for number, ends in enumerate(self._ends)
        ]
        for process in self.processes:
            process.start()
        self._rendezvous: Rendezvous | None = None

    def begin(self, number: int, name: str, *arguments: Any) -> None:
        """Ask one for something, and do not wait."""
        self._ends[number][0].put((name, arguments))

    def end(self, number: int) -> Any:
        """Its answer; an exception as text, and None of a process that is gone."""
        while True:
            try:
                return self._ends[number][1].get(timeout=0.2)
            except queue.Empty:
                if not self.processes[number].is_alive():
                    return None

    def ask(self, numbers: Sequence[int], name: str, *arguments: Any) -> list[Any]:
        """What each of these answers to the same, at the same time."""
        for number in numbers:
            self.begin(number, name, *arguments)
        return [self.end(number) for number in numbers]

    def take(
        self,
        numbers: Sequence[int],
        state: dict[str, np.ndarray],
        optimizer: OptimizerConfig,
        version: int = 0,
        parts: tuple[str, ...] = (),
    ) -> KeptParameters:
        """Let these hold a state together; returns what it is called."""
        self._rendezvous = Rendezvous("127.0.0.1", SECONDS)
        kept = KeptParameters(group=uuid.uuid4().hex, version=version, size=len(state[PARAMETERS]))
        for rank, number in enumerate(numbers):
            meeting = Meeting(
                host="127.0.0.1",
                port=self._rendezvous.port,
                name=kept.group,
                rank=rank,
                owners=len(numbers),
                seconds=SECONDS,
            )
            request = TakeRequest(
                kept=kept,
                meeting=meeting,
                optimizer=asdict(optimizer),
                rounds=ROUNDS,
                parts=parts,
                state=array_record(**state),
            )
            self.begin(number, "take", request)
        answers = [self.end(number) for number in numbers]
        assert not any(isinstance(answer, str) or answer is None for answer in answers), answers
        return kept

    def train(
        self, number: int, kept: KeptParameters, units: np.ndarray, round: int, resolution: float
    ) -> tuple[str, ...]:
        """The names of what one then keeps."""
        request = TrainRequest(round=round, units=units, clip=CLIP, parameters=kept, resolution=resolution)
        (reply,) = self.ask([number], "train", Known(), request)
        assert not isinstance(reply, str), reply
        names: tuple[str, ...] = reply.total.names
        return names

    def state(self, numbers: Sequence[int], kept: KeptParameters) -> dict[str, np.ndarray]:
        """All of what they hold, put together."""
        told = self.ask(numbers, "tell", TellRequest(kept=kept))
        return {
            name: np.concatenate([one.own[name] for one in told]) if value.ndim else value
            for name, value in told[0].own.items()
        }

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def processes(count: int, threads: Sequence[int] = ()) -> Iterator[Processes]:
    started = Processes(count, threads)
    try:
        yield started
    finally:
        started.close()
