"""`train`: fine-tune with one algorithm."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.report.run import print_table, write_report
from experiments.resume import how_to_go_on
from fedsim.config import RunConfig
from server.app import new_output_folder, train
from server.precautions.stopping import Stopped
from server.results.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Train(RunConfig):
    """Fine-tune a language model with user-level differential privacy, by one algorithm."""

    def run(self) -> int:
        """Train, write the run folder and its report, print the outcome."""
        from experiments.simulation import simulated_clients
        from fedsim.models.sources import find_source
        from fedsim.resources import earlier_runs

        output = self.resume or self.output or new_output_folder(self.plan.algorithm)
        if self.resume is None and Path(self.model.path).expanduser().is_dir():
            earlier_runs(self, find_source(self.model.path))  # a spent budget is found before anything is begun
        folder = RunFolder(output)  # an unwritable folder is found before anything is computed
        if self.resume is None:
            folder.require_unused()
        config = dataclasses.replace(self, output=output)
        try:
            with simulated_clients(config) as grid:
                summary = train(grid, config)
        except KeyboardInterrupt:
            print(how_to_go_on(folder), file=sys.stderr)
            raise
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return stopped.exit_code
        report = write_report(Path(output))
        print_table([summary])
        print(f"report: {report}")
        return 0
