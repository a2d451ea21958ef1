"""The Flower ServerApp: the same on RayGrid, LocalGrid and under `flwr run`."""

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsim.config import RunConfig, from_flat, to_flat
from fedsim.gradients import ParameterLayout
from fedsim.models.export import ExportMismatch, export
from fedsim.models.unchanged import unchanged_parameters
from fedsim.plan import Plan, plan_from_json
from fedsim.resources import Resources, open_resources
from fedsim.versions import versions
from server.alarms import as_json
from server.checkpoint import CheckpointWriter, read_latest
from server.dispatch import RoundFailed
from server.evaluation import EvaluationFailed
from server.identity import identity_of, require_same
from server.privacy import privacy_statement, without_infinities
from server.resume import restore
from server.rounds import Diverged, Outcome, Training, describe
from server.run_folder import RunFolder, write_json
from server.seeds import Seeds
from server.setup import make_plan

app = ServerApp()

FAILURES = (RoundFailed, EvaluationFailed, Diverged, ExportMismatch)
"""How a run can fail after it has begun, with a message that says all there is to know."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train as the run configuration says and leave a run folder."""
    train(grid, from_flat(RunConfig, context.run_config))


def new_output_folder(kind: str) -> str:
    """A folder under runs/ named after the moment."""
    return str(Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{kind}")


def train(grid: Grid, config: RunConfig) -> dict[str, Any]:
    """One run from configuration to run folder, from the beginning or from where it was interrupted.

    Args:
        grid: Where the clients are; they were given the same configuration.
        config: What to train; config.resume names the folder of a run to go on with.

    Returns:
        The summary that is also written to summary.json.

    Raises:
        InvalidInput: When the configuration does not fit the data, the model, or the run to go on with; nothing has
            been charged then.
        Stopped: When a signal asked to; the run can be resumed.
        RoundFailed, EvaluationFailed, Diverged, ExportMismatch: What was charged stays charged; the run can be
            resumed from its last checkpoint.
    """
    started = time.perf_counter()
    folder = RunFolder(config.resume or config.output or new_output_folder(config.plan.algorithm))
    if config.resume is None:
        folder.require_unused()
    resources = open_resources(config)
    plan, identity = (_begin if config.resume is None else _resumed)(folder, config, resources)
    if folder.finished:
        folder.remove_unfinished()
        return json.loads(folder.summary.read_text(encoding="utf-8"))
    seeds = Seeds.read(folder.secret)

    layout = ParameterLayout.of(resources.loaded.model)
    parameters = layout.flatten(resources.loaded.model).cpu().numpy()
    sizes = layout.sizes
    kept = None if config.resume is None else read_latest(folder.checkpoints)
    every = config.checkpoint
    writer = CheckpointWriter(
        folder.checkpoints,
        rounds=every.rounds,
        minutes=every.minutes,
        keep=every.keep,
        good=None if kept is None else kept.round,
    )
    training = Training(config, plan, resources, grid, folder, seeds, parameters, sizes, identity, writer)
    try:
        if kept is not None:
            restore(training, kept)
        elif config.resume is not None:
            folder.cut_metrics(0)
        outcome = training.run()
        if outcome.rounds:
            training.alarms.after_training(
                unchanged_parameters(layout, np.asarray(layout.flatten(resources.loaded.model)), outcome.parameters)
            )
        statement = privacy_statement(config, plan, training.ledger, outcome.rounds, versions())
    finally:
        writer.join()
        training.ledger.close()

    write_json(folder.privacy, statement)
    layout.load(resources.loaded.model, outcome.parameters)
    export(resources.loaded, folder.model)
    summary = without_infinities(summarise(plan, config, outcome, time.perf_counter() - started))
    summary["alarms"] = as_json(training.alarms)
    write_json(folder.summary, summary)
    folder.remove_unfinished()
    return summary


def _begin(folder: RunFolder, config: RunConfig, resources: Resources) -> tuple[Plan, dict[str, Any]]:
    """Plan and identity of a new run. They and the seeds are on disk before anything is charged; config.json last."""
    seeds = Seeds.drawn(config)
    plan = make_plan(config.plan, resources.store.split("train"), seeds.sampling)
    identity = identity_of(config, plan, resources)
    seeds.store(folder.secret)
    write_json(
        folder.config,
        {"config": to_flat(config), "plan": describe(plan), "versions": versions(), "identity": identity},
    )
    return plan, identity


def _resumed(folder: RunFolder, config: RunConfig, resources: Resources) -> tuple[Plan, dict[str, Any]]:
    """The same of a run that goes on; its plan is the one written down, not calibrated again."""
    written = folder.read_config()["identity"]
    plan = plan_from_json(json.dumps(written.get("plan", {})))
    identity = identity_of(config, plan, resources)
    require_same(written, identity)
    folder.remove_leftovers()
    return plan, identity


def summarise(plan: Plan, config: RunConfig, outcome: Outcome, seconds: float) -> dict[str, Any]:
    """The outcome of one arm, as comparison.json holds it."""
    return {
        "algorithm": plan.name,
        "mechanism": "quantile-clip" if plan.clip_quantile else plan.mechanism,
        "epsilon": outcome.epsilon,
        "delta": plan.delta,
        "noise_multiplier": plan.noise_multiplier,
        "clip_norm": plan.clip_norm,
        "group_size": plan.group_size,
        "units_per_round": plan.normaliser,
        "rounds": outcome.rounds,
        "learning_rate": config.optimizer.learning_rate,
        "gradient_evaluations": outcome.rounds * plan.gradients_per_round,
        "test_loss_before": outcome.before.loss,
        "test_loss_after": outcome.after.loss,
        "test_perplexity_before": outcome.before.perplexity,
        "test_perplexity_after": outcome.after.perplexity,
        "test_accuracy_before": outcome.before.accuracy,
        "test_accuracy_after": outcome.after.accuracy,
        "test_users": len(outcome.after.users),
        "training_seconds": outcome.seconds,
        "seconds": seconds,
    }
