"""One process of a worker that is a group: it holds a shard of the model, and computes in step with the others."""

import os
import socket
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from clients.worker import Result, Worker
from fedsim.clip import Clip
from fedsim.config import RunConfig
from fedsim.engine.exact import quantiser
from fedsim.engine.same_inputs import InputsDiffer
from fedsim.engine.work import Vector, Work
from fedsim.errors import Failure, InvalidInput
from fedsim.gradients import ClippedSum, random_rows
from fedsim.gradients.sharded.model import ShardedModel
from fedsim.gradients.sharded.sums import sharded_sum
from fedsim.models.evaluate import EvaluationByUnit, evaluate_rows
from fedsim.plan import Plan
from fedsim.rows import TokenRows

ORPHANED_AFTER = 1.0
"""Seconds between two looks whether the process that started this one is still there."""


@dataclass(frozen=True)
class Memory:
    """What a group's processes share with the one that leads them.

    Attributes:
        parameters: float32 [P], as the message says.
        total: Room for the sum, uint8 [P · 4], or [P · 8] where sums are exact; each process writes its part.
    """

    parameters: torch.Tensor
    total: torch.Tensor

    @classmethod
    def of(cls, size: int, exact: bool) -> "Memory":
        """For so many parameters."""
        parameters = torch.zeros(size, dtype=torch.float32).share_memory_()  # type: ignore[no-untyped-call]
        return cls(parameters, torch.zeros(size * (8 if exact else 4), dtype=torch.uint8).share_memory_())  # type: ignore[no-untyped-call]

    def total_of(self, exact: bool) -> torch.Tensor:
        """The sum: int64 [P] where it is exact, else float32 [P]."""
        wanted = torch.int64 if exact else torch.float32
        return self.total[: len(self.parameters) * wanted.itemsize].view(wanted)


class Member(Worker):
    """A worker whose model is sharded over a group of processes, all of which are asked for the same.

    Sums are written to the shared memory, each process its part. Of evaluations each has some rows, and zeros
    elsewhere.
    """

    memory: Memory

    def _placed(self, model: torch.nn.Module) -> torch.nn.Module:
        self.sharded = ShardedModel(model, self.objective, self.device)
        return self.sharded.model

    def _load(self, parameters: Vector) -> None:
        self.sharded.load(self.memory.parameters)

    def _clipped(
        self, plan: Plan, request: Work, rows: TokenRows, unit_ids: np.ndarray, max_tokens: int | None
    ) -> ClippedSum:
        return self._summed(plan, request, rows, unit_ids, max_tokens, method=self.computing.gradients)

    def _exact(
        self, plan: Plan, request: Work, rows: TokenRows, unit_ids: np.ndarray, max_tokens: int | None
    ) -> ClippedSum:
        on_grid = partial(quantiser, clip=request.clip, resolution=request.resolution)
        return self._summed(plan, request, rows, unit_ids, max_tokens, on_grid=on_grid)

    def _summed(
        self,
        plan: Plan,
        request: Work,
        rows: TokenRows,
        unit_ids: np.ndarray,
        max_tokens: int | None,
        **how: Any,
    ) -> ClippedSum:
        if plan.local_descent is not None:
            hint = "After a local step each user would have a whole model of its own."
            raise InvalidInput("plan.local-steps", plan.local_descent[0], "1 for a group of devices", hint)
        found = sharded_sum(
            self.sharded,
            rows,
            unit_ids,
            request.clip,
            weighting=plan.weighting,
            max_tokens=max_tokens,
            autocast=self._autocast,
            **how,
        )
        found.total.write_to(self.memory.total_of(bool(request.resolution)))
        nothing = torch.zeros(0)  # of the total, which lies in the shared memory
        return ClippedSum(total=nothing, norms=found.norms, losses=found.losses, finite=found.finite)

    def _nothing(self, request: Work) -> ClippedSum:
        if self.sharded.rank == 0:
            self.memory.total.zero_()
        return super()._nothing(request)

    def _delivered(self, result: ClippedSum, request: Work) -> Vector:
        return np.zeros(0, np.float32)

    def _evaluated(self, rows: TokenRows, tokens: int | None) -> EvaluationByUnit:
        with self.sharded.gathered() as model:
            return evaluate_rows(
                model,
                rows,
                self.objective,
                max_tokens=tokens,
                device=self.device,
                autocast=self._autocast,
                turn=(self.sharded.rank, self.sharded.ranks),
            )

    def work(self, max_tokens: int) -> int:
        """As `Worker.work`, of as many rows as the group has processes, at least."""
        length = self.computing.row_tokens
        count = max(self.sharded.ranks, max_tokens // length)
        rows = random_rows(self.objective, count, length, self.vocabulary)
        common: dict[str, Any] = {"max_tokens": max(max_tokens, length), "autocast": self._autocast}
        method = "reference" if self.computing.exact else self.computing.gradients
        found = sharded_sum(self.sharded, rows, np.arange(count), Clip(norm=1.0), method=method, **common)
        if not bool(found.finite.any()):
            raise Failure("no gradient of random tokens is finite: look at the model's weights and --engine.precision")
        return len(rows.tokens)

    def _with_memory_left(self, compute: Callable[[int | None], Result]) -> Result:
        try:
            return compute(self.max_tokens)
        except torch.OutOfMemoryError as error:
            raise Failure(
                f"A micro-batch does not fit into the memory of {self.device}; the devices of a group keep in step, "
                "so that none can go on with a smaller one. Set --engine.max-tokens to fewer."
            ) from error


def serve(leader: int, rank: int, ranks: int, meeting: str, config: RunConfig, pipe: Connection) -> None:
    """The life of a member: it says how many parameters there are, is given memory, and answers what it is asked.

    Whatever it raises it hands on and ends, for the others wait for it in vain, unless all of them refuse alike.

    Args:
        leader: The process that started it, with which it ends.
        rank, ranks: Its place in the group, and how many there are.
        meeting: A file that does not exist yet, where they find each other.
        config: The run's.
        pipe: To the leader.
    """
    threading.Thread(target=_end_with, args=(leader,), daemon=True).start()
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing is added to what heads return
    torch.set_num_threads(config.engine.cpus_per_worker)
    try:
        device = _joined(rank, ranks, meeting)
        member = Member.of(config, device)
        pipe.send(("done", member.layout.size))
        member.memory = pipe.recv()
        while True:
            name, asked = pipe.recv()
            try:
                pipe.send(("done", getattr(member, name)(asked)))
            except InputsDiffer as refusal:
                pipe.send(("refused", refusal))
    except (EOFError, BrokenPipeError):
        pass  # nobody leads any more
    except BaseException as error:
        told = isinstance(error, (InvalidInput, Failure))
        pipe.send(("failed", error if told else Failure(f"{type(error).__name__}: {error}")))
    os._exit(0)  # at once: whoever waits for this process in a collective hears of it


def _end_with(leader: int) -> None:
    """End this process when the one that started it is gone, whatever it is waiting for."""
    while os.getppid() == leader:
        time.sleep(ORPHANED_AFTER)
    os._exit(1)


def _joined(rank: int, ranks: int, meeting: str) -> torch.device:
    """The device of this process, which is now one of the group."""
    if torch.cuda.is_available():
        if torch.cuda.device_count() < ranks:
            allowed = f"at most the {torch.cuda.device_count()} GPUs that a worker is given"
            raise InvalidInput("engine.devices-per-worker", ranks, allowed)
        device, backend = torch.device("cuda", rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])  # a group is on one machine
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    return device
