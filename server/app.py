"""The Flower ServerApp: the same on RayGrid, LocalGrid and under `flwr run`."""

import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsim.config import RunConfig, from_flat, to_flat
from fedsim.data.doubts import doubtful_owners
from fedsim.disk import require_writable
from fedsim.engine.environment import HERE
from fedsim.engine.grid import WaitingGrid
from fedsim.errors import Failure, InvalidInput
from fedsim.gradient_paths import PathsHeard
from fedsim.gradients import ParameterLayout
from fedsim.models.export import export
from fedsim.models.unchanged import unchanged_parameters
from fedsim.optimizer import ServerOptimizer
from fedsim.plan import Plan, UserSizes, plan_from_values
from fedsim.plan.bands import in_words
from fedsim.privacy.earlier import MARK, Earlier, digest_of
from fedsim.privacy.ledger import Ledger
from fedsim.release import Release, ReleaseLog, ReleasesLost
from fedsim.resources import Resources, computing_device, earlier_runs, open_resources
from fedsim.seeds import Seeds
from fedsim.statement import going_on_in_words
from fedsim.terminal import say, speak
from fedsim.versions import versions
from server.alarms import as_json
from server.callbacks import BegunRun, Callback, Callbacks, callbacks_of
from server.checkpoint import Checkpoint, CheckpointWriter
from server.dispatch import Dispatcher
from server.evaluation import HeldOut, HeldOutDiverged
from server.identity import evaluation_in, identity_of, require_same, settings_of
from server.packing import Roster
from server.precautions.delivery import deliver, forget, newest
from server.precautions.patience import refusals_told
from server.precautions.trial import try_out
from server.private_evaluation import private_changes
from server.results.run_folder import RunFolder, new_output_folder, without_infinities, write_json
from server.results.statement import statement_of, write_card_of
from server.results.summary import gradients_taken, keep_paths, predicted_noise, private_evaluation, summarise
from server.round import Budget, Diverged, Round
from server.sharded import ShardedRound, require_apart, require_workers_of_ours, sharded_optimizer
from server.training import Job, Training

