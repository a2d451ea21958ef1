"""The same no-op round on stock Flower's simulation engine.

Runs as `python -m benchmarks.engine.stock_flower COHORT BYTES ROUNDS`, a process of its own because Flower starts and
ends Ray, and prints one line: RESULT and the seconds of each round.
"""

import json
import os
import subprocess
import sys
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from benchmarks.engine.no_op import stock_app


def rounds_on(grid: Grid, cohort: int, payload_bytes: int, rounds: int) -> list[float]:
    """Seconds of each round: every user gets the model and sends an update, and the updates are summed."""
    flat = np.random.default_rng(0).random(max(1, payload_bytes // 4), dtype=np.float32)
    while len(list(grid.get_node_ids())) < cohort:
        time.sleep(0.1)  # virtual nodes register one by one
    seconds = []
    for round in range(rounds):
        began = time.perf_counter()
        record = ArrayRecord({"flat": Array(flat)})
        content = RecordDict({"parameters": record})
        nodes = list(grid.get_node_ids())[:cohort]
        messages = [Message(content, node, "train", group_id=str(round)) for node in nodes]
        total = np.zeros_like(flat)
        replies = 0
        for reply in grid.send_and_receive(messages):
            total += reply.content["update"]["flat"].numpy()  # type: ignore[index,union-attr]
            replies += 1
        if replies != cohort:
            raise RuntimeError(f"{replies} of {cohort} replies came")
        seconds.append(time.perf_counter() - began)
    return seconds


def main(cohort: int, payload_bytes: int, rounds: int) -> None:
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        print("RESULT", json.dumps(rounds_on(grid, cohort, payload_bytes, rounds)), flush=True)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, stock_app, cohort, backend_config=resources)  # type: ignore[arg-type]


def measure(cohort: int, payload_bytes: int, rounds: int) -> float:
    """Median seconds of a round on stock Flower, the first round (which starts its actors) left out."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine.stock_flower", str(cohort), str(payload_bytes), str(rounds + 1)],
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return float(np.median(json.loads(line.removeprefix("RESULT "))[1:]))
    raise RuntimeError(f"stock Flower did not finish:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
