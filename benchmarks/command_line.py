"""How a benchmark is started from a shell, and what its end says to it."""

import sys
from typing import Any, Protocol

import tyro

from fedsim.errors import Failure, InvalidInput


class Benchmark(Protocol):
    """A dataclass whose fields are a benchmark's options."""

    def run(self) -> Any:
        """Run it, and print what it found; whether it failed, if it returns a number."""


def run_benchmark(kind: type[Benchmark], *, positional: bool = False) -> int:
    """Read a benchmark's options from the command line, and run it.

    Args:
        kind: The benchmark.
        positional: Whether options without a default are given without their names.

    Returns:
        The exit code: what it returned, or 0; 1 where it failed, 2 for bad input.
    """
    spec = sys.modules["__main__"].__spec__
    program = None if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"
    try:
        found = tyro.cli(kind, prog=program, config=(tyro.conf.PositionalRequiredArgs,) if positional else ()).run()
    except InvalidInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Failure as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    return found if isinstance(found, int) else 0