logger = logging.getLogger(__name__)
Begun = tuple[Plan, dict[str, Any], Earlier]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train as the run configuration says and leave a run folder.

    Raises:
        InvalidInput: As `train`; or a cluster is named, which is not Flower's to join.
    """
    speak()
    config: RunConfig = from_flat(RunConfig, context.run_config)
    if (address := config.engine.address) not in (None, HERE):
        hint = "Flower's own engine computes where Flower was set up; for a Ray cluster take `fedsim train`."
        raise InvalidInput("engine.address", address, "left out under `flwr run`", hint)
    train(grid, config)


def train(
    grid: Grid, config: RunConfig, callbacks: Sequence[Callback] = (), seeds: Seeds | None = None
) -> dict[str, Any]:
    """One run from configuration to run folder, from the beginning or from where it was interrupted.

    Args:
        grid: Where the clients are; they were given the same configuration.
        config: What to train; config.resume names the folder of a run to go on with.
        callbacks: Told of the run, beside those that the configuration names.
        seeds: What `Seeds.drawn` drew for a new run, of a caller who keeps them secret; None draws them here.

    Returns:
        The summary that is also written to summary.json.

    Raises:
        InvalidInput: When the configuration does not fit the data, the model, or the run to go on with; nothing has
            been charged then.
        Stopped: When a signal asked to; the run can be resumed.
        Failure: What was charged stays charged; the run can be resumed from its last checkpoint.
    """
    if config.engine.sums == "workers":
        require_workers_of_ours(grid)
    told = Callbacks([*callbacks, *callbacks_of(config)])
    folder = RunFolder(config.resume or config.output or new_output_folder(config.plan.algorithm))
    with refusals_told(folder.path), folder.undone_unless_kept():
        if config.resume is None:
            folder.require_unused()
        else:
            require_writable(folder.path, "resume")
        if config.resume is not None and not folder.finished:
            folder.hold.take("resume")
        if config.resume is not None and folder.finished:  # perhaps by another process, just before it was let go of
            require_same({"settings": folder.read_config()["identity"]["settings"]}, {"settings": settings_of(config)})
            _tidy(folder)
            return folder.read_summary()
        with told.told_of_stops():
            summary = _train(grid, config, folder, told, seeds)
        told.end(summary)
        return summary


def _train(grid: Grid, config: RunConfig, folder: RunFolder, told: Callbacks, seeds: Seeds | None) -> dict[str, Any]:
    started = time.perf_counter()
    resources = open_resources(config)
    for doubt in doubtful_owners(resources.store.manifest):
        logger.warning("%s", doubt)
    begin = partial(_begin, seeds=seeds) if config.resume is None else _resumed
    plan, identity, earlier = begin(folder, config, resources)
    model, layout = resources.loaded.model, ParameterLayout.of(resources.loaded.model)
    latest = None if config.resume is None else newest(folder)
    with Ledger.open(folder.ledger) as ledger:
        earlier.carry_into(ledger)
        job = _job(grid, config, plan, identity, earlier, resources, folder, ledger, latest, told)
        training = Training(job)
        try:
            if latest is not None:
                training.load_state(latest)
            elif config.resume is not None:
                folder.cut_metrics(0)
            if config.resume is not None:
                _repeatable(job.round, training.round, config)
            try_out(grid, config, resources, folder, job.round, training.round)
            told.begin(BegunRun.of(config, plan, folder.path, training.round if config.resume else None))
            folder.keep()
            outcome = training.run()
        except (Diverged, HeldOutDiverged) as lost:
            with suppress(OSError):
                write_json(folder.given_up, {"reason": str(lost)})
            raise
        finally:
            if job.checkpoints is not None:
                job.checkpoints.join()
        if outcome.rounds:
            # Of the weights that were trained: what does not move them is not made up for by an average.
            training.alarms.after_training(
                unchanged_parameters(layout, np.asarray(layout.flatten(model)), job.round.parameters)
            )
        average = job.round.optimizer.average
        private = evaluation_in(identity)
        statement = statement_of(config, resources, plan, ledger, earlier, outcome.rounds, average, private)

    words = without_infinities(statement.to_json())
    layout.load(model, outcome.parameters)
    marks = {MARK: digest_of(folder.ledger)}
    summary: dict[str, Any] = {}

    def summarised() -> None:
        summary.update(without_infinities(summarise(plan, config, outcome, time.perf_counter() - started)))
        summary["alarms"] = as_json(training.alarms)
        summary.update(predicted_noise(folder, plan) | gradients_taken(folder) | private_evaluation(job.changes))
        # What ran, where it is not what was set.
        summary["peak_learning_rate"] = job.round.optimizer.peak_learning_rate
        write_json(folder.summary, summary)

    def taken_away(place: Path) -> None:
        shutil.copy(folder.ledger, place)
        write_json(place / folder.privacy.name, words)
        export(
            resources.loaded,
            place / folder.model.name,
            beside=(folder.ledger, place / folder.privacy.name),
            marks=marks,
        )

    beside = (folder.ledger, folder.privacy, folder.card)
    pieces = {
        "the statement": lambda: write_json(folder.privacy, words),
        "the card": lambda: write_card_of(folder, config, resources),
        "the model": lambda: export(resources.loaded, folder.model, beside=beside, marks=marks),
        "metrics": folder.write_metrics,
        "the summary": summarised,
    }
    kept = job.checkpoints is not None and job.checkpoints.failure is None
    deliver(folder, pieces, lambda: None if kept else training.state(), taken_away)
    _tidy(folder)
    return summary


def _tidy(folder: RunFolder) -> None:
    """Remove what only an unfinished run needs, here and elsewhere."""
    if not folder.model.is_dir():
        raise Failure(f"{folder.path} is finished, and its model is no longer in {folder.model}")
    forget(folder)  # while the seeds still tell where
    folder.remove_unfinished()


def _repeatable(round: Round, number: int, config: RunConfig) -> None:
    """Make sure that what was released since the checkpoint can be repeated, or that it need not be.

    Raises:
        ReleasesLost: It cannot, and the configuration does not say what then.
    """
    try:
        round.require_repeatable(number)
    except ReleasesLost as lost:
        if config.noise.lost_releases != "restart":
            raise
        logger.warning(
            "round %d may have been released, and nobody knows what: a new chain of correlated noise begins with "
            "round %d, and the rounds that run again are charged again",
            lost.round,
            number,
        )
        round.restart(number)


def _job(
    grid: Grid,
    config: RunConfig,
    plan: Plan,
    identity: dict[str, Any],
    earlier: Earlier,
    resources: Resources,
    folder: RunFolder,
    ledger: Ledger,
    latest: Checkpoint | None,
    callbacks: Callbacks,
) -> Job:
    """The run's parts, put together."""
    layout = ParameterLayout.of(resources.loaded.model)
    seeds = Seeds.read(folder.secret)
    in_process = isinstance(grid, WaitingGrid) and grid.in_process
    device = computing_device() if in_process else torch.device("cpu")
    parameters = layout.flatten(resources.loaded.model).to(device)
    threads = torch.get_num_threads()
    optimizer = config.optimizer_for(plan, UserSizes.of_users(resources.store.split("train")), earlier.event)
    every, engine, measure = config.checkpoint, config.engine, config.evaluation
    kind: type[Round]
    held: ServerOptimizer
    roster: Roster
    release = Release(plan, layout.sizes, seeds.noise, exact=engine.exact, threads=threads, device=device)
    if engine.sums == "workers":
        require_apart(release)
        among_workers = sharded_optimizer(grid, engine, parameters.numpy(), optimizer, plan.steps)
        kind, held, roster = ShardedRound, among_workers, among_workers.group.roster
    else:
        kind, held = Round, ServerOptimizer(parameters, optimizer, plan.steps)
        roster = Roster(grid, engine.start_seconds)
    changes, rows = private_changes(
        measure, evaluation_in(identity), resources.store.split("validation"), ledger, seeds
    )
    log = ReleaseLog(folder.releases, keeps=every.rounds > 0 or every.minutes > 0)
    return Job(
        round=kind(
            plan,
            resources.store.split("train"),
            seeds,
            Budget(plan, ledger, config.plan.epsilon, splits=changes is not None),
            release,
            held,
            exact=engine.exact,
            row_tokens=resources.row_tokens,
            inputs=resources.inputs,
            log=log,
        ),
        gather=Dispatcher(
            grid,
            units_per_message=engine.users_per_message or None,
            timeout=engine.timeout_seconds,
            attempts=engine.attempts,
            roster=roster,
            heard=PathsHeard(say, partial(keep_paths, folder)),
            sums="auto" if engine.sums == "workers" else engine.sums,
        ).gather,
        held_out=HeldOut(grid, resources.store, measure.max_rows, measure.test_rows, resources.inputs, roster, rows),
        folder=folder,
        evaluate_every=config.evaluation.every,
        training_metrics=config.writes_training_metrics,
        checkpoints=CheckpointWriter(
            folder.checkpoints,
            rounds=every.rounds,
            minutes=every.minutes,
            keep=every.keep,
            good=None if latest is None else latest.round,
            forget=log.forget,
        ),
        identity=identity,
        callbacks=callbacks,
        changes=changes,
    )


