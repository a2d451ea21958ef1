"""`report`: write the report of a run or a comparison again."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from fedsim.errors import InvalidInput

PROMPTS = ("The", "This is", "In order to")
"""Beginnings that most kinds of text have."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write report.html from what a run folder holds, finished or not."""

    folder: Positional[Path]
    """The folder of a run or of a comparison."""
    samples: bool = False
    """Let the models before and after training go on with some prompts, for the report to show. Takes seconds for the
    default model, and no privacy: it follows from released weights. Language models alone."""
    prompt: tuple[str, ...] = PROMPTS
    """The prompts of --samples. They are shown: take public text."""

    def run(self) -> int:
        """Write the report and print where it is."""
        if not self.folder.is_dir():
            raise InvalidInput("folder", str(self.folder), "a folder that exists")
        if (self.folder / "sweep.json").exists():  # its points would be taken for the arms of a comparison
            hint = "Run the sweep again: it finds its points finished and writes its own report."
            raise InvalidInput("folder", str(self.folder), "the folder of a run or of a comparison", hint)
        if self.samples and not all(self.prompt):
            raise InvalidInput("prompt", self.prompt, "texts that are not empty, at least one")
        if not self.samples and self.prompt != PROMPTS:
            raise InvalidInput("samples", False, "given where there is a --prompt", "Add --samples.")
        from experiments.report.run import write_report

        print(f"report: {write_report(self.folder, self.prompt if self.samples else ())}")
        return 0
