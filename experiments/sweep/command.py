"""`sweep`: the fixed-compute comparison over algorithms, ε, compute, group sizes, learning rates, clips and seeds."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments.face.outcomes import Swept
from experiments.prediction import Prediction, predict
from experiments.selection.options import SelectionConfig
from experiments.selection.runs import PRIVATE, require_kind
from experiments.sweep.clipping import decided, in_words, may_leave_out, needless, waves_of
from experiments.sweep.points import ARM_TITLES, CLAIM, Point, SweepConfig, content_of, points_of, require_allowed
from experiments.sweep.results import cells_of, collect, worth_repeating
from experiments.sweep.run import Finished, is_finished, run_here, run_on_ray
from fedsim.config import RunConfig
from fedsim.errors import Failure, InvalidInput
from fedsim.plan import ALGORITHMS
from server.precautions.stopping import Stopped
from server.results.run_folder import RunFolder, new_output_folder, write_json

HEADINGS = ("", "ε", "B", "G", "learning rate", "clip", "bands", "average", "test loss", "± 95 %", "seeds")
NOTHING = "–"


@dataclass(frozen=True, kw_only=True)
class Sweep(RunConfig):
    """Compare ULS and ELS at fixed compute over a grid of settings, several seeds each.

    Each point is one run of `train`, in a folder of its own. A sweep that was interrupted goes on with the same
    command: finished points are not run again, failed ones are.
    """

    CHOOSES = "settings"

    sweep: SweepConfig = field(default_factory=SweepConfig)
    """What varies."""
    select: str = "none"
    """private: draw settings from the grid, run them, and release the best by a private score alone, at plan.epsilon
    in total. Without it all points are compared, and choosing one costs what all of them cost together."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """How many runs a private selection is among."""

    def __post_init__(self) -> None:
        require_kind(self.select)
        if self.select == "private":
            object.__setattr__(self, "CHOOSES", "")  # what it chooses is accounted for
        elif self.selection != SelectionConfig():
            raise InvalidInput("selection", self.selection, "left out without --select private")
        super().__post_init__()

    def common(self) -> RunConfig:
        """The configuration that all points share."""
        return RunConfig(**{item.name: getattr(self, item.name) for item in dataclasses.fields(RunConfig)})

    def run(self) -> int:
        """Run what is not finished, write results.json and the report; 1 if a point failed."""
        from experiments.report.sweep import RESULTS

        folder = self.output or new_output_folder("sweep")
        try:
            swept = dataclasses.replace(self, output=folder).swept()
        except Stopped as stopped:
            print(f"stopped after a round of {Path(stopped.folder).stem}; {how_to_go_on(folder)}", file=sys.stderr)
            return stopped.exit_code
        except KeyboardInterrupt:
            print(how_to_go_on(folder), file=sys.stderr)
            raise
        print(json.loads((swept.folder / RESULTS).read_text(encoding="utf-8"))["privacy_cost"]["in_words"])
        print(f"report: {swept.report}")
        return 1 if swept.failures else 0

    def swept(self) -> Swept:
        """Run what is not finished, write results.json and the report.

        Raises:
            Failure: No point finished.
        """
        from fedsim.resources import open_resources
        from server.callbacks import require_callbacks

        require_callbacks(self)
        if self.select == "private":
            from experiments.selection.command import selection_of

            return selection_of(self, self.sweep, self.selection).run()
        self._require_losses()
        points = points_of(self.sweep, self)
        common = self.common()
        own = RunFolder(self.output or new_output_folder("sweep"))
        folder = own.path
        own.require_unused()
        for point in points:
            require_allowed(point, common, self.sweep)  # before anything runs
        self._require_same(folder)
        open_resources(common)  # built once here, found in the cache by every point
        with own.hold:
            own.make()
            self._require_same(folder)  # again: now nobody else writes here
            return self._swept(points, common, folder)

    def _require_losses(self) -> None:
        """Refuse a sweep whose points would tell no loss to compare, or that one of its arms cannot tell privately."""
        if not self.evaluation.private:
            return
        if not self.writes_training_metrics:
            hint = "A sweep compares losses without noise; --select private chooses by released ones."
            raise InvalidInput("training-metrics", self.training_metrics, "on with --evaluation.private", hint)
        if self.sweep.nonprivate:
            hint = "Fine-tuning without noise releases nothing privately."
            raise InvalidInput("sweep.nonprivate", True, "off (--sweep.no-nonprivate) with --evaluation.private", hint)

    def _swept(self, points: list[Point], common: RunConfig, folder: Path) -> Swept:
        """The same in the sweep's own folder, which no other process works in."""
        from experiments.report.sweep import write_sweep_report

        looked = decided(folder / CLAIM) or may_leave_out(points, common)
        claim = {"common": content_of(common), "sweep": dataclasses.asdict(self.sweep), "leaves_out": looked}
        write_json(folder / CLAIM, claim)
        asked = points
        points, failures = self._run_all(points, common, folder)
        left_out = self._left_out(asked, common, folder)
        finished = collect(folder)
        rows = [row for row in finished if row["point"] in {point.name for point in points}]
        if not rows:
            raise Failure(f"No point finished; see {folder / 'failures'}.")
        Console().print(best_settings(rows))
        if left_out:
            Console().print(in_words(left_out), highlight=False)
        predictions = self._predict(common, points)
        chosen = self.sweep.repeat == "best"
        report = write_sweep_report(folder, rows, finished, predictions, failures, chosen, left_out, looked=looked)
        return Swept(folder, points=rows, report=report, failures=failures)

    def _run_all(self, points: list[Point], common: RunConfig, folder: Path) -> tuple[list[Point], dict[str, str]]:
        """Run all points, or each combination once and the best of each arm again; returns those, and failures."""
        if self.sweep.repeat == "all":
            return points, self._run_points(points, common, folder)
        once = [point for point in points if point.seed == 0]
        failures = self._run_points(once, common, folder)
        names = {point.name for point in once}
        best = worth_repeating(row for row in collect(folder) if row["point"] in names)
        again = [point for point in points if point.seed and dataclasses.replace(point, seed=0).name in best]
        return once + again, failures | self._run_points(again, common, folder)

    def _left_out(self, points: list[Point], common: RunConfig, folder: Path) -> list[str]:
        """Points that did not run because a larger clip norm does the same, by name."""
        if not may_leave_out(points, common):
            return []
        if self.sweep.repeat == "best":
            points = [point for point in points if point.seed == 0]  # others run only where the first did best
        return [p.name for p in points if not is_finished(folder, p) and needless(p, points, folder)]

    def _require_same(self, folder: Path) -> None:
        """Refuse a folder whose points came from other common settings, or that has a private selection in it."""
        if (folder / PRIVATE).exists():
            hint = f"It has a private selection in it ({PRIVATE}), whose results a sweep would overwrite."
            raise InvalidInput("output", str(folder), "a new folder", hint)
        default = content_of(RunConfig())  # what a folder of an earlier version lacks was as by default
        flat = default | content_of(self.common())
        path = folder / CLAIM
        if path.exists():
            known = default | json.loads(path.read_text(encoding="utf-8"))["common"]
            varied = {"plan.epsilon", "plan.gradients-per-round", "plan.group-size", "plan.clip-norm"}
            varied |= {"plan.algorithm", "plan.bands", "optimizer.learning-rate", "optimizer.average"}
            names = (set(known) | set(flat)) - varied
            changed = sorted(name for name in names if known.get(name) != json.loads(json.dumps(flat.get(name))))
            if changed:
                raise InvalidInput(
                    "output", str(folder), "a new folder", f"Its points differ in: {', '.join(changed)}."
                )

    def _run_points(self, points: list[Point], common: RunConfig, folder: Path) -> dict[str, str]:
        """Run the unfinished points, larger clip norms first where they may make smaller ones needless."""
        if not may_leave_out(points, common):
            return self._run_wave(points, common, folder)
        failures: dict[str, str] = {}
        for wave in waves_of(points):
            needed = [point for point in wave if not needless(point, points, folder)]
            failures |= self._run_wave(needed, common, folder)
        return failures

    def _run_wave(self, points: list[Point], common: RunConfig, folder: Path) -> dict[str, str]:
        """Run the unfinished points under a live table; returns the failures by point name."""
        left = [point for point in points if not is_finished(folder, point)]
        failures: dict[str, str] = {}
        if not left:
            return failures
        keep = self.sweep.keep_models
        here = self.engine.kind == "local"
        if here:
            ends = run_here(left, common, folder, keep)
        else:
            ends = run_on_ray(left, common, folder, keep, self.sweep.slots)
        for end in _shown(ends, len(points), len(left), folder, live=not here):
            note = folder / "failures" / f"{end.point.name}.txt"
            note.unlink(missing_ok=True)
            if end.error is not None:
                failures[end.point.name] = end.error.strip().splitlines()[-1]
                note.parent.mkdir(exist_ok=True)
                note.write_text(end.error, encoding="utf-8")
        return failures

    def _predict(self, common: RunConfig, points: list[Point]) -> dict[tuple[float, int], Prediction]:
        """The planner's prediction at each ε and compute, with gradient norms measured on public users if possible."""
        from experiments.plan.command import PUBLIC_USERS
        from experiments.public_norms import measure_curves
        from fedsim.data.ingest import open_or_build
        from fedsim.resources import open_resources

        resources = open_resources(common)
        curve = None
        if common.model.task == "causal-lm":
            length = max(resources.row_tokens, PUBLIC_USERS.minimum_tokens)
            public = dataclasses.replace(PUBLIC_USERS, sequence_length=length)
            view = open_or_build(public, resources.loaded.tokenizer)
            curve, _ = measure_curves(resources.loaded.model, resources.loaded.objective, view)
        train = resources.store.split("train")
        predictions: dict[tuple[float, int], Prediction] = {}
        for key in sorted({(p.epsilon, p.gradients_per_round) for p in points if p.arm != "nonprivate"}):
            here = [p for p in points if (p.epsilon, p.gradients_per_round) == key]
            groups = {arm: sorted({p.group_size for p in here if p.arm == arm}) for arm in ALGORITHMS}
            if all(groups.values()):
                point = here[0].config(common, Path(common.output or "."))
                predictions[key] = predict(point, train, groups, curve)
        return predictions


