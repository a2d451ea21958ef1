"""`train`: fine-tune with one algorithm."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from experiments.report import print_table, write_report
from fedsim.config import RunConfig
from server.app import new_output_folder, train
from server.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Train(RunConfig):
    """Fine-tune a language model with user-level differential privacy, by one algorithm."""

    def run(self) -> int:
        """Train, write the run folder and its report, print the outcome."""
        from experiments.simulation import simulated_clients

        output = self.output or new_output_folder(self.plan.algorithm)
        RunFolder(output)  # an unwritable folder is found before anything is computed
        config = dataclasses.replace(self, output=output)
        with simulated_clients(config) as grid:
            summary = train(grid, config)
        report = write_report(Path(output))
        print_table([summary])
        print(f"report: {report}")
        return 0
