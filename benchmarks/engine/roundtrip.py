"""One worker and a large model: what a round trip costs against plain copies, in seconds and in memory."""

import os
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.engine.no_op import fedsim_app
from fedsim.clip import Clip
from fedsim.engine.messages import TrainRequest
from fedsim.engine.ray_grid import RayGrid
from server.dispatch import Dispatcher


def proportional_bytes(process_id: int) -> int:
    """Memory of a process, pages shared with n - 1 others counted as one n-th (the kernel's Pss)."""
    try:
        lines = Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def raylets() -> list[int]:
    """Processes that own Ray's shared memory, children of this one."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text.startswith("Name:\traylet\n"):
            found.append(int(status.parent.name))
    return found


class PeakMemory:
    """Watches the summed memory of some processes from a thread."""

    def __init__(self, process_ids: list[int]) -> None:
        self._process_ids = process_ids
        self.peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _now(self) -> int:
        return sum(proportional_bytes(process_id) for process_id in self._process_ids)

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.peak = max(self.peak, self._now())

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def copy_seconds(source: np.ndarray) -> float:
    """A plain copy into new memory."""
    began = time.perf_counter()
    source.copy()
    return time.perf_counter() - began


def round_trip(dispatcher: Dispatcher, flat: np.ndarray, round: int) -> tuple[np.ndarray, float]:
    """One round as a server runs it that keeps one copy of the model: the new model, seconds beyond compute."""
    request = TrainRequest(round=round, units=np.arange(10), clip=Clip(norm=1.0), parameters=flat)
    del flat  # the record's copy in shared memory is the model from here on
    began = time.perf_counter()
    gathered = dispatcher.gather(request, np.ones(10))
    seconds = time.perf_counter() - began - gathered.compute_seconds
    total = gathered.total
    total += request.parameters
    return total, seconds


def run(payload_bytes: int, rounds: int) -> dict[str, float]:
    """Seconds first, beside plain copies; then the same rounds again while memory is watched (which slows them)."""
    others = set(raylets())
    store = int(2.1 * payload_bytes) + (100 << 20)
    with RayGrid(fedsim_app, workers=1, object_store_bytes=store) as grid:
        watched = [os.getpid(), *grid.process_ids.values(), *(set(raylets()) - others)]
        dispatcher = Dispatcher(grid)
        flats = [np.random.default_rng(0).random(payload_bytes // 4, dtype=np.float32)]
        beyond, copies = [], []
        for round in range(rounds + 3):
            flat, seconds = round_trip(dispatcher, flats.pop(), round)
            beyond.append(seconds)
            copies.append(copy_seconds(flat))
            flats.append(flat)
            del flat
        memory = PeakMemory(watched)
        for round in range(2):
            flats.append(round_trip(dispatcher, flats.pop(), round)[0])
        memory.stop()
    # Page faults of the first rounds are not the steady state; both sides leave them out.
    beyond_warm, copy = float(np.median(beyond[3:])), float(np.median(copies[3:]))
    return {
        "payload_bytes": payload_bytes,
        "copy_seconds": copy,
        "beyond_compute_seconds": beyond_warm,
        "first_round_beyond_compute_seconds": beyond[0],
        "copies": beyond_warm / copy,
        "peak_bytes": memory.peak,
        "peak_models": memory.peak / payload_bytes,
    }
