"""What noise that is correlated over rounds costs beside independent noise: `python -m benchmarks.noise_filter`.

One round's noise on P values, in memory and in a file, each in a process of its own: seconds on the clock and of the
processor, the peak of resident memory, and the part of it that is of no mapped file, which the system can take back at
any time. Then what a resumed run takes for each round that it draws again. Ends with one JSON line.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedsim.plan import UlsPlan
from fedsim.privacy.mechanisms.banded import filter as banded
from fedsim.privacy.mechanisms.banded.blt import BufferedToeplitz
from fedsim.privacy.mechanisms.banded.coefficients import on_grid, square_root_coefficients
from fedsim.release import Release
from fedsim.sampling import Turns

BUFFERS = BufferedToeplitz(weights=(0.1, 0.2), decays=(0.5, 0.95))


@dataclass(frozen=True, kw_only=True)
class NoiseFilterBenchmark:
    """Draw the noise of some rounds, and draw it again."""

    values: int = 20_000_000
    """P, values of a sum."""
    bands: tuple[int, ...] = (1, 4, 16)
    """Bands of noise; 1 is independent noise."""
    buffers: bool = True
    """Two buffers too, in place of bands."""
    places: tuple[str, ...] = ("memory", "file")
    """Where noise of earlier rounds is kept."""
    rounds: int = 4
    """Rounds after those that fill the band; the median is shown."""
    secure: bool = False
    """From the cryptographic generator, on a grid, where noise is correlated over bands."""

    def run(self) -> None:
        """Measure, print a table and a line of JSON."""
        found = []
        print(f"P = {self.values:,}: seconds (of the processor), MiB resident (in no file), seconds drawn again")
        kinds = [*map(str, self.bands), *(["buffers"] if self.buffers and not self.secure else [])]
        for kind in kinds:
            for place in self.places if kind != "1" else ("memory",):
                options = [kind, place, str(self.values), str(self.rounds), str(int(self.secure))]
                command = [sys.executable, "-m", "benchmarks.noise_filter", "--stage", *options]
                result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                found.append({"kind": kind, "place": place, **result})
                print(
                    f"  {kind:>8} in {place:<6}  {result['round_seconds']:7.2f} s ({result['cpu_seconds']:.2f})  "
                    f"{result['peak_mb']:8.0f} MiB ({result['anonymous_mb']:.0f})  {result['again_seconds']:7.2f} s"
                )
        print(json.dumps({"benchmark": "noise_filter", "values": self.values, "results": found}))


def measure(kind: str, place: str, values: int, rounds: int, secure: bool) -> dict[str, float]:
    """Rounds of one kind of noise on zeros."""
    banded.IN_MEMORY = 0 if place == "file" else 1 << 62
    release = _release(kind, values, None if secure else 1)
    before = 0 if kind in ("1", "buffers") else int(kind) - 1
    total, seconds, busy = np.zeros(values, dtype=np.float32), [], []
    with _watched() as memory:
        for round in range(before + rounds):
            total[:] = 0
            kept = release.state()  # of before the last round, in the end
            started, used = time.perf_counter(), time.process_time()
            release.noised_mean(total, release.clip, round)
            seconds.append(time.perf_counter() - started)
            busy.append(time.process_time() - used)
            memory()
        peak, anonymous = memory()
    last, again = before + rounds - 1, 0.0
    if release.correlated and not secure:  # what secure noise drew is kept
        drawn = total.copy()
        started = time.perf_counter()
        release.load_state(kept)
        again = (time.perf_counter() - started) / last
        total[:] = 0
        if not np.array_equal(release.noised_mean(total, release.clip, last), drawn):
            raise AssertionError("noise that was drawn again is not what it was")
    return {
        "round_seconds": float(np.median(seconds[before:])),
        "cpu_seconds": float(np.median(busy[before:])),
        "again_seconds": again,
        "peak_mb": peak,
        "anonymous_mb": anonymous,
    }


def _release(kind: str, values: int, seed: int | None) -> Release:
    noise = {"noise_buffers": BUFFERS.pairs} if kind == "buffers" else {}
    bands = 1 if kind == "buffers" else int(kind)
    plan = UlsPlan(
        num_users=1000,
        sampling_probability=1 / 100,
        group_size=1,
        clip_norm=1.0,
        noise_multiplier=1.0,
        steps=200,
        delta=1e-5,
        sampling=Turns(),
        noise_coefficients=on_grid(square_root_coefficients(bands)),
        **noise,
    )
    return Release(plan, {"all": values}, seed)


@contextlib.contextmanager
def _watched() -> Iterator:
    """Gives what to call for the largest resident memory so far, and of it what is in no file, in MiB."""
    most = [0.0, 0.0]

    def look() -> tuple[float, float]:
        with open("/proc/self/status", encoding="utf-8") as file:
            lines = [line.split() for line in file if line.startswith(("VmHWM", "RssAnon"))]
        sizes = {name.rstrip(":"): int(kilobytes) / 1024 for name, kilobytes, _ in lines}
        most[0], most[1] = max(most[0], sizes["VmHWM"]), max(most[1], sizes["RssAnon"])
        return most[0], most[1]

    yield look


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        kind, place, *numbers = sys.argv[2:]
        values, rounds, secure = map(int, numbers)
        print(json.dumps(measure(kind, place, values, rounds, bool(secure))))
    else:
        from benchmarks.command_line import run_benchmark

        sys.exit(run_benchmark(NoiseFilterBenchmark))