def how_to_go_on(folder: str) -> str:
    """What to do about a sweep that was ended."""
    if not any((Path(folder) / name).exists() for name in (CLAIM, PRIVATE)):
        return "nothing was begun; give the same command again"
    return f"go on with the same command and --output {folder}: points that are finished are not run again"


def _shown(ends: Iterator[Finished], total: int, left: int, folder: Path, *, live: bool) -> Iterator[Finished]:
    """Pass the points on as they end, with a table that follows; a line a point where there is no terminal.

    Args:
        ends: How the unfinished points end.
        total: Points of the sweep.
        left: Unfinished ones.
        folder: The sweep's folder.
        live: Whether the table may follow. A point that runs in this process draws its own progress, which a table
            that redraws itself would garble: then a line a point, too.
    """
    console = Console()
    failed, done = 0, total - left
    if done:
        console.print(f"{done} of {total} points are finished already.", highlight=False)
    following = Live(console=console, refresh_per_second=2, transient=True) if live and console.is_terminal else None
    with following or nullcontext():
        for end in ends:
            done += end.error is None
            failed += end.error is not None
            yield end
            status = f"{done} of {total} points finished" + (f", {failed} failed" if failed else "")
            if following is not None:
                rows = collect(folder)
                following.update(Group(best_settings(rows), Text(status)) if rows else Text(status))
            else:
                state = "finished" if end.error is None else "FAILED"
                print(f"{end.point.name} {state}; {status}", flush=True, file=sys.stdout)


