"""Which engine groups examples by user? `python -m benchmarks.group_by_user`.

DuckDB, Polars (where installed) and Arrow sort the same Parquet parts, each in a process of its own, and stream the
result in batches as `prepare` reads it. Seconds and peak memory, and their ratio to DuckDB's. Ends with one JSON line.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.synthetic_users import user_sizes
from fedsim.data.group import EXAMPLES_AT_ONCE

PART_EXAMPLES = 1 << 16
KEYS = ["high", "low", "ordinal"]


@dataclass(frozen=True, kw_only=True)
class GroupingBenchmark:
    """Sort synthetic examples by user with each engine."""

    users: int = 100_000
    """Users."""
    examples: int = 3_000_000
    """Examples; each has 8 to 120 tokens of two bytes."""
    memory_limit: str = "1GB"
    """DuckDB's limit; the others have none to set."""

    def run(self) -> None:
        work = Path(tempfile.mkdtemp(prefix="grouping-benchmark-"))
        try:
            size = write_parts(work, self.users, self.examples)
            print(f"{self.examples:,} examples, {size / 1e6:,.0f} MB")
            results = {}
            for engine in ENGINES:
                command = [sys.executable, "-m", "benchmarks.group_by_user", "--stage", engine]
                done = subprocess.run([*command, str(work), self.memory_limit], stdout=subprocess.PIPE, text=True)
                results[engine] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
                shutil.rmtree(work / "scratch", ignore_errors=True)
        finally:
            shutil.rmtree(work)
        first = results["duckdb"]
        for engine, found in results.items():
            if found is None:
                print(f"{engine:8} not installed, or it failed")
                continue
            ratios = [found[name] / first[name] for name in ("seconds", "peak_mb")]
            print(
                f"{engine:8} {found['seconds']:8.1f} s ({ratios[0]:.2f}×)  peak {found['peak_mb']:8,.0f} MB "
                f"({ratios[1]:.2f}×)  sorted: {found['sorted']}"
            )
        print(json.dumps({"benchmark": "group_by_user", "examples": self.examples, "bytes": size, **results}))


def write_parts(folder: Path, num_users: int, num_examples: int) -> int:
    """Parts as `prepare` writes them; returns their bytes."""
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(num_users, dtype=np.uint64), user_sizes(num_users, num_examples, 0))
    generator.shuffle(users)
    for number, start in enumerate(range(0, num_examples, PART_EXAMPLES)):
        owners = users[start : start + PART_EXAMPLES]
        lengths = generator.integers(8, 121, len(owners)) * 2
        ends = np.zeros(len(owners) + 1, dtype=np.int64)
        np.cumsum(lengths, out=ends[1:])
        tokens = generator.integers(0, 256, ends[-1], dtype=np.uint8)
        buffers = [None, pa.py_buffer(ends), pa.py_buffer(tokens)]
        table = pa.table(
            {
                "high": owners * np.uint64(0x9E3779B97F4A7C15),
                "low": owners,
                "ordinal": np.arange(start, start + len(owners)),
                "tokens": pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(owners), buffers),
            }
        )
        pq.write_table(table, folder / f"{number:06d}.parquet", compression="NONE", use_dictionary=False)
    return sum(file.stat().st_size for file in folder.glob("*.parquet"))


def _duckdb(folder: str, memory_limit: str) -> Iterator[pa.RecordBatch]:
    import duckdb

    connection = duckdb.connect()
    connection.execute(f"SET memory_limit='{memory_limit}'; SET temp_directory='{folder}/scratch'; SET threads=2")
    connection.execute("SET preserve_insertion_order=false")
    query = f"SELECT * FROM read_parquet('{folder}/*.parquet') ORDER BY {', '.join(KEYS)}"
    yield from connection.sql(query).to_arrow_reader(EXAMPLES_AT_ONCE)


def _polars(folder: str, memory_limit: str) -> Iterator[pa.RecordBatch]:
    import polars

    polars.scan_parquet(f"{folder}/*.parquet").sort(KEYS).sink_parquet(f"{folder}/sorted", engine="streaming")
    yield from pq.ParquetFile(f"{folder}/sorted").iter_batches(EXAMPLES_AT_ONCE)


def _arrow(folder: str, memory_limit: str) -> Iterator[pa.RecordBatch]:
    from pyarrow import dataset

    files = sorted(str(file) for file in Path(folder).glob("*.parquet"))
    table = dataset.dataset(files).to_table().sort_by([(key, "ascending") for key in KEYS])
    yield from table.to_batches(EXAMPLES_AT_ONCE)


ENGINES = {"duckdb": _duckdb, "polars": _polars, "arrow": _arrow}


def measure(engine: str, folder: str, memory_limit: str) -> dict[str, float | bool]:
    """Read everything from one engine."""
    started = time.perf_counter()
    last, in_order = 0, True
    for batch in ENGINES[engine](folder, memory_limit):
        high = batch["high"].to_numpy()
        in_order &= bool(high[0] >= last and (high[1:] >= high[:-1]).all())
        last = high[-1]
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mb": peak, "sorted": in_order}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        from benchmarks.command_line import run_benchmark

        sys.exit(run_benchmark(GroupingBenchmark))
