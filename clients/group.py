"""A worker that is a group of processes, a device each: the process that leads them and answers for them."""

import dataclasses
import multiprocessing.connection
import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch.multiprocessing as mp

from clients.member import Memory, serve
from clients.worker import as_tensor
from fedsim.config import RunConfig
from fedsim.engine.same_inputs import InputsDiffer
from fedsim.engine.work import Done, HeldOutDone, HeldOutWork, Work
from fedsim.errors import Failure, InvalidInput

NO_PARAMETERS = np.zeros(0, dtype=np.float32)
MOMENT = 2.0
"""Seconds that a process which ended gets to be seen as such, when another one tells that it waited in vain."""


class Group:
    """Answers as a `Worker` does, by processes that hold a shard of the model each (`clients.member`).

    This process holds no model and is not one of the group: it hands on what is asked, with the parameters in shared
    memory, and takes the sum from there. A group of which a process fails or ends is ended whole; the message fails
    with the reason, and the next one is answered by a group made anew. Nothing is lost by that: what the message asked
    for is asked again, of this worker or another.

    Args:
        config: The run's; `engine.devices_per_worker` says how many processes.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._standing: _Processes | None = None

    def train(self, request: Work) -> Done:
        """As `Worker.train`. The total is a view of memory that the next message writes to.

        Raises:
            InputsDiffer: As there.
            InvalidInput: The model cannot be sharded.
            Failure: A process of the group failed or ended.
        """
        started = time.perf_counter()
        plain = {one.name: getattr(request, one.name) for one in dataclasses.fields(Work)}
        answers, memory = self._asked("train", request, Work(**plain | {"parameters": NO_PARAMETERS}))
        first: Done = answers[0]
        peak = max(answer.statistics["memory_bytes"] for answer in answers)
        costs = {"memory_bytes": peak, "seconds": time.perf_counter() - started}
        total = memory.total_of(bool(request.resolution)).numpy()
        return dataclasses.replace(first, total=total, statistics=first.statistics | costs)

    def evaluate(self, request: HeldOutWork) -> HeldOutDone:
        """As `Worker.evaluate`.

        Raises:
            InputsDiffer, InvalidInput, Failure: As for train.
        """
        plain = {one.name: getattr(request, one.name) for one in dataclasses.fields(HeldOutWork)}
        answers, _ = self._asked("evaluate", request, HeldOutWork(**plain | {"parameters": NO_PARAMETERS}))
        return HeldOutDone(
            rows=request.rows,
            loss_sum=np.sum([answer.loss_sum for answer in answers], axis=0),
            label_count=np.sum([answer.label_count for answer in answers], axis=0),
            correct=np.sum([answer.correct for answer in answers], axis=0),
        )

    def work(self, max_tokens: int) -> int:
        """As `Worker.work`."""
        answers, _ = self._asked("work", None, max_tokens)
        tokens: int = answers[0]
        return tokens

    @property
    def process_ids(self) -> list[int]:
        """Of the group's processes, where it stands."""
        return [] if self._standing is None else [process.pid for process in self._standing.processes]

    def close(self) -> None:
        """End the group's processes."""
        if self._standing is not None:
            self._standing.end()
            self._standing = None

    def _asked(self, name: str, request: Work | HeldOutWork | None, asked: Any) -> tuple[list[Any], Memory]:
        """What each process answers to the same question, and the memory that they share."""
        try:
            if self._standing is None:
                self._standing = _Processes(self.config)
            if request is not None:
                self._standing.memory.parameters.copy_(as_tensor(request.parameters))
            return self._standing.asked(name, asked), self._standing.memory
        except InputsDiffer:
            raise
        except BaseException:
            self.close()
            raise


class _Processes:
    """A group that stands: started, with memory shared.

    Raises:
        InvalidInput, Failure: A process could not start, with its reason.
    """

    def __init__(self, config: RunConfig) -> None:
        ranks = config.engine.devices_per_worker
        context = mp.get_context("spawn")
        self.processes: list[Any] = []
        self._pipes: list[Connection] = []
        try:
            with tempfile.TemporaryDirectory() as folder:
                for rank in range(ranks):
                    ours, theirs = context.Pipe()
                    arguments = (os.getpid(), rank, ranks, str(Path(folder) / "meeting"), config, theirs)
                    process = context.Process(target=serve, args=arguments, daemon=True)
                    process.start()
                    theirs.close()
                    self.processes.append(process)
                    self._pipes.append(ours)
                size: int = self._answers()[0]
            self.memory = Memory.of(size, config.engine.exact)
            for pipe in self._pipes:
                pipe.send(self.memory)
        except BaseException:
            self.end()
            raise

    def asked(self, name: str, asked: Any) -> list[Any]:
        """What each process answers, by rank."""
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send((name, asked))
            except OSError as gone:
                raise self._failed(rank) from gone
        return self._answers()

    def _answers(self) -> list[Any]:
        waiting, answers = dict(zip(self._pipes, range(len(self._pipes)), strict=True)), {}
        refusals: list[InputsDiffer] = []
        while waiting:
            for pipe in multiprocessing.connection.wait(list(waiting)):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    kind, answers[rank] = pipe.recv()
                except (EOFError, OSError) as gone:
                    raise self._failed(rank) from gone
                if kind == "failed":
                    raise self._failed(rank, answers[rank])
                if kind == "refused":
                    refusals.append(answers[rank])
        if refusals:
            raise refusals[0]
        return [answers[rank] for rank in range(len(self._pipes))]

    def _failed(self, rank: int, told: Exception | None = None) -> Exception:
        """Why the group is of no more use: of one process that ends all others tell that they waited in vain."""
        reasons = [] if told is None else [f"process {rank}: {told}"]
        until = time.monotonic() + MOMENT
        while time.monotonic() < until and not isinstance(told, InvalidInput):
            for number, process in enumerate(self.processes):
                if process.exitcode:
                    return Failure(
                        f"process {number} of a group of {len(self.processes)} ended (exit code {process.exitcode})"
                    )
            for number, pipe in enumerate(self._pipes):
                told = self._told_by(pipe) if number != rank else None
                if told is not None:
                    reasons.append(f"process {number}: {told}")
            time.sleep(MOMENT / 20)
        if isinstance(told, InvalidInput):
            return told
        reason = "; ".join(reasons) or f"process {rank} is gone"
        return Failure(f"a group of {len(self.processes)} processes failed: {reason}")

    @staticmethod
    def _told_by(pipe: Connection) -> Exception | None:
        """The failure that a process tells of by now."""
        try:
            kind, answer = pipe.recv() if pipe.poll() else ("", None)
        except (EOFError, OSError):
            return None
        return answer if kind == "failed" else None

    def end(self) -> None:
        """End all processes, whatever they are waiting for."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
