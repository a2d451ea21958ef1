"""The command: `python -m benchmarks.regime --corpora FOLDER --output FOLDER`."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.regime.outcomes import gathered
from benchmarks.regime.page import write_page
from benchmarks.regime.predictor import predictor
from benchmarks.regime.rates import PILOTS, Rates
from benchmarks.regime.scores import scored
from benchmarks.regime.studies import MODEL, STUDIES, SYNTHETIC, Study, file_of, sweeps_of
from fedsim.errors import InvalidInput
from server.results.run_folder import write_json

FINISHED = "finished.json"
"""In a sweep's folder: the command that finished it, and the seconds of all attempts."""


@dataclass(frozen=True, kw_only=True)
class Regime:
    """Run the study, or what is left of it, and write its tables and figures."""

    corpora: Path
    """The folder that has the corpora and the model, as `benchmarks/regime/studies.py` names them."""
    output: Path = Path("runs/regime")
    """Where sweeps go, one folder each. A study that was interrupted goes on with the same command."""
    only: tuple[str, ...] = ()
    """Names of studies; by default all of them."""
    longer: bool = False
    """Also those that take longer than all the others together."""
    page: Path | None = None
    """A page whose part between the study's marks is written anew, with its figures beside it."""
    commands: bool = False
    """Print the commands that are left, and run nothing."""

    def run(self) -> int:
        """1 where a point failed, and else 0."""
        studies = self._studies()
        needed = {MODEL, *(file_of(study.corpus) for study in studies)}
        missing = [one for one in needed if not (self.corpora / one).exists()]
        if missing:
            raise InvalidInput("corpora", str(self.corpora), f"a folder that has {', '.join(sorted(missing))}")
        failed = self._all((pilot.name, pilot.arguments(self.corpora / MODEL, self.output)) for pilot in PILOTS)
        if failed or (self.commands and not self._piloted()):
            return int(failed)
        rates = Rates.read(self.output)
        for study in studies:
            print(f"\n{study.name}: {study.asks}", flush=True)
            if study.corpus in SYNTHETIC and not self.commands:
                SYNTHETIC[study.corpus].write(self.corpora, self.output)
            sweeps = sweeps_of(study, rates)
            failed |= self._all((one.name, one.arguments(self.corpora, self.output)) for one in sweeps)
        if not self.commands:
            results = gathered(self.output, STUDIES, rates)
            scores = list(scored(*predictor(results, self.corpora, self.output)))
            write_page(self.output, results, rates, scores, self.page)
        return int(failed)

    def _studies(self) -> list[Study]:
        known = [study.name for study in STUDIES]
        for name in self.only:
            if name not in known:
                raise InvalidInput("only", name, "one of " + ", ".join(known))
        if self.only:
            return [study for study in STUDIES if study.name in self.only]
        return [study for study in STUDIES if self.longer or not study.longer]

    def _piloted(self) -> bool:
        return all((self.output / pilot.name / FINISHED).exists() for pilot in PILOTS)

    def _all(self, sweeps: Iterable[tuple[str, list[str]]]) -> bool:
        """Run those that are not finished; whether one failed."""
        failed = False
        for name, arguments in sweeps:
            finished = self.output / name / FINISHED
            before = json.loads(finished.read_text(encoding="utf-8")) if finished.exists() else {"arguments": None}
            if before["arguments"] == arguments:
                continue
            print(f"python -m experiments.run {shlex.join(arguments)}", flush=True)
            if self.commands:
                continue
            began = time.perf_counter()
            done = subprocess.run([sys.executable, "-m", "experiments.run", *arguments])
            if done.returncode:
                failed = True
                print(f"{name} ended with {done.returncode}; the same command goes on with it", file=sys.stderr)
                continue
            write_json(finished, {"arguments": arguments, "seconds": time.perf_counter() - began})
        return failed


def main() -> int:
    """The command line."""
    try:
        return tyro.cli(Regime, prog="python -m benchmarks.regime").run()
    except InvalidInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