def _require_formed(config: RunConfig, plan: Plan, resources: Resources) -> None:
    """Refuse a plan whose sums cannot be formed where they shall be, before there is a folder.

    Raises:
        InvalidInput: Workers cannot release their coordinates of it.
    """
    if config.engine.sums == "workers":
        seed = None if config.noise.secure else 0  # nothing is drawn from it
        require_apart(Release(plan, ParameterLayout.of(resources.loaded.model).sizes, seed, exact=config.engine.exact))


def _begin(folder: RunFolder, config: RunConfig, resources: Resources, seeds: Seeds | None) -> Begun:
    """Plan and identity of a new run, and what it goes on from. They and the seeds are on disk before anything is
    charged; config.json last."""
    earlier = earlier_runs(config, resources.loaded.source)
    seeds = seeds or Seeds.drawn(config, earlier.digest)
    sizes = UserSizes.of_users(resources.store.split("train"))
    plan = config.plan_for(sizes, earlier.event)
    _require_formed(config, plan, resources)
    if earlier.entries:
        say(going_on_in_words(earlier, config.plan.epsilon, plan.delta, plan.adjacency))
    evaluation = config.private_evaluation(resources.store.split("validation").num_users, earlier.event)
    identity = identity_of(config, plan, resources, evaluation)
    folder.make()
    folder.bands.unlink(missing_ok=True)  # of a run that was not begun
    if forecasts := config.bands_forecasts(sizes, earlier.event):
        words = in_words(forecasts, plan.bands, config.optimizer.name, plan.steps)
        say(words)
        write_json(folder.bands, {"in_words": words, "forecasts": [asdict(one) for one in forecasts]})
    seeds.store(folder.secret)
    folder.write_config(
        config=to_flat(config),
        plan=plan.to_values(),
        versions=versions(),
        identity=identity,
        earlier=earlier.to_values(),
    )
    return plan, identity, earlier


def _resumed(folder: RunFolder, config: RunConfig, resources: Resources) -> Begun:
    """The same of a run that is resumed; its plan is the one written down, not calibrated again."""
    folder.require_hope()
    config_file = folder.read_config()
    written = config_file["identity"]
    plan = plan_from_values(written.get("plan", {}))
    identity = identity_of(config, plan, resources, evaluation_in(written))
    require_same(written, identity)
    _require_formed(config, plan, resources)
    folder.remove_leftovers()
    return plan, identity, Earlier.of_values(config_file.get("earlier"))
