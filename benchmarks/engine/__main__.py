"""`python -m benchmarks.engine`: what a round costs beyond its computation, against stock Flower and pfl-research.

Ends with one JSON line. Timings are medians, and rivals run right before or after what they are compared with; on a
busy machine trust the ratios.
"""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

# One thread for every side, set before any library reads it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import sys

import numpy as np
import torch

from benchmarks.command_line import run_benchmark
from benchmarks.engine import overhead, pfl_environment, products_alone, roundtrip, stock_flower
from benchmarks.engine.no_op import fedsim_app
from benchmarks.engine.our_rounds import client_app, make_opt, opt_parameter
from benchmarks.engine.our_rounds import measure as measure_ours
from benchmarks.engine.small_task import Task
from fedsim.engine.local import LocalGrid
from fedsim.engine.ray_grid import RayGrid

STAGES = ("overhead", "stock", "pfl", "roundtrip")


@dataclass(frozen=True)
class Benchmark:
    """Measure the engine."""

    stages: tuple[str, ...] = STAGES
    """Which parts to run: overhead, stock (Flower), pfl (pfl-research), roundtrip (one large model)."""
    cohorts: tuple[int, ...] = (10, 100, 1000, 10_000)
    """Cohort sizes of the overhead table."""
    payloads: tuple[int, ...] = (1_000, 4_000_000, 64_000_000)
    """Bytes of model and update in the overhead table."""
    rounds: int = 9
    """Rounds that each median is over."""
    workers: int = 2
    """Ray actors of the overhead table."""
    stock_cohorts: tuple[int, ...] = (1_000, 100)
    """Users of stock Flower's rounds, one message each; one entry for each payload below."""
    stock_payloads: tuple[int, ...] = (1_000, 4_000_000)
    """Bytes of model and update in stock Flower's rounds."""
    stock_rounds: int = 2
    """Rounds of stock Flower after the first."""
    pfl_sentences: tuple[int, ...] = (16,)
    """Sentences of a user at most in the small training task; one entry for each run of it."""
    pfl_cohort: int = 100
    """Users of a round of it."""
    pfl_rounds: int = 4
    """Rounds of the small training task, of which the first is not counted."""
    pfl_repeats: int = 3
    """How often each side trains it, in turns."""
    pfl_processes: tuple[int, ...] = (1, 2)
    """Numbers of processes to compare at."""
    roundtrip_bytes: int = 1_400_000_000
    """Size of the large model; 1.4 GB is 350M parameters in float32."""
    roundtrip_rounds: int = 5
    """Round trips after the first three."""
    cache: Path = Path.home() / ".cache" / "fedsim"
    """Where pfl-research's environment is kept."""

    def run(self) -> None:
        result: dict[str, object] = {"benchmark": "engine", "cores": os.cpu_count()}
        if "overhead" in self.stages:
            result["overhead"] = self._overhead()
        if "stock" in self.stages:
            result["stock_flower"] = self._stock()
        if "pfl" in self.stages:
            tasks = [Task(most_sentences=most, cohort=self.pfl_cohort) for most in self.pfl_sentences]
            result["pfl_research"] = [self._pfl(task, n) for task in tasks for n in self.pfl_processes]
        if "roundtrip" in self.stages:
            result["roundtrip"] = self._roundtrip()
        print(json.dumps(result))

    def _overhead(self) -> list[dict[str, float]]:
        print(f"Rounds of no-op clients on {self.workers} Ray actors:", flush=True)
        with RayGrid(fedsim_app, workers=self.workers) as grid:
            return overhead.table(grid, self.cohorts, self.payloads, self.rounds)

    def _stock(self) -> list[dict[str, float]]:
        print("The same on stock Flower, one user a message:", flush=True)
        rows = []
        for cohort, payload in zip(self.stock_cohorts, self.stock_payloads, strict=True):
            with RayGrid(fedsim_app, workers=self.workers) as grid:
                ours = overhead.round_seconds(grid, cohort, payload, self.rounds)["round"]
            theirs = stock_flower.measure(cohort, payload, self.stock_rounds)
            rows.append(
                {
                    "cohort": cohort,
                    "payload_bytes": payload,
                    "fedsim_seconds": ours,
                    "stock_seconds": theirs,
                    "times_faster": theirs / ours,
                }
            )
            print(
                f"  cohort {cohort:,}, {payload:,} B: stock {theirs:.3f} s, fedsim {ours:.4f} s, {theirs / ours:.0f}×"
            )
        return rows

    def _pfl(self, task: Task, processes: int) -> dict[str, float]:
        print(f"Users of {task.most_sentences} sentences at most, {processes} process(es):", flush=True)
        torch.set_num_threads(1)
        theirs, ours = [], []
        for _ in range(self.pfl_repeats):  # in turns, so that both meet the same other work on the machine
            seconds, their_step = pfl_environment.rounds(self.cache, task, self.pfl_rounds, processes)
            theirs.append(seconds[1:])
            app = functools.partial(client_app, task)
            with LocalGrid(app) if processes == 1 else RayGrid(app, workers=processes) as grid:
                seconds, our_step = measure_ours(grid, task, self.pfl_rounds)
            ours.append(seconds[1:])
        start = {name: value.detach().numpy() for name, value in make_opt(task).named_parameters()}
        expected = {name: opt_parameter(name, their_step) for name in start}
        apart = sum(float(np.square(our_step[name] - expected[name]).sum()) for name in start) ** 0.5
        moved = sum(float(np.square(expected[name] - start[name]).sum()) for name in start) ** 0.5
        (their_wall, their_cpu), (our_wall, our_cpu) = (np.median(np.concatenate(x), axis=0) for x in (theirs, ours))
        row = {
            "most_sentences": task.most_sentences,
            "processes": processes,
            "pfl_users_per_second": task.cohort / their_wall,
            "fedsim_users_per_second": task.cohort / our_wall,
            "times_faster": their_wall / our_wall,
            "pfl_processor_ms_per_user": 1e3 * their_cpu * processes / task.cohort,
            "fedsim_processor_ms_per_user": 1e3 * our_cpu / task.cohort,
            "times_less_processor_time": their_cpu * processes / our_cpu,
            "products_alone_processor_ms_per_user": 1e3 * products_alone.seconds_per_user(task),
            "relative_difference_of_the_first_step": apart / moved,
        }
        print(
            f"  users/s: pfl-research {row['pfl_users_per_second']:.1f}, fedsim {row['fedsim_users_per_second']:.1f},"
            f" {row['times_faster']:.2f}×; processor ms a user {row['pfl_processor_ms_per_user']:.1f},"
            f" {row['fedsim_processor_ms_per_user']:.1f}, {row['times_less_processor_time']:.2f}×, the matrix products"
            f" alone {row['products_alone_processor_ms_per_user']:.1f};"
            f" first steps differ by {apart / moved:.1e}",
            flush=True,
        )
        return row

    def _roundtrip(self) -> dict[str, float]:
        print(f"Round trips of {self.roundtrip_bytes / 1e9:g} GB with one worker:", flush=True)
        row = roundtrip.run(self.roundtrip_bytes, self.roundtrip_rounds)
        print(
            f"  {row['beyond_compute_seconds']:.2f} s beyond compute, {row['copies']:.2f} plain copies of"
            f" {row['copy_seconds']:.2f} s; peak memory {row['peak_models']:.2f} models"
        )
        return row


if __name__ == "__main__":
    sys.exit(run_benchmark(Benchmark))
