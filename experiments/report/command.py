"""`report`: write the report of a finished run or comparison again."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from fedsim.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write report.html and its figures from what a run folder holds."""

    folder: Positional[Path]
    """The folder of a run or of a comparison."""

    def run(self) -> int:
        """Write the report and print where it is."""
        if not self.folder.is_dir():
            raise InvalidInput("folder", str(self.folder), "a folder that exists")
        if (self.folder / "sweep.json").exists():  # its points would be taken for the arms of a comparison
            hint = "Run the sweep again: it finds its points finished and writes its own report."
            raise InvalidInput("folder", str(self.folder), "the folder of a run or of a comparison", hint)
        from experiments.report.run import write_report

        print(f"report: {write_report(self.folder)}")
        return 0
