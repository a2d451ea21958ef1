"""`sweep --select private`: runs of drawn settings, of which the best by a private score is released."""

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.face.outcomes import Swept
from experiments.selection.budget import SelectionBudget, budget_of
from experiments.selection.options import SelectionConfig
from experiments.selection.report import write_report
from experiments.selection.runs import PRIVATE, DrawnRun, at, drawn, require_selectable, settings_of
from experiments.sweep.points import CLAIM, Point, SweepConfig, content_of, require_allowed
from experiments.sweep.run import is_finished, partial_of, run_here, run_on_ray
from fedsim.config import RunConfig
from fedsim.errors import Failure, InvalidInput
from fedsim.models.fingerprint import tokenizer_fingerprint
from fedsim.privacy.check import charged, counted
from fedsim.privacy.ledger import Ledger, read_entries
from fedsim.privacy.selection import draw_runs
from fedsim.resources import Resources
from fedsim.seeds import Seeds
from fedsim.terminal import say
from server.results.run_folder import DATA, RunFolder, new_output_folder, write_json

PURPOSE = "selection"
SEEDS = "seeds"
"""Of each run, drawn with it, kept while the selection is unfinished: what was begun is repeated, not drawn anew."""
NOT_FOR_RELEASE = (
    "What is shown of single runs from here on is not private and must not be published: their names, how many there "
    "are, how each ends, and how long all of it takes"
)
UNFINISHED = "it was begun and not finished, and noise of --noise.secure cannot be repeated"


@dataclass(frozen=True)
class Selection:
    """A private selection in a folder.

    Attributes:
        common: What the runs share; plan.epsilon and plan.delta are those of the release.
        sweep: The grid.
        options: How many runs there are.
    """

    common: RunConfig
    sweep: SweepConfig
    options: SelectionConfig

    def run(self) -> Swept:
        """Run what is not finished, release the best, and write the report.

        Raises:
            InvalidInput: For what is no private selection, or another one than the folder holds.
            Failure: No run finished, or one was charged more than was planned: nothing is released.
        """
        from fedsim.resources import earlier_runs, open_resources

        require_selectable(self.common, self.sweep)
        settings = settings_of(self.sweep, self.common)
        for setting in settings:
            require_allowed(at(setting, 0, setting.epsilon, setting.epsilon), self.common, self.sweep)
        own = RunFolder(self.common.output or new_output_folder("selection"))
        own.require_unused()
        _require_no_sweep(own.path)
        resources = open_resources(self.common)
        if earlier_runs(self.common, resources.loaded.source).entries:
            hint = "A selection's bound does not add up with what was released before."
            allowed = "a model that no earlier run on private data made"
            raise InvalidInput("model.path", self.common.model.path, allowed, hint)
        budget = self._budget(settings, resources)
        with own.hold:
            own.make()
            _require_no_sweep(own.path)  # again: now nobody else writes here
            return self._select(settings, budget, own.path, resources)

    def _budget(self, settings: Sequence[Point], resources: Resources) -> SelectionBudget:
        from fedsim.plan import UserSizes

        store = resources.store
        sizes = UserSizes.of_users(store.split("train"))
        return budget_of(settings, self.common, sizes, store.split("validation").num_users, self.options)

    def _select(
        self, settings: Sequence[Point], budget: SelectionBudget, folder: Path, resources: Resources | None
    ) -> Swept:
        """The same in the selection's own folder, which no other process works in."""
        from experiments.selection.release import SELECTED, write_release
        from experiments.selection.words import cost_in_words, statement_of

        private, selected = folder / PRIVATE, folder / SELECTED
        if self.sweep.nonprivate:
            say("no run without privacy: whoever saw one would know more than the selection's ε covers")
        say(cost_in_words(len(settings), budget, self.common.plan.delta))
        runs = self._drawn(settings, budget, private, {} if resources is None else _content(resources))
        if not selected.exists():
            self._run_all(runs, private)
            best = _best(runs, private, budget)
            run = json.loads((private / best.name / "privacy.json").read_text(encoding="utf-8"))
            summary = json.loads((private / best.name / "summary.json").read_text(encoding="utf-8"))
            statement = statement_of(run, settings[self._number(best, private)], settings, summary, budget)
            config = best.config(self.common, private / best.name)
            write_release(private / best.name, selected, private / "ledger.jsonl", statement, config, resources)
        for path in private.glob("run-*"):
            shutil.rmtree(path)
        shutil.rmtree(private / SEEDS, ignore_errors=True)
        _forget_data(private / "drawn.json")
        statement = json.loads((selected / "privacy.json").read_text(encoding="utf-8"))
        report = write_report(folder, statement, cost_in_words(len(settings), budget, self.common.plan.delta))
        # Which runs failed, and how many, is not for release.
        return Swept(folder, points=[statement["selection"]["selected"]], report=report)

    def _drawn(
        self, settings: Sequence[Point], budget: SelectionBudget, private: Path, content: Mapping[str, str]
    ) -> list[DrawnRun]:
        """The runs: drawn and charged once, and written down before any begins.

        Args:
            settings, budget: What is drawn from, and what it costs.
            private: Where what was drawn stays.
            content: Of data and model, by which a selection that goes on is known.
        """
        claim = {
            "common": json.loads(json.dumps(content_of(self.common))),
            "settings": [setting.name for setting in settings],
            "selection": {"expected_runs": self.options.runs, "eta": self.options.eta},
            "run_epsilon": budget.run_epsilon,
            **content,
        }
        path = private / "drawn.json"
        if path.exists():
            written = json.loads(path.read_text(encoding="utf-8"))
            before = {DATA: claim.get(DATA)} | written["claim"]  # a selection that is done keeps nothing of its data
            changed = [name for name in claim if before.get(name) != claim[name]]
            if changed:
                hint = f"Its selection differs in: {', '.join(changed)}."
                raise InvalidInput("output", str(private.parent), "a new folder", hint)
        else:
            private.mkdir(mode=0o700, parents=True, exist_ok=True)
            count = draw_runs(budget.event.eta, budget.event.gamma)
            places = drawn(len(settings), count)
            self._draw_seeds(_runs(settings, places, budget), private / SEEDS)
            written = {
                "not_for_release": "How many runs there are and what they drew must stay secret.",
                "claim": claim,
                "settings": places,
            }
            write_json(path, written)
        if not (private / "ledger.jsonl").exists() or not read_entries(private / "ledger.jsonl"):
            with Ledger.open(private / "ledger.jsonl") as ledger:
                ledger.charge(budget.event, round=0, purpose=PURPOSE)
        return _runs(settings, written["settings"], budget)

    def _draw_seeds(self, runs: Sequence[DrawnRun], folder: Path) -> None:
        """Draw what each run's sampling and noise come from, all of it on disk before any run begins."""
        shutil.rmtree(folder, ignore_errors=True)  # of runs that were never begun
        folder.mkdir(mode=0o700)
        for run in runs:
            Seeds.drawn(run.config(self.common, folder)).store(folder / f"{run.name}.json")

    def _number(self, run: DrawnRun, private: Path) -> int:
        """Which setting a run drew."""
        written: dict[str, Any] = json.loads((private / "drawn.json").read_text(encoding="utf-8"))
        return int(written["settings"][run.seed])

    def _run_all(self, runs: Sequence[DrawnRun], private: Path) -> None:
        """Run what is not finished. What failed is not run again: it counts as the worst, like any other outcome.

        What was begun and not finished is done again from the same seeds, so that whoever stopped it, and why, has no
        part in what comes out. Where noise has no seed it failed.
        """
        failures = private / "failures"
        failures.mkdir(exist_ok=True)
        for run in runs:
            if self.common.noise.secure and partial_of(private, run).exists():
                note = failures / f"{run.name}.txt"
                if not note.exists():
                    note.write_text(UNFINISHED, encoding="utf-8")
                    print(f"{run.name} FAILED, which counts as the worst score: {UNFINISHED}", file=sys.stderr)
        left: list[Point] = [
            run for run in runs if not is_finished(private, run) and not (failures / f"{run.name}.txt").exists()
        ]
        if left:
            say(NOT_FOR_RELEASE)
        seeds = {run.name: Seeds.read(private / SEEDS / f"{run.name}.json") for run in left}
        if left and self.common.engine.kind == "local":
            ends = run_here(left, self.common, private, True, seeds)
        else:
            slots = self.sweep.slots
            ends = run_on_ray(left, self.common, private, True, slots, seeds, retries=0) if left else iter(())
        for end in ends:
            if end.error is not None:
                (failures / f"{end.point.name}.txt").write_text(end.error, encoding="utf-8")
            state = "finished" if end.error is None else "FAILED, which counts as the worst score"
            print(f"{end.point.name} {state}", file=sys.stderr, flush=True)


