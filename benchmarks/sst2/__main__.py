"""EW-Tune, ANADP and LMO-DP on SST-2: `python -m benchmarks.sst2 --data FOLDER`.

Each way to privatise fine-tunes the same small model on the same sentences at the same ε, and what its ε is worth
stands beside it: certified, estimated, or neither. A line of JSON for each row, and then the tables of docs/sst2.md.
Rows that are finished in the output folder are not run again.
"""

import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.sst2.claims import NONE, scalar_law, vector_delta
from benchmarks.sst2.rows import Settings, finished, measured, rows, write_lines
from benchmarks.sst2.table import markdown
from experiments.command_line.signals import Terminated, ending_by_signals
from fedsim.errors import InvalidInput
from server.precautions.stopping import Stopped


@dataclass(frozen=True, kw_only=True)
class Sst2Benchmark:
    """Fine-tune a small model on SST-2 by each method."""

    data: Path
    """Folder with sst2_train.parquet and sst2_dev.parquet (columns text and label)."""
    output: Path = Path("runs/sst2")
    """Where rows are kept."""
    model: str = "default"
    """Folder of a model in Hugging Face format, or default."""
    layers: int = 1
    """Blocks of the default model."""
    width: int = 32
    """Width of the default model."""
    epsilons: tuple[float, ...] = (1.0, 8.0)
    """Targets."""
    delta: float = 1e-5
    """δ."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Of sampling and noise; every row is trained once with each."""
    rounds: int = 30
    """Rounds."""
    cohort: int = 1024
    """Sentences in a round, in expectation."""
    clip_norm: float = 5.0
    """L2 norm to which Gaussian rows clip a sentence's gradient."""
    l1_clip_norm: float = 1000.0
    """L1 norm to which the Laplace row does."""
    learning_rate: float = 1e-2
    """Adam's, for all rows."""
    dimensions: tuple[int, ...] = (1, 100, 10_000)
    """Of the vectors that LMO-DP's claim is tried on."""

    def run(self) -> int:
        """The exit code.

        Raises:
            InvalidInput: Data that is not there, or an output folder of other settings.
        """
        shared = {name: getattr(self, name) for name in Settings.__dataclass_fields__}
        settings = Settings(**shared)
        self.output.mkdir(parents=True, exist_ok=True)
        write_lines(self.data, self.output)
        found = []
        for row in rows(self.epsilons, self.seeds):
            one = finished(row, settings, self.output) or measured(row, settings, self.output)
            found.append(one)
            print(json.dumps({name: value for name, value in one.items() if name != "settings"}), flush=True)
        controls = list(self._controls())
        for one in controls:
            print(json.dumps(one), flush=True)
        print(f"\n{markdown(found, controls)}")
        seconds = round(sum(one["processor_seconds"] for one in found), 1)
        print(json.dumps({"benchmark": "sst2", "rows": len(found), "sst2.processor_seconds": seconds}))
        return 0

    def _controls(self) -> Iterator[dict[str, Any]]:
        for epsilon in self.epsilons:
            law = scalar_law(epsilon)
            for dimension in self.dimensions:
                delta, error = vector_delta(law, epsilon, dimension)
                told = {"control": "lmo-dp in L2", "epsilon": epsilon, "dimension": dimension, "claimed_delta": 0.0}
                worth = "a guarantee" if dimension == 1 else NONE
                yield told | {"delta": delta, "error": error, "worth": worth}


def main() -> int:
    """0 done, 2 bad input, 128 + n ended by signal n."""
    benchmark = tyro.cli(Sst2Benchmark)
    try:
        with ending_by_signals():
            return benchmark.run()
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 2
    except Stopped as stopped:
        code = stopped.exit_code
    except KeyboardInterrupt as ended:
        code = 128 + (ended.number if isinstance(ended, Terminated) else signal.SIGINT)
    print(f"ended; the same command goes on behind the rows finished in {benchmark.output}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
