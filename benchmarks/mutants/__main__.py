"""How many changes that break a guarantee the tests notice: `python -m benchmarks.mutants`.

Each change of the catalogue is put into a copy of the tree, and the tests that should notice it are run there until
one fails. A test that failed is run again without any change, and must pass. Survivors are listed with the reason;
ends with a line of JSON, and with exit code 1 where one survives that should not.
"""

import contextlib
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command_line import run_benchmark
from benchmarks.mutants.catalogue import Mutant, mutants
from benchmarks.mutants.trial import FAILED, PASSED, copy_tree, failed_tests, outcome, warm_context
from fedsim.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Mutants:
    """Break the guarantee in each way of the catalogue, and see whether a test notices."""

    short: bool = False
    """The short list alone."""
    only: tuple[str, ...] = ()
    """Rooms, or words of what a change breaks; by default all."""
    processes: int = 2
    """Changes tried at the same time."""
    seconds: float = 600.0
    """How long the tests of one change may take."""
    logs: Path | None = None
    """Folder for what pytest printed about each change; by default what is printed is not kept."""

    def run(self) -> int:
        """1 where a change survives that should not, or tests fail without one."""
        chosen = self._chosen()
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            logs = self.logs or Path(folder) / "logs"
            logs.mkdir(parents=True, exist_ok=True)
            trees = [copy_tree(_made(Path(folder) / str(place))) for place in range(self.processes)]
            bench = Bench(trees, logs, self.seconds)
            with ThreadPoolExecutor(self.processes) as pool:
                noticed = list(pool.map(bench.noticed, enumerate(chosen)))
                broken = list(pool.map(bench.unchanged, _shared_out(noticed, self.processes)))
        if found := [text for text in broken if text is not None]:
            print("without any change the tests fail:\n" + "\n".join(found), file=sys.stderr)
            return 1
        killed = [bool(tests) for tests in noticed]
        survivors = [one for one, tests in zip(chosen, noticed, strict=True) if not tests]
        for one in survivors:
            print(f"survives: {one.name} ({one.file})" + (f": {one.survives}" if one.survives else ""))
        told = {"mutants": len(chosen), "killed": sum(killed), "score": round(sum(killed) / len(chosen), 4)}
        print(json.dumps({"benchmark": "mutants", "short": self.short, **told}))
        return int(any(not one.survives for one in survivors))

    def _chosen(self) -> list[Mutant]:
        found = [one for one in mutants() if one.short or not self.short]
        if self.only:
            found = [one for one in found if any(word in one.name for word in self.only)]
        if not found:
            raise InvalidInput("only", self.only, "rooms or words of the catalogue")
        return found


class Bench:
    """Trees that are changed and put right again, each by one thread at a time.

    Args:
        trees: Copies of the tree.
        logs: Where what pytest prints goes.
        seconds: Limit of one trial.
    """

    def __init__(self, trees: list[Path], logs: Path, seconds: float) -> None:
        self._free, self._logs, self._seconds = list(trees), logs, seconds
        self._lock, self._context = threading.Lock(), warm_context()

    def noticed(self, numbered: tuple[int, Mutant]) -> tuple[str, ...]:
        """The test that fails with the change; none where none does, or where they run out of time or are ended."""
        number, mutant = numbered
        log = self._logs / f"{number:03d}.txt"
        with self._a_tree() as tree:
            path = tree / mutant.file
            before = path.read_text(encoding="utf-8")
            try:
                path.write_text(mutant.changed(tree), encoding="utf-8")
                code, seconds = outcome(self._context, tree, mutant.noticed_by, log, self._seconds)
            finally:
                path.write_text(before, encoding="utf-8")
        failed = failed_tests(log) if code == FAILED else ()
        if not failed and code not in (PASSED, None):
            raise RuntimeError(f"{mutant.name}: pytest ended with {code}\n{log.read_text(encoding='utf-8')[-2000:]}")
        how = "killed  " if failed else "SURVIVED" if code == PASSED else "TOO LONG"
        print(f"{how} {seconds:5.1f} s  {mutant.name}", flush=True)
        return failed

    def unchanged(self, tests: list[str]) -> str | None:
        """What pytest printed where one of these tests fails without a change."""
        if not tests:
            return None
        with self._a_tree() as tree:
            log = self._logs / f"unchanged-{tree.parent.name}.txt"
            code, seconds = outcome(self._context, tree, tests, log, len(tests) * self._seconds)
        print(f"{len(tests)} tests that noticed something, without a change: {seconds:.0f} s", flush=True)
        return None if code == PASSED else log.read_text(encoding="utf-8")[-4000:]

    @contextlib.contextmanager
    def _a_tree(self) -> Iterator[Path]:
        with self._lock:
            tree = self._free.pop()
        try:
            yield tree
        finally:
            with self._lock:
                self._free.append(tree)


def _shared_out(noticed: list[tuple[str, ...]], processes: int) -> list[list[str]]:
    """The tests that noticed something, each once, by file, a share for each process."""
    tests = sorted({test for found in noticed for test in found})
    files = sorted({test.partition("::")[0] for test in tests})
    return [
        [test for test in tests if files.index(test.partition("::")[0]) % processes == place]
        for place in range(processes)
    ]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    sys.exit(run_benchmark(Mutants))
