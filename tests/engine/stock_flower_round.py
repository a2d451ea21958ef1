"""A program for test_stock_flower.py: rounds of mock clients on Flower's own simulation engine, not on one of ours."""

import json
import sys

import numpy as np
import ray
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from mock_clients import CLIP, app, known_sum, request_for

from fedsim.engine.exact import dequantise, resolution_for
from fedsim.engine.grid import WaitingGrid
from server.dispatch import Dispatcher

server = ServerApp()
UNITS = np.arange(60) * 3


@server.main()
def main(grid: Grid, context: Context) -> None:
    results = []
    for round, units_per_message in enumerate([None, 7]):
        request = request_for(UNITS, round=round, size=50_000, next_units=UNITS[:5])
        gathered = Dispatcher(grid, units_per_message=units_per_message).gather(request, np.ones(60))
        right = bool(np.array_equal(gathered.total, known_sum(UNITS, round, 50_000)))
        results.append({"right": right, "messages": gathered.messages})
    resolution = resolution_for(CLIP, 500)
    exact = Dispatcher(grid).gather(request_for(UNITS, size=200, resolution=resolution), np.ones(60))
    right = bool(np.array_equal(dequantise(exact.total, resolution), known_sum(UNITS, 0, 200)))
    results.append({"right": right, "messages": exact.messages})
    nodes = len(ray.nodes())  # type: ignore[no-untyped-call]
    print("RESULT", json.dumps({"ours": isinstance(grid, WaitingGrid), "rounds": results, "nodes": nodes}), flush=True)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    run_simulation(server, app, 3, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