def _require_no_sweep(folder: Path) -> None:
    """Refuse a folder with a sweep in it, whose results and points no selection's ε covers."""
    if (folder / CLAIM).exists():
        hint = f"It has a sweep in it ({CLAIM}), whose results a selection would overwrite."
        raise InvalidInput("output", str(folder), "a new folder", hint)


def _content(resources: Resources) -> dict[str, str]:
    """Fingerprints of data, tokenizer and weights, by their names in what a run is known by."""
    return {
        DATA: resources.store.fingerprint,
        "tokenizer": tokenizer_fingerprint(resources.loaded.tokenizer),
        "model": resources.weights,
    }


def _forget_data(drawn: Path) -> None:
    """Remove the fingerprint of the data, which no noise protects, as a finished run does."""
    written = json.loads(drawn.read_text(encoding="utf-8"))
    if written["claim"].pop(DATA, None) is not None:
        write_json(drawn, written)


def _runs(settings: Sequence[Point], places: Sequence[int], budget: SelectionBudget) -> list[DrawnRun]:
    """The runs, of the places in the grid that they drew."""
    return [
        at(settings[place], number, budget.run_epsilon, budget.score_epsilon) for number, place in enumerate(places)
    ]


def _score(private: Path, run: Point) -> float:
    """The change of held-out users' loss that a run released; ∞ for one that failed, or that released no number."""
    path = private / run.name / "summary.json"
    if not path.exists():
        return math.inf
    value = json.loads(path.read_text(encoding="utf-8")).get("private_change")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.inf


def _best(runs: Sequence[DrawnRun], private: Path, budget: SelectionBudget) -> DrawnRun:
    """The run of least score, the first of equal ones.

    Raises:
        Failure: None has a score, or one was charged for more than the selection counts.
    """
    best = min(runs, key=lambda run: _score(private, run))
    if math.isinf(_score(private, best)):
        raise Failure(f"no run of the selection finished, and nothing is released; see {private / 'failures'}")
    planned = [case for event in budget.event.events for case in counted(event)]
    for run in runs:
        if (ledger := private / run.name / "ledger.jsonl").exists():
            cases = charged(entry.event for entry in read_entries(ledger))
            if not all(any(case <= other for other in planned) for case in cases):
                raise Failure(f"{run.name} was charged for more than the selection counts: nothing is released")
    return best


def selection_of(sweep: RunConfig, varied: SweepConfig, options: SelectionConfig) -> Selection:
    """The private selection that a command asks for."""
    common = RunConfig(**{item.name: getattr(sweep, item.name) for item in dataclasses.fields(RunConfig)})
    return Selection(common, varied, options)
