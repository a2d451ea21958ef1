"""One cell of the benchmark in a process of its own: `python -m benchmarks.gpu.cell NAME`.

Every finding is a line of JSON on standard output as soon as it is known, so that a cell that is cut short keeps what
it had. The last line says how the cell ended.
"""

import argparse
import os
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu.cells import CELLS, Cell, size_of
from benchmarks.gpu.findings import (
    FAILED,
    FINISHED,
    IN_PART,
    OUT_OF_TIME,
    SKIPPED,
    Absent,
    Findings,
    in_a_line,
    read_lines,
)


def main() -> None:
    options = _options()
    sys.path += options.packages
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    known = read_lines(options.known) if options.known else []
    findings = Findings(options.cell, name, options.seconds, known)
    findings.say(started=True, device=name, torch=torch.__version__)
    began = time.monotonic()
    ended, why = _run(CELLS[options.cell], device, findings, options)
    reason = {"why": why} if why else {}
    findings.say(ended=ended, **reason, seconds=round(time.monotonic() - began, 1))


def _run(cell: Cell, device: torch.device, findings: Findings, options: argparse.Namespace) -> tuple[str, str]:
    """How it ended, and why if not well."""
    try:
        run(cell, device, findings, options)
    except Absent as absent:
        return SKIPPED, str(absent)
    except ModuleNotFoundError as error:
        return SKIPPED, f"{error.name} is not installed here"
    except torch.OutOfMemoryError:
        return FAILED, "out of memory"
    except Exception as error:
        traceback.print_exc()
        return FAILED, in_a_line(error)
    if findings.cut:
        return OUT_OF_TIME, "its share of the time was over"
    if cell.kind == "steps" and options.ways:
        return IN_PART, f"only {options.ways} was asked for"
    return FINISHED, ""


def run(cell: Cell, device: torch.device, findings: Findings, options: argparse.Namespace) -> None:
    """The cell's work; modules that only one kind needs are imported there."""
    match cell.kind:
        case "ceilings":
            from benchmarks.gpu.checks import ceilings

            ceilings(device, findings)
        case "clips":
            from benchmarks.gpu.checks import clips

            clips(device, findings, options.checks)
        case "rounds":
            _rounds(cell, device, findings, options.tiny)
        case "slices":
            from benchmarks.gpu.slices import slices

            slices(size_of(cell, options.tiny)[1], device, findings)
        case "steps":
            from benchmarks.gpu.ways import Setting, steps

            size = size_of(cell, options.tiny)[1]
            setting = Setting(size, device, cell.checkpointing, compiling=device.type == "cuda")
            steps(setting, findings, options.cases, options.ways, options.tables)


def _rounds(cell: Cell, device: torch.device, findings: Findings, tiny: bool) -> None:
    """Rounds end to end, by phase: 256 users with a row each in expectation."""
    if cell.engine == "ray":
        for package in ("flwr", "ray"):
            if find_spec(package) is None:
                raise Absent(f"{package} is not installed here; --packages names a folder with it")
    from benchmarks import round as whole

    arguments = ["--size", size_of(cell, tiny)[0], "--engine", cell.engine, "--rows", "1"]
    arguments += ["--rounds", "2", "--warm-up", "1", "--users", "3"] if tiny else ["--rounds", "6", "--warm-up", "3"]
    if device.type == "cuda":
        arguments += ["--precision", "bfloat16"]
    if not tiny:
        arguments += ["--users", "256"]
    words, line = whole.rounds(whole.options_of(arguments))
    findings.say(in_words=words, **line)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", choices=CELLS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing more is begun")
    parser.add_argument("--checks", type=int, default=200)
    parser.add_argument("--ways", default="")
    parser.add_argument("--cases", default="")
    parser.add_argument("--tables", type=Path, help="folder for tables of kernels")
    parser.add_argument("--known", type=Path, help="lines of an earlier run, whose complete parts are left out")
    parser.add_argument("--packages", action="append", default=[], help="folder of packages that are not installed")
    parser.add_argument("--tiny", action="store_true", help="a tiny model of the same kind in place of the cell's")
    return parser.parse_args()


if __name__ == "__main__":
    main()
