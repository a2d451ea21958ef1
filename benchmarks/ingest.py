"""Rows a second and memory of `prepare`, pass by pass: `python -m benchmarks.ingest --rows 10000000 --users 1000000`.

Synthetic users in StackOverflow's shape, with short texts, become a user store in a process of its own. The memory of
a pass is the most that this process and those that it starts hold together, pages that they share counted in each.
Ends with one JSON line.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ingest_parts import write_parts
from benchmarks.synthetic_users import write_shards
from fedsim.cache import default_cache
from fedsim.data.collect import Collection
from fedsim.data.config import DataConfig
from fedsim.data.encode import TextEncoder
from fedsim.data.ingest import build_store
from fedsim.data.machine import cores
from fedsim.data.sources import Progress, public_texts
from fedsim.data.store import UserStore
from fedsim.terminal import shown

SHORT = 20
"""Letters of each of the two phrases of a text."""
SECONDS_BETWEEN_LOOKS = 0.05
RESET_PEAK = "5"
"""What /proc/self/clear_refs takes for: forget how much memory this process had at most."""


@dataclass(frozen=True, kw_only=True)
class IngestBenchmark:
    """Build a store of synthetic users, and say what each pass took."""

    rows: int = 10_000_000
    """Texts, each a row."""
    users: int = 1_000_000
    """Users who wrote them."""
    tokenizer: str = "bytes"
    """bytes: one token a byte, almost free, so that everything else is measured. bpe: the default model's."""
    memory_limit: str = "1GB"
    """data.memory-limit."""
    from_parts: bool = False
    """Make up what the first pass leaves, and measure the others alone: reading and encoding takes most of the time,
    and as much memory whatever the number of rows."""
    folder: Path | None = None
    """Where to work; by default a temporary folder, removed afterwards. Needs about 250 bytes a row."""

    def run(self) -> dict[str, Any]:
        work = Path(tempfile.mkdtemp(prefix="ingest-benchmark-", dir=self.folder))
        try:
            if self.from_parts:
                size = write_parts(work / "parts", self.users, self.rows, Bytes.vocab_size)
            else:
                (work / "data").mkdir()
                size = write_shards(work / "data", self.users, self.rows, short_phrases())
            print(f"{self.rows:,} texts of {self.users:,} users, {size / 1e6:,.0f} MB, {cores()} cores", flush=True)
            measured = [str(work), self.tokenizer, self.memory_limit, str(self.rows * self.from_parts)]
            command = [sys.executable, "-m", "benchmarks.ingest", "--measure", *measured]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        finally:
            shutil.rmtree(work)
        result = {"benchmark": "ingest", "rows": self.rows, "users": self.users, **json.loads(done.stdout)}
        report(result)
        return result


def measure(work: str, tokenizer: str, memory_limit: str, rows: str = "0") -> dict[str, Any]:
    """Build the store in this process, of so many rows in parts or of the texts, and say what each pass took."""
    config = DataConfig(source="files", path=f"{work}/data", memory_limit=memory_limit)
    encoder = tokenizer_of(tokenizer)
    started, passes = time.perf_counter(), Passes()
    with passes, shown() as bars:

        def progress(what: str, done: float, total: float | None) -> None:
            passes.begin(what)
            bars(what, done, total)

        if int(rows):
            store = store_of_parts(Path(work), config, TextEncoder(encoder), int(rows), progress)
        else:
            store = build_store(config, encoder, f"{work}/store", progress=progress)
    found = passes.found
    return {
        "seconds": time.perf_counter() - started,
        "peak_mib": max(one["peak_mib"] for one in found.values()),
        "processor_seconds": sum(one["processor_seconds"] for one in found.values()),
        "tokenizer": tokenizer,
        "store_mb": sum(file.stat().st_size for file in store.path.iterdir()) / 1e6,
        "tokens": store.num_tokens,
        "passes": found,
    }


def store_of_parts(work: Path, config: DataConfig, encoder: TextEncoder, rows: int, progress: Progress) -> UserStore:
    """What `build_store` does behind the first pass."""
    for folder in ("scratch", "store"):
        (work / folder).mkdir()
    collection = Collection(work, config, encoder)
    collection.run(rows, progress)
    progress("Writing the store", 0, 1)
    manifest = {"classes": [], "tokenizer": encoder.fingerprint}
    collection.writer.finish(collection.names.kept(), collection.splits, manifest)
    return UserStore.open(work / "store")


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


class Bytes:
    """A tokenizer that costs next to nothing; its tokens take two bytes, as those of real ones."""

    vocab_size = 4096

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


def tokenizer_of(name: str) -> Any:
    """ "bytes", or the default model's."""
    if name == "bytes":
        from benchmarks.ingest import Bytes as Importable  # by a name under which other processes find it

        return Importable()
    from fedsim.models.tokenizer import train_tokenizer

    return train_tokenizer(public_texts(), 4096)


def short_phrases() -> list[str]:
    """Beginnings of lines of public text."""
    lines = {line.strip() for text in public_texts(default_cache()) for line in text.splitlines()}
    return sorted({line[:SHORT] for line in lines if 10 < len(line) < 60})


def report(result: dict[str, Any]) -> None:
    """The passes as a table, and all as JSON."""
    print(f"{'pass':24} {'seconds':>10} {'processor':>10} {'peak MiB':>10}")
    for name, one in result["passes"].items():
        print(f"{name:24} {one['seconds']:>10.1f} {one['processor_seconds']:>10.1f} {one['peak_mib']:>10,.0f}")
    rate = result["rows"] / result["seconds"]
    print(f"{'all':24} {result['seconds']:>10.1f} {result['processor_seconds']:>10.1f} {result['peak_mib']:>10,.0f}")
    print(f"{rate:,.0f} rows a second, {result['rows'] / result['processor_seconds']:,.0f} a processor second")
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        import tyro

        tyro.cli(IngestBenchmark).run()
