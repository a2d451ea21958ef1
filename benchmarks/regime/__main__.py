"""The command: `python -m benchmarks.regime --corpora FOLDER --output FOLDER`."""

import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command_line import run_benchmark
from benchmarks.regime.kept import Named, Shelf
from benchmarks.regime.outcomes import gathered
from benchmarks.regime.page import write_page
from benchmarks.regime.predictor import predictor
from benchmarks.regime.rates import MODEL, PILOTS, Rates
from benchmarks.regime.scores import scored
from benchmarks.regime.studies import STUDIES, SYNTHETIC, Study, file_of, sweeps_of
from fedsim.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Regime:
    """Run the study, or what is left of it, and write its tables and figures."""

    corpora: Path
    """The folder that has the corpora and the model, as `benchmarks/regime/studies.py` names them."""
    output: Path = Path("runs/regime")
    """Where sweeps go, one folder each. A study that was interrupted goes on with the same command."""
    kept: Path | None = None
    """Where the results of finished sweeps are kept, a small file each, and none is run again that is there with the
    same settings: the study can go on from these on another machine. By default a folder in the output."""
    only: tuple[str, ...] = ()
    """Names of studies; by default all of them."""
    longer: bool = False
    """Also the studies that are marked so: of how compute is split, of regrouped and made-up users, of the largest
    compute, and of other ε."""
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
        shelf = Shelf(self.kept or self.output / "kept", self.corpora)
        asked = {place.rounds for study in studies for place in study.places}
        pilots = [one for one in PILOTS if not one.longer or one.rounds in asked]
        failed = self._all(pilots, shelf)
        if failed or (self.commands and any(shelf.find(pilot) is None for pilot in pilots)):
            return int(failed)
        rates = Rates.read(shelf)
        for study in studies:
            print(f"\n{study.name}: {study.asks}", flush=True)
            sweeps = list(sweeps_of(study, rates))
            if study.corpus in SYNTHETIC and not (self.commands or all(shelf.find(one) for one in sweeps)):
                SYNTHETIC[study.corpus].write(self.corpora, self.output)
            failed |= self._all(sweeps, shelf)
        if not self.commands:
            results = gathered(shelf, STUDIES, rates)
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

    def _all(self, sweeps: Iterable[Named], shelf: Shelf) -> bool:
        """Run those that are not finished; whether one failed."""
        failed = False
        for sweep in sweeps:
            if shelf.find(sweep) is not None:
                continue
            arguments = sweep.arguments(self.corpora, self.output)
            print(f"python -m experiments.run {shlex.join(arguments)}", flush=True)
            if self.commands:
                continue
            done = subprocess.run([sys.executable, "-m", "experiments.run", *arguments])
            if done.returncode:
                failed = True
                print(f"{sweep.name} ended with {done.returncode}; the same command goes on with it", file=sys.stderr)
                continue
            shelf.keep(sweep, self.output)
        return failed


if __name__ == "__main__":
    sys.exit(run_benchmark(Regime))
