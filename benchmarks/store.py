"""Ingest rate, opening, look-ups and memory of the user store: `python -m benchmarks.store`.

Synthetic users in StackOverflow's shape. Each stage runs in a process of its own, so that its memory is its own. Ends
with one JSON line.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.synthetic_users import write_shards
from fedsim.cache import default_cache
from fedsim.data.config import DataConfig
from fedsim.data.contribution import bounded_rows
from fedsim.data.ingest import build_store
from fedsim.data.sources import public_texts
from fedsim.data.store import UserStore
from fedsim.plan import UlsPlan
from fedsim.terminal import shown

COHORT = 1000
GROUP_SIZE = 16
LOOKUPS = 3000
ROUNDS = 30


@dataclass(frozen=True, kw_only=True)
class StoreBenchmark:
    """Build a store of synthetic users and measure it."""

    users: int = 340_000
    """Users."""
    examples: int = 10_000_000
    """Examples in all; 100,000,000 takes about ten times as long and 25 GB of disk."""
    tokenizer: str = "bytes"
    """bytes: one token a byte, almost free, so that the store itself is measured. bpe: the default model's."""
    folder: Path | None = None
    """Where to work; by default a temporary folder, removed afterwards. Needs about 250 bytes an example."""
    memory_limit: str = "1GB"
    """data.memory-limit of the ingest."""

    def run(self) -> dict[str, Any]:
        work = Path(tempfile.mkdtemp(prefix="store-benchmark-", dir=self.folder))
        try:
            started = time.perf_counter()
            (work / "data").mkdir()
            size = write_shards(work / "data", self.users, self.examples, _phrases())
            print(f"wrote {self.examples:,} examples, {size / 1e6:,.0f} MB of text: {_since(started):.0f} s")
            ingest = _in_own_process("ingest", str(work), self.tokenizer, self.memory_limit)
            use = _in_own_process("use", str(work))
        finally:
            shutil.rmtree(work)
        result = {"users": self.users, "examples": self.examples, "text_mb": size / 1e6, **ingest, **use}
        result["examples_per_second"] = self.examples / ingest["ingest_seconds"]
        _report(result)
        return result


def ingest(work: str, tokenizer: str, memory_limit: str) -> dict[str, Any]:
    """Build the store; how long the passes took and how much memory the process took at most."""
    config = DataConfig(source="files", path=f"{work}/data", memory_limit=memory_limit)
    marks: dict[str, float] = {}
    started = time.perf_counter()
    with shown() as bars:

        def progress(what: str, done: float, total: float | None) -> None:
            marks.setdefault(what, _since(started))
            bars(what, done, total)

        build_store(config, _tokenizer(tokenizer), f"{work}/store", progress=progress)
    seconds = _since(started)
    return {
        "tokenizer": tokenizer,
        "ingest_seconds": seconds,
        "group_seconds": marks["Writing the store"] - marks["Grouping by user"],
        "write_seconds": seconds - marks["Writing the store"],
        "ratio_ingest_to_reading_and_encoding": seconds / marks["Grouping by user"],
        "ingest_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "store_mb": sum(file.stat().st_size for file in Path(work, "store").iterdir()) / 1e6,
    }


def use(work: str) -> dict[str, Any]:
    """Open the store as a worker does, look users up, draw cohorts and read them."""
    path = f"{work}/store"
    UserStore.open(path)  # Imports and first-call costs of the libraries are not the store's.
    before = _private_mb()
    started = time.perf_counter()
    view = UserStore.open(path).split("train")
    opened = _since(started)
    generator = np.random.default_rng(0)
    lookups, limits = _look_up(view, generator.integers(0, view.num_users, LOOKUPS))
    cohorts = _cohorts(view)
    grown = _private_mb() - before
    started = time.perf_counter()
    kept = bounded_rows(view, GROUP_SIZE, seed=0)
    return {
        "open_seconds": opened,
        "train_users": view.num_users,
        "train_rows": view.num_rows,
        "user_rows_median_us": float(np.median(lookups) * 1e6),
        "user_rows_p99_us": float(np.quantile(lookups, 0.99) * 1e6),
        "ratio_user_rows_to_plain_copy": float(np.median(lookups) / np.median(limits)),
        **cohorts,
        "worker_private_growth_mb": grown,
        "bounded_rows_seconds": _since(started),
        "bounded_rows": len(kept),
    }


