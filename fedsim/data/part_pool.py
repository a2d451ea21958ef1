"""Parts of the data made side by side: by processes of their own where the tokenizer can be sent to them."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from queue import SimpleQueue
from typing import Any

from fedsim.data.machine import cores, memory_bytes
from fedsim.data.part import PartWriter
from fedsim.data.records import Records
from fedsim.errors import Failure

PROCESS_BYTES = 250_000_000
"""Memory of a process that makes parts, and of the parts on their way to it."""
GONE = (
    "A process that encoded text has ended, perhaps for want of memory. The same command goes on where it stopped, "
    "with a smaller --data.memory-limit in fewer processes."
)
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class PartPool:
    """Makes parts, as many at a time as there are cores and memory for.

    The first part is made here, where small data ends; processes are started for the second. They run a module of
    ours, and so need neither a guarded main module (as spawned pools do) nor a fork of a process that may have
    threads. Where the tokenizer cannot be sent to them, or is another one there, all parts are made here.
    """

    def __init__(self, writer: PartWriter):
        self._writer = writer
        self._processes = max(1, min(cores(), memory_bytes(writer.config.memory_limit) // PROCESS_BYTES))
        self._made = 0
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        self._stack = ExitStack()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> "PartPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def most_waiting(self) -> int:
        """Parts that may be asked for before the first of them is done: one a process, and one to go on with."""
        return self._processes + 1 if self._threads else 0

    def write(self, number: int, first: int, part: list[Records]) -> "Future[dict[str, Any]]":
        """Make a part; see `PartWriter.write`."""
        self._made += 1
        if self._made == 2 and self._processes > 1:
            self._start()
        if self._threads is not None:
            return self._threads.submit(self._elsewhere, number, first, part)
        done: Future[dict[str, Any]] = Future()
        done.set_result(self._writer.write(number, first, part))
        return done

    def _start(self) -> None:
        try:
            sent = pickle.dumps(self._writer)
        except Exception:  # whatever a tokenizer of somebody's own raises
            return
        with ExitStack() as started:
            processes = [started.enter_context(_Process(sent)) for _ in range(self._processes)]
            if not all(process.is_ready(self._writer.encoder.fingerprint) for process in processes):
                return
            for process in processes:
                self._idle.put(process)
            self._stack = started.pop_all()
        self._threads = self._stack.enter_context(ThreadPoolExecutor(self._processes))
        self._stack.callback(self._threads.shutdown, cancel_futures=True)

    def _elsewhere(self, number: int, first: int, part: list[Records]) -> dict[str, Any]:
        process = self._idle.get()
        try:
            found: dict[str, Any] = process.ask(pickle.dumps((number, first, part)))
            return found
        finally:
            self._idle.put(process)


class _Process:
    """One process that makes parts."""

    def __init__(self, writer: bytes):
        paths = [path or os.getcwd() for path in sys.path]  # modules are found there as they are here
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fedsim.data.part_process", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._asked, self._answers = self._process.stdin, self._process.stdout
        self._writer = writer

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        for pipe in (self._asked, self._answers):
            with suppress(BrokenPipeError):  # of what it had not read yet
                pipe.close()
        self._process.wait()

    def is_ready(self, fingerprint: str) -> bool:
        """Whether it has a tokenizer that encodes as the one with this fingerprint."""
        try:
            return bool(self.ask(self._writer) == fingerprint)
        except Exception:  # it could not be read there, for whatever reason
            return False

    def ask(self, pickled: bytes) -> Any:
        """Its answer.

        Raises:
            Exception: Whatever was raised there.
            Failure: It is gone.
        """
        try:
            self._asked.write(pickled)
            self._asked.flush()
            answer = pickle.load(self._answers)
        except (BrokenPipeError, EOFError):
            raise Failure(GONE) from None
        if isinstance(answer, Exception):
            raise answer
        return answer
