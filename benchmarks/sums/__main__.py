"""`python -m benchmarks.sums`: where sums are formed, by design and measured; and rounds of ever more workers.

Eight workers on two Ray nodes of this machine that compute nothing; those of the second node are treated as if it were
another machine. Ends with one JSON line. On a busy machine trust bytes and ratios.
"""

import json
import os
from dataclasses import dataclass

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import sys

from benchmarks.command_line import run_benchmark
from benchmarks.engine.no_op import fedsim_app
from benchmarks.engine.roundtrip import raylets
from benchmarks.sums import among_workers, simulated
from benchmarks.sums.design import FORMS
from benchmarks.sums.measured import WATCHED_FROM_BYTES, as_if_apart, cluster_of, measure
from fedsim.engine.ray_grid import RayGrid

STAGES = ("design", "measured", "simulated")


@dataclass(frozen=True)
class Benchmark:
    """Compare where sums are formed."""

    stages: tuple[str, ...] = STAGES
    """Which parts to run: design (computed), measured (on Ray), simulated (the driver alone, many workers)."""
    forms: tuple[str, ...] = tuple(FORMS)
    """Values of --engine.sums to compare."""
    workers: int = 8
    """Workers, spread over the nodes."""
    nodes: int = 2
    """Ray nodes."""
    parameters: int = 350_000_000
    """Of the model by design, in float32."""
    payloads: tuple[int, ...] = (1_000_000, 4_000_000, 16_000_000, 64_000_000)
    """Bytes of the sums that are measured."""
    rounds: int = 5
    """Rounds that each median is over."""
    many: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    """Numbers of simulated workers."""
    values: tuple[int, ...] = (1_000, 1_000_000)
    """Values of a simulated worker's sum."""
    cohort: int = 1024
    """Units of a simulated round."""

    def run(self) -> None:
        result: dict[str, object] = {"benchmark": "sums", "cores": os.cpu_count()}
        if "design" in self.stages:
            result["design"] = self._design()
        if "measured" in self.stages:
            result["measured"] = self._measured()
        if "simulated" in self.stages:
            result["simulated"] = simulated.table(self.many, self.values, self.cohort, self.rounds)
        print(json.dumps(result))

    def _design(self) -> list[dict[str, object]]:
        size = 4 * self.parameters
        print(f"By design, {self.workers} workers on {self.nodes} nodes, {self.parameters:,} parameters, GB:")
        rows = []
        for form in self.forms:
            design = FORMS[form](self.workers, self.nodes, size)
            rows.append({"form": form, **vars(design)})
            print(
                f"  {form:>8}: into the driver {design.ingress / 1e9:5.1f}, of it over the network"
                f" {design.network / 1e9:5.1f}; sums on the driver's node {design.driver_node / 1e9:5.1f},"
                f" on another {design.other_node / 1e9:5.1f}"
            )
        return rows

    def _measured(self) -> list[dict[str, object]]:
        print(f"Measured, {self.workers} workers on {self.nodes} nodes:", flush=True)
        store = self.workers * max(self.payloads) * 3 // 2 + (256 << 20)
        rows: list[dict[str, object]] = []
        for form in self.forms:  # each on a cluster of its own: shared memory that was touched once stays in use
            others = set(raylets())
            with (
                cluster_of(self.nodes, -(-self.workers // self.nodes), store) as address,
                RayGrid(
                    among_workers.keeping_app if form == "workers" else fedsim_app,
                    workers=self.workers,
                    address=address,
                ) as grid,
            ):
                as_if_apart(grid)
                for payload in self.payloads:
                    row = (
                        among_workers.measure(grid, payload, self.rounds, WATCHED_FROM_BYTES)
                        if form == "workers"
                        else measure(grid, form, payload, self.rounds, others)  # type: ignore[arg-type]
                    )
                    rows.append({"form": form, "payload_bytes": payload, **row})
                    print(
                        f"  {form:>8}, {payload:>11,} B: {row['ingress_bytes'] / payload:4.1f} sums into the driver,"
                        f" {row['seconds'] * 1e3:8.1f} ms, driver's thread {row['driver_cpu_seconds'] * 1e3:7.1f} ms,"
                        f" memory {row['memory_sums']:5.1f} sums",
                        flush=True,
                    )
        return rows


if __name__ == "__main__":
    sys.exit(run_benchmark(Benchmark))
