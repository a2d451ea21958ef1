"""The command: stores of more and more users, a start and rounds on each."""

import json
import multiprocessing
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command_line import run_benchmark
from benchmarks.growth import measure

MOST_RATIO, MOST_SECONDS, MOST_MIB = 1.2, 1.0, 200.0


@dataclass(frozen=True, kw_only=True)
class GrowthBenchmark:
    """Rounds and starts on stores of more and more users."""

    users: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    """Users of each store, ascending."""
    rounds: int = 40
    """Rounds that are timed."""
    folder: Path | None = None
    """Where to work; by default a temporary folder, removed afterwards. Needs about 100 bytes a user."""

    def run(self) -> dict[str, Any]:
        work = Path(tempfile.mkdtemp(prefix="growth-benchmark-", dir=self.folder))
        found: list[dict[str, Any]] = []
        try:
            _in_own_process(measure.write, work / "few", measure.FEW)
            for users in self.users:
                store = work / str(users)
                _in_own_process(measure.write, store, users)
                for algorithm in measure.GROUP_SIZE:
                    found.append(_in_own_process(measure.use, store, work / "few", algorithm, self.rounds))
                    print(_in_words(found[-1]), flush=True)
                shutil.rmtree(store)
        finally:
            shutil.rmtree(work)
        result = summary(found)
        print(json.dumps(result))
        return result


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The growth from the smallest population to the largest, and the start on the largest: each algorithm's worst."""
    fewest, most = min(one["users"] for one in found), max(one["users"] for one in found)
    rounds = {(one["users"], one["algorithm"]): one["round_seconds"] for one in found}
    largest = [one for one in found if one["users"] == most]
    result = {
        "benchmark": "growth",
        "round_ratio": max(rounds[most, name] / rounds[fewest, name] for name in measure.GROUP_SIZE),
        "start_seconds": max(one["start_seconds"] for one in largest),
        "start_mib": max(one["start_mib"] for one in largest),
        "round_mib": max(one["round_mib"] for one in largest),
    }
    bars = {"round_ratio": MOST_RATIO, "start_seconds": MOST_SECONDS, "start_mib": MOST_MIB}
    for name, bar in bars.items():
        print(f"{name:14} {result[name]:8.3g}   bar: at most {bar:g}: {'holds' if result[name] <= bar else 'MISSED'}")
    return result | {"found": found}


def _in_words(one: dict[str, Any]) -> str:
    return (
        f"{one['users']:>10,} users, {one['algorithm']}: a round {1e3 * one['round_seconds']:.1f} ms and "
        f"{one['round_mib']:.2f} MiB; the start {one['start_seconds']:.3f} s and {one['start_mib']:.1f} MiB"
    )


def _in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, from a process that has done nothing else but import what measures."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([measure.__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


if __name__ == "__main__":
    sys.exit(run_benchmark(GrowthBenchmark))
