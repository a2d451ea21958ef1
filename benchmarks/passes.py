"""What the passes of a work take, one after the other: seconds, and memory of the process and of those it starts."""

import os
import resource
import threading
import time
from contextlib import suppress
from pathlib import Path

SECONDS_BETWEEN_LOOKS = 0.05
RESET_PEAK = "5"
"""What /proc/self/clear_refs takes for: forget how much memory this process had at most."""


class Passes:
    """Seconds, processor seconds and most memory of each pass of a work, of this process and its children together."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self._name, self._most, self._began = "", 0, (0.0, 0.0)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Passes":
        self._watch.start()
        self.begin("Beginning")
        return self

    def __exit__(self, *_: object) -> None:
        self.begin("")
        self._ended.set()
        self._watch.join()

    def begin(self, name: str) -> None:
        """A pass has begun, unless it is the one that runs; the one before it has ended."""
        if name == self._name:
            return
        with self._lock:
            now = (time.perf_counter(), _processor_seconds())
            if self._name:
                most = max(self._most, _status(os.getpid(), "VmHWM"))
                self.found[self._name] = {
                    "seconds": now[0] - self._began[0],
                    "processor_seconds": now[1] - self._began[1],
                    "peak_mib": most / 2**20,
                }
            Path("/proc/self/clear_refs").write_text(RESET_PEAK)
            self._name, self._most, self._began = name, 0, now

    def _look(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_LOOKS):
            now = sum(_status(process, "VmRSS") for process in (os.getpid(), *_children()))
            with self._lock:
                self._most = max(self._most, now)


def _children() -> list[int]:
    found: list[int] = []
    for file in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # of a thread that has ended meanwhile
            found += map(int, file.read_text().split())
    return found


def _status(process: int, field: str) -> int:
    """Bytes that the kernel says of a process; 0 of one that is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    return 0


def _processor_seconds() -> float:
    """Of this process, and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
