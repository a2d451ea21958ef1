"""When fedsim's rounds begin and end, told by its own callbacks: `--callbacks benchmarks.peers.clock:Clock`."""

import json
import os
import time
from pathlib import Path
from typing import Any

from fedsim import Callback

FILE = "FEDSIM_PEERS_CLOCK"
"""The environment variable that names the file, where it writes a line for each record."""


class Clock(Callback):
    """Writes the seconds of the wall and of this process's processors at each record; record 0 is the model before."""

    def on_record(self, record: dict[str, Any]) -> None:
        line = {"round": record["round"], "wall": time.perf_counter(), "processor": time.process_time()}
        with Path(os.environ[FILE]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def elapsed(file: Path) -> dict[str, float]:
    """Seconds and processor seconds from the first line to the last."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    first, last = lines[0], lines[-1]
    return {"seconds": last["wall"] - first["wall"], "processor_seconds": last["processor"] - first["processor"]}
