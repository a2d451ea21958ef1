"""A few processes that form a group and do what they are told, all the same: gloo on a CPU."""

import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

PATIENCE = 300.0
"""Seconds that the processes get for one call."""


class Told(Exception):
    """What a process of the group raised."""


class Group:
    """Processes 0 … ranks − 1 of one torch process group.

    Args:
        ranks: How many.
    """

    def __init__(self, ranks: int) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        meeting = str(Path(self._folder.name) / "meeting")
        pipes = [context.Pipe() for _ in range(ranks)]
        self.processes = [
            context.Process(target=_serve, args=(rank, ranks, meeting, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()
        self._pipes: list[Connection] = [ours for ours, _ in pipes]

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(rank, *args) in each process; results by rank, with exceptions (`Told`) among them as values.

        A process that does not answer in time fails the test; one that ended gives an EOFError.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        return [self._received(pipe) for pipe in self._pipes]

    @staticmethod
    def _received(pipe: Connection) -> Any:
        assert pipe.poll(PATIENCE), "a process of the group does not answer"
        try:
            return pipe.recv()
        except EOFError as gone:
            return gone

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, ranks: int, meeting: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(function(rank, *args))
        except Exception as error:
            pipe.send(Told(f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
