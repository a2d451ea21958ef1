"""Rows a second and memory of `prepare`, pass by pass: `python -m benchmarks.ingest --rows 10000000 --users 1000000`.

Synthetic users in StackOverflow's shape, with short texts, become a user store in a process of its own. The memory of
a pass is the most that this process and those that it starts hold together, pages that they share counted in each.
Ends with one JSON line.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ingest_parts import write_parts
from benchmarks.passes import Passes
from benchmarks.synthetic_users import write_shards
from fedsim.cache import default_cache
from fedsim.data.collect import Collection
from fedsim.data.config import DataConfig
from fedsim.data.encode import TextEncoder
from fedsim.data.ingest import build_store
from fedsim.data.machine import cores
from fedsim.data.part import PARTS
from fedsim.data.sources import Progress, public_texts
from fedsim.data.spool import Spooled
from fedsim.data.store import UserStore
from fedsim.models.config import DEFAULT_PATH, ModelConfig
from fedsim.terminal import shown

SHORT = 20
"""Letters of each of the two phrases of a text."""


@dataclass(frozen=True, kw_only=True)
class IngestBenchmark:
    """Build a store of synthetic users, and say what each pass took."""

    rows: int = 10_000_000
    """Texts, each a row."""
    users: int = 1_000_000
    """Users who wrote them."""
    tokenizer: str = "bytes"
    """bytes: one token a byte, almost free, so that everything else is measured. default: the default model's. Or the
    folder of another model."""
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
            found = self.measured(work)
        finally:
            shutil.rmtree(work)
        result = {"benchmark": "ingest", "rows": self.rows, "users": self.users, **found}
        report(result)
        print(json.dumps(result))
        return result

    def measured(self, work: Path) -> dict[str, Any]:
        """Leave a store in a folder, built by a process of its own, and say what each pass took."""
        if self.from_parts:
            size = write_parts(work / "parts", self.users, self.rows, Bytes.vocab_size)
        else:
            (work / "data").mkdir()
            size = write_shards(work / "data", self.users, self.rows, short_phrases())
        print(f"{self.rows:,} texts of {self.users:,} users, {size / 1e6:,.0f} MB, {cores()} cores", flush=True)
        options = [str(work), self.tokenizer, self.memory_limit, str(self.rows * self.from_parts)]
        command = [sys.executable, "-m", "benchmarks.ingest", "--measure", *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found


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
    parts = Spooled(files=sorted((work / "parts").glob(PARTS)), records=rows)
    collection = Collection(work, parts, config, encoder)
    collection.run(progress)
    progress("Writing the store", 0, 1)
    manifest = {"classes": [], "tokenizer": encoder.fingerprint, "apart": False, "recipe": {"data": {}}}
    collection.writer.finish(collection.names.kept(), collection.splits, manifest)
    return UserStore.open(work / "store")


class Bytes:
    """A tokenizer that costs next to nothing; its tokens take two bytes, as those of real ones."""

    vocab_size = 4096

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


def tokenizer_of(name: str) -> Any:
    """What `IngestBenchmark.tokenizer` names."""
    if name == "bytes":
        from benchmarks.ingest import Bytes as Importable  # by a name under which other processes find it

        return Importable()
    if name != DEFAULT_PATH:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)
    from fedsim.models.tokenizer import train_tokenizer

    return train_tokenizer(public_texts(default_cache()), ModelConfig().small.vocabulary_size)


def short_phrases() -> list[str]:
    """Beginnings of lines of public text."""
    lines = {line.strip() for text in public_texts(default_cache()) for line in text.splitlines()}
    return sorted({line[:SHORT] for line in lines if 10 < len(line) < 60})


def report(result: dict[str, Any]) -> None:
    """The passes as a table."""
    rows = {**result["passes"], "all": result}
    print(f"{'pass':24} {'seconds':>10} {'processor':>10} {'peak MiB':>10}")
    for name, one in rows.items():
        print(f"{name:24} {one['seconds']:>10.1f} {one['processor_seconds']:>10.1f} {one['peak_mib']:>10,.0f}")
    rates = [result["rows"] / result[name] for name in ("seconds", "processor_seconds")]
    print(f"{rates[0]:,.0f} rows a second, {rates[1]:,.0f} a processor second")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        from benchmarks.command_line import run_benchmark

        sys.exit(run_benchmark(IngestBenchmark))