def best_settings(rows: list[dict[str, Any]]) -> Table:
    """The best setting of every algorithm at every ε and compute, of the points that are finished.

    Columns that tell nothing apart are left out, so that headings fit a terminal of 80 columns.
    """
    cells = cells_of(rows)
    lines = [_setting_of(cell) for cell in cells]
    left_out = _alike(cells)
    table = Table(
        title="Loss on held-out users, each with its best setting",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown = [name for name in HEADINGS if name not in left_out]
    for name in shown:
        table.add_column(name.replace(" ", "\n"), justify="right" if name else "left", no_wrap=True)
    for line in lines:
        table.add_row(*(line[name] for name in shown))
    return table


def _alike(cells: list[dict[str, Any]]) -> set[str]:
    """Columns that tell nothing apart among all settings that were tried."""
    private = [setting for cell in cells if cell["arm"] != "nonprivate" for setting in cell["settings"]]
    tried = [setting for cell in cells for setting in cell["settings"]]
    alike = {
        "bands": len({setting["bands"] for setting in private}) < 2,
        "average": {setting["average"] for setting in tried} == {"none"},
        "± 95 %": all(cell["best"]["half_width"] is None for cell in cells),
        "seeds": len({cell["best"]["seeds"] for cell in cells}) < 2,
    }
    return {name for name, same in alike.items() if same}


def _setting_of(cell: dict[str, Any]) -> dict[str, str]:
    """A row of the table by HEADINGS."""
    best, private = cell["best"], cell["arm"] != "nonprivate"
    values = (
        ARM_TITLES[cell["arm"]],
        f"{cell['epsilon']:g}" if private else "∞",
        str(cell["gradients_per_round"]),
        str(best["group_size"]) if private else NOTHING,
        f"{best['learning_rate']:g}",
        f"{best['clip_norm']:g}" if private else NOTHING,
        str(best["bands_used"]) if private else NOTHING,
        best["average"],
        f"{best['loss']:.4f}",
        NOTHING if best["half_width"] is None else f"{best['half_width']:.4f}",
        str(best["seeds"]),
    )
    return dict(zip(HEADINGS, values, strict=True))
