"""How long a command takes to answer: `python -m benchmarks.startup`.

Processor seconds (user and system, the program's and its children's) of whole commands: help, refusals, accounting and
planning. Medians of several runs; ends with one JSON line.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys

ACCOUNT = "account --sampling-probability 0.001 --noise-multiplier 1 --steps 1000 --delta 1e-6"
LIMITS = {
    "--help": 1.0,
    "train --help": 1.0,
    "compare --help": 1.0,
    "sweep --help": 1.0,
    "trian": 1.0,
    "train --lr 3": 1.0,
    "train --plan.epsilon -1": 1.0,
    f"{ACCOUNT} --algorithm uls": 1.5,
    f"{ACCOUNT} --algorithm els --group-size 16": 1.5,
    "plan --num-users 10000": 1.5,
    "plan --num-users 10000 --user-sizes 16": 1.5,
}
"""What people would not like to wait for longer, by command."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    seconds = {line: measured(line.split(), repeats) for line in LIMITS}
    for line, found in seconds.items():
        print(f"{found:6.2f} s of at most {LIMITS[line]:.1f}   {line}")
    print(json.dumps({"benchmark": "startup", "repeats": repeats, "processor_seconds": seconds}))


def measured(arguments: list[str], repeats: int) -> float:
    """The median of a command's processor seconds."""
    return statistics.median(once(arguments) for _ in range(repeats))


def once(arguments: list[str]) -> float:
    """Processor seconds of one run of a command, whatever its exit code."""
    before = spent()
    program = [sys.executable, "-m", "experiments.run", *arguments]
    subprocess.run(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return spent() - before


def spent() -> float:
    """Processor seconds of all children so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
