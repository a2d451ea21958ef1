"""What a GPU makes of the clipped sum: `python -m benchmarks.gpu --minutes 9 --out DIR`.

Needs torch, transformers, peft and, for the kernels, Triton; the cell of rounds pyarrow, the plot matplotlib. What is
not there is left out, and the page says so. Opacus, and Flower and Ray for rounds with messages, may lie in a folder
that `--packages` names (`pip install --no-deps --target FOLDER opacus==1.6.0 opt_einsum`).

The cells run in order of worth, each in a process of its own and with a share of the time that is left; what a cell
does not use goes to those behind it. What it finds is kept line by line in DIR/lines.jsonl, so that a run that was cut
short is worth what it had time for. `--resume DIR/lines.jsonl` leaves out what is complete there and does the rest;
`--minutes 0` writes the page again. At the end a page with tables and a plot is in DIR. `--device cpu --tiny` tries
all of it on a machine without a GPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.cells import CELLS
from benchmarks.gpu.findings import FAILED, FINISHED, OUT_OF_TIME, endings, read_lines
from benchmarks.gpu.page import write_page

LEAST_SECONDS = 10
"""With less, a cell is not begun."""
GRACE_SECONDS = 60
"""After its share of the time a cell may end what it has begun, such as a compilation."""


def main() -> None:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "lines.jsonl"
    known = read_lines(options.resume) if options.resume else []
    path.write_text("".join(json.dumps(line) + "\n" for line in known))
    finished = {cell for cell, line in endings(known).items() if line["ended"] == FINISHED}
    cells = [cell for cell in options.cells if cell not in finished]
    end = time.monotonic() + 60 * options.minutes
    for number, cell in enumerate(cells):
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            break
        share = left * CELLS[cell].share / sum(CELLS[other].share for other in cells[number:])
        print(f"{cell}: {share:.0f} s of {left:.0f} s", file=sys.stderr, flush=True)
        run_cell(cell, options, max(share, LEAST_SECONDS), left, path)
    print(write_page(read_lines(path), options.out))


def run_cell(cell: str, options: argparse.Namespace, share: float, left: float, path: Path) -> None:
    """One cell in a process of its own; its lines go to the file as they come."""
    command = [sys.executable, "-m", "benchmarks.gpu.cell", cell, "--checks", str(options.checks)]
    command += ["--tables", str(options.out / "kernels"), "--known", str(path), "--seconds", str(share)]
    for name in ("device", "ways", "cases"):
        if getattr(options, name):
            command += [f"--{name}", getattr(options, name)]
    for folder in options.packages:
        command += ["--packages", str(folder.resolve())]
    command += ["--tiny"] if options.tiny else []
    began = time.monotonic()
    code = run_process(command, path, min(left, share + GRACE_SECONDS))
    if code != 0:
        reason = (OUT_OF_TIME, "it was stopped") if code is None else (FAILED, f"its process ended with code {code}")
        with path.open("a") as file:
            ending = {"cell": cell, "ended": reason[0], "why": reason[1]}
            file.write("\n" + json.dumps(ending | {"seconds": round(time.monotonic() - began, 1)}) + "\n")


def run_process(command: list[str], path: Path, seconds: float) -> int | None:
    """Its exit code; None where it was stopped, with all processes that it has started."""
    with path.open("a") as file:
        process = subprocess.Popen(command, stdout=file, start_new_session=True)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="no cell goes on beyond them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="lines.jsonl of a run that was cut short")
    parser.add_argument("--cells", type=_names, default=list(CELLS), help=f"of {', '.join(CELLS)}")
    parser.add_argument("--ways", help="such as 'ours;non-private'; all by default")
    parser.add_argument("--cases", help="such as 64x4,ragged-64x16; all by default")
    parser.add_argument("--checks", type=int, default=200, help="of the clip")
    parser.add_argument("--device", help="cuda where there is one")
    parser.add_argument("--packages", type=Path, action="append", default=[], help="folder of packages not installed")
    parser.add_argument("--tiny", action="store_true", help="tiny models in place of the cells' own, for a trial")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    unknown = [name for name in text.split(",") if name not in CELLS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no cell {unknown[0]}; there are {', '.join(CELLS)}")
    return text.split(",")


if __name__ == "__main__":
    main()