def _look_up(view: UserStore, users: np.ndarray) -> tuple[list[float], list[float]]:
    """Seconds for each user's rows, and for copying as many tokens as the median user has out of warm memory."""
    tokens = np.zeros(1 << 20, dtype=np.uint16)
    lookups, limits = [], []
    for user in users:
        started = time.perf_counter()
        rows = view.take(np.arange(*view.rows_of(user)))
        lookups.append(_since(started))
        place = int(user) * 997 % (len(tokens) // 2)
        started = time.perf_counter()
        tokens[place : place + len(rows.tokens)].astype(np.int64)
        limits.append(_since(started))
    return lookups, limits


def _cohorts(view: UserStore) -> dict[str, float]:
    """Median milliseconds to sample a cohort, to draw its rows, and to read them."""
    plan = UlsPlan(
        num_users=view.num_users,
        sampling_probability=COHORT / view.num_users,
        group_size=GROUP_SIZE,
        steps=ROUNDS,
        clip_norm=1.0,
        noise_multiplier=1.0,
        delta=1e-6,
    )
    seconds: dict[str, list[float]] = {"sample_cohort": [], "draw_rows": [], "take_rows": []}
    for round in range(ROUNDS):
        times = [time.perf_counter()]
        users = plan.sample(round, 0)
        times.append(time.perf_counter())
        rows, _ = plan.rows_of(view, users, round, 0)
        times.append(time.perf_counter())
        view.take(rows)
        times.append(time.perf_counter())
        for name, spent in zip(seconds, np.diff(times), strict=True):
            seconds[name].append(spent)
    return {f"{name}_ms": float(np.median(values) * 1e3) for name, values in seconds.items()}


def _private_mb() -> float:
    """Memory that is this process's own.

    Pages of mapped files are left out: they are clean, belong to the page cache, and are shared by all processes that
    map them (the kernel calls them private while only one does).
    """
    fields = dict(line.split()[:2] for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Private_Dirty:"]) / 1024


class _Bytes:
    """A tokenizer that costs next to nothing; its tokens take two bytes, as those of real ones."""

    vocab_size = 4096

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


def _tokenizer(name: str) -> Any:
    if name == "bytes":
        return _Bytes()
    from fedsim.models.tokenizer import train_tokenizer

    return train_tokenizer(public_texts(), 4096)


def _phrases() -> list[str]:
    lines = {line.strip() for text in public_texts(default_cache()) for line in text.splitlines()}
    return sorted(line for line in lines if 10 < len(line) < 60)


def _since(started: float) -> float:
    return time.perf_counter() - started


def _in_own_process(stage: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.store", "--stage", stage, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


BARS = {
    "ingest_peak_mb": (2000, "ingest under 2 GB of memory"),
    "open_seconds": (1, "open under 1 s"),
    "user_rows_median_us": (100, "a random user's rows under 100 µs"),
    "sample_cohort_ms": (10, "a cohort of 1,000 sampled in under 10 ms"),
    "worker_private_growth_mb": (100, "a worker's private memory grows by less than 100 MB"),
}


def _report(result: dict[str, Any]) -> None:
    for name, value in result.items():
        bar = f"   bar: {BARS[name][1]}: {'holds' if value < BARS[name][0] else 'MISSED'}" if name in BARS else ""
        print(f"{name:38} {value:>14,.4g}{bar}" if isinstance(value, float) else f"{name:38} {value:>14}{bar}")
    print(json.dumps({"benchmark": "store", **result}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        print(json.dumps({"ingest": ingest, "use": use}[sys.argv[2]](*sys.argv[3:])))
    else:
        from benchmarks.command_line import run_benchmark

        sys.exit(run_benchmark(StoreBenchmark))
