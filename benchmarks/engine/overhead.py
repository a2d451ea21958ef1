"""Seconds of a round beyond its clients' computation, by cohort size and payload."""

import time
from collections.abc import Sequence

import numpy as np

from fedsim.clip import Clip
from fedsim.engine.grid import WaitingGrid
from fedsim.engine.messages import TrainRequest
from server.dispatch import Dispatcher

CLIP_NORM = 1.0


def round_seconds(grid: WaitingGrid, cohort: int, payload_bytes: int, rounds: int) -> dict[str, float]:
    """Medians over rounds of the whole round and of what lies beyond the busiest client's own seconds."""
    rng = np.random.default_rng(0)
    flat = rng.random(max(1, payload_bytes // 4), dtype=np.float32)
    dispatcher = Dispatcher(grid)
    whole, beyond = [], []
    # The first rounds touch shared memory for the first time: they are run, and left out.
    for round in range(rounds + 2):
        request = TrainRequest(
            round=round,
            units=rng.permutation(10 * cohort)[:cohort],
            clip=Clip(norm=CLIP_NORM),
            parameters=flat,
        )
        costs = rng.pareto(1.5, cohort) + 1
        began = time.perf_counter()
        gathered = dispatcher.gather(request, costs)
        whole.append(time.perf_counter() - began)
        beyond.append(whole[-1] - gathered.compute_seconds)
    return {"round": float(np.median(whole[2:])), "beyond_compute": float(np.median(beyond[2:]))}


def table(grid: WaitingGrid, cohorts: Sequence[int], payloads: Sequence[int], rounds: int) -> list[dict[str, float]]:
    """One row for each cohort size and payload; prints them as they come."""
    rows = []
    for payload in payloads:
        for cohort in cohorts:
            row = {"cohort": cohort, "payload_bytes": payload, **round_seconds(grid, cohort, payload, rounds)}
            rows.append(row)
            beyond = row["beyond_compute"] * 1e3
            print(f"  cohort {cohort:>6,}  payload {payload:>13,} B  {beyond:9.2f} ms beyond compute", flush=True)
    return rows
