"""`train`: fine-tune with one algorithm."""

import dataclasses
import sys
from dataclasses import dataclass

from experiments.resume import how_to_go_on
from fedsim.config import RunConfig
from server.precautions.stopping import Stopped
from server.results.run_folder import RunFolder, new_output_folder


@dataclass(frozen=True, kw_only=True)
class Train(RunConfig):
    """Fine-tune a language model with user-level differential privacy, by one algorithm."""

    def run(self) -> int:
        """Train, write the run folder and its report, print the outcome."""
        from experiments.face.fine_tune import trained
        from experiments.report.run import print_table

        config = dataclasses.replace(self, output=self.resume or self.output or new_output_folder(self.plan.algorithm))
        try:
            tuned = trained(config)
        except KeyboardInterrupt:
            print(how_to_go_on(RunFolder(str(config.output))), file=sys.stderr)
            raise
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return stopped.exit_code
        report = tuned.report()
        print_table([tuned.summary])
        print(f"report: {report}")
        return 0
