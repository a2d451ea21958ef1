"""Fuzzers run for a time, after what they found before: a corpus of inputs that failed once, in fuzz_corpus/.

A fuzzer is a function of a folder that gives a test of given values. Its file in the corpus has an input a line, as
Python writes it, so that it can be read, and stays valid whatever hypothesis or the fuzzer's strategies become.
"""

import functools
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).with_name("fuzz_corpus")
EXAMPLES = 100
"""New inputs at a time, between looks at the clock."""
Fuzzer = Callable[[Path], Callable[..., None]]

_failed: dict[str, Any] = {}


def fuzzing(*strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`given`, which notes the input that failed last: after hypothesis has made it smaller, the smallest."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @given(*strategies)
        @functools.wraps(check)
        def fuzz(*arguments: Any, **named: Any) -> None:
            try:
                check(*arguments, **named)
            except BaseException:
                _failed.clear()
                _failed.update(named)
                raise

        return fuzz

    return decorate


def corpus_of(name: str) -> list[dict[str, Any]]:
    """The inputs that a fuzzer of this name failed on once."""
    path = CORPUS / f"{name}.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    values = {"nan": math.nan, "inf": math.inf, "__builtins__": {}}
    return [eval(line, values) for line in lines if line and not line.startswith("#")]


def run_for(make: Fuzzer, folder: Path, seconds: float) -> int:
    """Run a fuzzer on its corpus, then on new inputs until the time is up.

    Args:
        make: The fuzzer.
        folder: For what it writes.
        seconds: How long; 100 new inputs are tried in any case.

    Returns:
        How many inputs were new.
    """
    end, number = time.monotonic() + seconds, 0
    first = int(os.environ.get("FEDSIM_FUZZ_SEED", "0"))
    while number == 0 or time.monotonic() < end:
        place = folder / str(number)
        place.mkdir()
        fuzz = make(place)
        for known in corpus_of(make.__name__) if number == 0 else ():
            fuzz = example(**known)(fuzz)
        phases = (Phase.explicit, Phase.generate, Phase.shrink)
        unhurried = list(HealthCheck)
        chosen = settings(max_examples=EXAMPLES, database=None, suppress_health_check=unhurried, phases=phases)
        seed(first + number)(chosen(fuzz))()
        shutil.rmtree(place)
        number += 1
    return number * EXAMPLES


def keep(name: str) -> str:
    """What is said of the input that failed; with FEDSIM_FUZZ_KEEP it is in the corpus then."""
    line = repr(_failed)
    if not _failed:
        return "No input is to blame."
    if not os.environ.get("FEDSIM_FUZZ_KEEP"):
        return f"For tests/reliability/fuzz_corpus/{name}.txt, which keeps it:\n{line}"
    with (CORPUS / f"{name}.txt").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    return f"It is in tests/reliability/fuzz_corpus/{name}.txt now:\n{line}"
