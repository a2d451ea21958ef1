"""The paper's population end to end: `python -m benchmarks.population`.

As many users as StackOverflow has, with a few short texts each, become a user store, and the default model is
fine-tuned on it by user-level sampling with a cohort of 1,000, on two Ray workers. Says where the time went: each pass
of the ingest, the start, each phase of a round. Ends with one JSON line.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.ingest import IngestBenchmark, report
from fedsim import Callback, fine_tune
from fedsim.memory import peak_resident_bytes
from fedsim.models.config import DEFAULT_PATH
from fedsim.phases import Times

DELTA = 1e-8
"""Below one over the number of users, also of 10⁷."""


@dataclass(frozen=True, kw_only=True)
class PopulationBenchmark:
    """Build a store of synthetic users, and train on it."""

    users: int = 340_000
    """Users; the paper's StackOverflow has 341,000."""
    rows: int = 1_100_000
    """Their texts, each a row."""
    from_parts: bool = False
    """Make up tokens in place of texts, and leave the first pass of the ingest out."""
    cohort: int = 1_000
    """Users of a round, in expectation, each with one row."""
    rounds: int = 20
    """Rounds."""
    model: str = DEFAULT_PATH
    """default, or the folder of another model."""
    workers: int = 2
    """Ray actors; 0 computes in the server's process."""
    folder: Path | None = None
    """Where to work; by default a temporary folder, removed afterwards."""

    def run(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="population-benchmark-", dir=self.folder) as work:
            ingest = IngestBenchmark(
                users=self.users, rows=self.rows, tokenizer=self.model, from_parts=self.from_parts
            )
            built = {"rows": self.rows, **ingest.measured(Path(work))}
            report(built)
            options = map(str, (work, self.model, self.cohort, self.rounds, self.workers))
            command = [sys.executable, "-m", "benchmarks.population", "--train", *options]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        trained = json.loads(done.stdout.splitlines()[-1])
        _report(trained)
        result = {"benchmark": "population", "users": self.users, "rows": self.rows, "cohort": self.cohort}
        result |= {"ingest": built, "training": trained}
        print(json.dumps(result))
        return result


def train(work: str, model: str, cohort: int, rounds: int, workers: int) -> dict[str, Any]:
    """Fine-tune on the store in a folder, and say how long everything took."""
    clock = _Clock()
    began = time.perf_counter()
    tuned = fine_tune(
        model,
        f"{work}/store",
        epsilon=2.0,
        delta=DELTA,
        rounds=rounds,
        gradients_per_round=cohort,
        group_size=1,
        workers=workers or None,
        callbacks=[clock],
        output=f"{work}/run",
    )
    ended = time.perf_counter()
    times, first, last = clock.times, clock.told[0], clock.told[-1]
    return {
        "start_seconds": first - began,
        "rounds_seconds": last - first,
        "end_seconds": ended - last,
        "phases": times.to_json(),
        "in_words": times.in_words(),
        "peak_mib": peak_resident_bytes() / 2**20,
        "epsilon": tuned.statement["epsilon"]["upper"],
        "losses": clock.losses,
    }


@dataclass
class _Clock(Callback):
    """When each record was told, held-out losses, and the phases of the rounds that records are of."""

    told: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    times: Times = field(default_factory=lambda: Times(seconds={}))

    def on_record(self, record: dict[str, Any]) -> None:
        self.told.append(time.perf_counter())
        self.losses += [record["loss"]] if "loss" in record else []
        if record["round"]:  # the model before training is measured as a part of the start
            self.times = self.times.added(Times.from_json(record["not_private"]["phases"]))


def _report(trained: dict[str, Any]) -> None:
    print(f"start: {trained['start_seconds']:.1f} s, until the model before training is measured")
    times = Times.from_json(trained["phases"])
    print(f"{times.rounds} rounds: {trained['rounds_seconds']:.1f} s")
    print(f"{'phase':24} {'seconds':>10} {'ms a round':>12} {'share':>8}")
    for phase, seconds in times.seconds.items():
        print(f"{phase:24} {seconds:>10.2f} {1e3 * seconds / times.rounds:>12.2f} {seconds / times.whole:>8.1%}")
    print(f"end: {trained['end_seconds']:.1f} s, for measuring test users and writing the results")
    print(f"server: {trained['peak_mib']:,.0f} MiB at most; ε = {trained['epsilon']:.3f}; loss ", end="")
    print(f"{trained['losses'][0]:.3f} → {trained['losses'][-1]:.3f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        print(json.dumps(train(*sys.argv[2:4], *map(int, sys.argv[4:]))))
    else:
        from benchmarks.command_line import run_benchmark

        sys.exit(run_benchmark(PopulationBenchmark))
