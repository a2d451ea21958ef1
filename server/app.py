"""The Flower ServerApp: the same on RayGrid, LocalGrid and under `flwr run`."""

import platform
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import fedsim
from fedsim.config import RunConfig, from_flat, to_flat
from fedsim.gradients import ParameterLayout
from fedsim.models.export import export
from fedsim.plan import Plan
from fedsim.resources import open_resources
from server.privacy import privacy_statement, without_infinities
from server.rounds import Outcome, Seeds, Training, describe
from server.run_folder import RunFolder, write_json
from server.setup import fresh_seed, make_plan

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train as the run configuration says and leave a run folder."""
    train(grid, from_flat(RunConfig, context.run_config))


def new_output_folder(kind: str) -> str:
    """A folder under runs/ named after the moment."""
    return str(Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{kind}")


def train(grid: Grid, config: RunConfig) -> dict[str, Any]:
    """One run from configuration to run folder.

    Args:
        grid: Where the clients are; they were given the same configuration.
        config: What to train.

    Returns:
        The summary that is also written to summary.json.

    Raises:
        InvalidInput: When the configuration does not fit the data or the model; nothing has been charged then.
    """
    started = time.perf_counter()
    folder = RunFolder(config.output or new_output_folder(config.plan.algorithm))
    resources = open_resources(config)
    seeds = Seeds(
        sampling=fresh_seed() if config.sampling_seed is None else config.sampling_seed,
        noise=fresh_seed() if config.noise_seed is None else config.noise_seed,
    )
    plan = make_plan(config.plan, resources.store.split("train"), seeds.sampling)
    write_json(folder.config, {"config": to_flat(config), "plan": describe(plan), "versions": versions()})

    layout = ParameterLayout.of(resources.loaded.model)
    parameters = np.array(layout.flatten(resources.loaded.model), dtype=np.float32)
    sizes = dict(zip(layout.names, np.diff(layout.offsets).tolist(), strict=True))
    training = Training(config, plan, resources, grid, folder, seeds, parameters, sizes)
    outcome = training.run()

    write_json(folder.privacy, privacy_statement(config, plan, training.ledger, outcome.rounds, versions()))
    layout.load(resources.loaded.model, outcome.parameters)
    export(resources.loaded, folder.model)
    summary = without_infinities(summarise(plan, config, outcome, time.perf_counter() - started))
    write_json(folder.summary, summary)
    return summary


def summarise(plan: Plan, config: RunConfig, outcome: Outcome, seconds: float) -> dict[str, Any]:
    """The outcome of one arm, as comparison.json holds it."""
    return {
        "algorithm": plan.name,
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


def versions() -> dict[str, str]:
    """What computed this run."""
    import flwr
    import torch
    import transformers

    return {
        "fedsim": fedsim.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "flwr": getattr(flwr, "__version__", "unknown"),
        "numpy": np.__version__,
        "platform": sys.platform,
    }
