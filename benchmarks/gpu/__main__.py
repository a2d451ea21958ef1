"""What a GPU makes of the clipped sum: `python -m benchmarks.gpu --minutes 9 --out DIR`.

Needs torch, transformers, peft, matplotlib and, for the kernels, Triton: nothing of Flower, Ray or a user store. The
cells run in order of worth, each in a process of its own, until the minutes are over; what a cell finds is kept line
by line in DIR/lines.jsonl, so that a run that was cut short is worth what it had time for. `--resume DIR/lines.jsonl`
leaves out the cells that finished there. At the end a page with a table and a plot is written to DIR.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from benchmarks.gpu.cells import CELLS
from benchmarks.gpu.page import write_page


def main() -> None:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "lines.jsonl"
    known = options.resume.read_text().splitlines() if options.resume else []
    path.write_text("".join(line + "\n" for line in known))
    finished = {json.loads(line).get("finished") for line in known}
    end = time.monotonic() + 60 * options.minutes
    for cell in options.cells.split(","):
        left = end - time.monotonic()
        if cell in finished or left < 10:
            continue
        print(f"{cell}: {left:.0f} s left", file=sys.stderr, flush=True)
        with path.open("a") as file:
            run_cell(cell, options, left, file)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    print(write_page(lines, options.out))


def run_cell(cell: str, options: argparse.Namespace, seconds: float, file: TextIO) -> None:
    """One cell in a process of its own; its lines go to the file as they come."""
    command = [sys.executable, "-m", "benchmarks.gpu.cells", cell, "--checks", str(options.checks)]
    command += ["--tables", str(options.out / "kernels")]
    for name in ("device", "ways", "cases"):
        if getattr(options, name):
            command += [f"--{name}", getattr(options, name)]
    start = time.monotonic()
    try:
        code = subprocess.run(command, stdout=file, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        code = None
    took = round(time.monotonic() - start, 1)
    ended = {"finished": cell} if code == 0 else {"cut_short" if code is None else "failed": cell}
    file.write(json.dumps(ended | {"seconds": took}) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="no cell goes on beyond them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="lines.jsonl of a run that was cut short")
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--ways", help="such as 'ours;non-private'; all by default")
    parser.add_argument("--cases", help="such as 64x4,ragged; all by default")
    parser.add_argument("--checks", type=int, default=200, help="of the clip")
    parser.add_argument("--device", help="cuda where there is one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
