"""The outcome of a run, as summary.json and comparison.json hold it."""

import json
import logging
from typing import Any

from fedsim.config import RunConfig
from fedsim.plan import Plan
from server.private_evaluation import PrivateChanges
from server.results.run_folder import RunFolder, write_json
from server.training import Outcome

logger = logging.getLogger(__name__)


def summarise(plan: Plan, config: RunConfig, outcome: Outcome, seconds: float) -> dict[str, Any]:
    """The outcome of one arm, as comparison.json holds it."""
    # How long it takes tells how much text was drawn, which no noise hides.
    took = (outcome.seconds, seconds) if config.writes_training_metrics else (None, None)
    before, after = outcome.before, outcome.after
    return {
        "algorithm": plan.name,
        "mechanism": plan.release_name,
        "epsilon": outcome.epsilon,
        "delta": plan.delta,
        "noise_multiplier": plan.noise_multiplier,
        "bands": plan.bands,
        "buffers": len(plan.noise_buffers),
        "clip_norm": plan.clip_norm,
        "group_size": plan.group_size,
        "units_per_round": plan.normaliser,
        "rounds": outcome.rounds,
        "learning_rate": config.optimizer.learning_rate,
        "weights": outcome.weights,
        "gradient_evaluations": outcome.rounds * plan.gradients_per_round,
        "test_loss_before": None if before is None else before.loss,
        "test_loss_after": None if after is None else after.loss,
        "test_perplexity_before": None if before is None else before.perplexity,
        "test_perplexity_after": None if after is None else after.perplexity,
        "test_accuracy_before": None if before is None else before.accuracy,
        "test_accuracy_after": None if after is None else after.accuracy,
        "test_users": None if after is None else len(after.users),
        "training_seconds": took[0],
        "seconds": took[1],
    }


def private_evaluation(changes: PrivateChanges | None) -> dict[str, Any]:
    """What was released of held-out users, for the summary: of the final model, nats; nothing where nothing was."""
    if changes is None:
        return {}
    return {
        "private_change": changes.last,
        "private_change_std": changes.evaluation.standard_deviation,
        "private_change_clip": changes.evaluation.clip_norm,
    }


def predicted_noise(folder: RunFolder, plan: Plan) -> dict[str, Any]:
    """What correlating noise promised, for the summary: in words, and as a ratio to independent noise."""
    if not folder.bands.exists():
        return {"predicted_noise_ratio": 1.0 if plan.correlation is None else None}
    promised = json.loads(folder.bands.read_text(encoding="utf-8"))
    ratios = {one["bands"]: float(one["ratio"]) for one in promised["forecasts"]}
    return {"predicted_noise_ratio": ratios[plan.bands], "bands_in_words": promised["in_words"]}


def gradients_taken(folder: RunFolder) -> dict[str, Any]:
    """Which way gradients took, for the summary: a line for each way that some worker took."""
    if not folder.paths.exists():
        return {}
    return {
        "gradients": [one["in_words"] for one in json.loads(folder.paths.read_text(encoding="utf-8"))["gradients"]]
    }


def keep_paths(folder: RunFolder, values: dict[str, Any]) -> None:
    """Write paths.json, without which a run can do."""
    try:
        write_json(folder.paths, values)
    except OSError as error:
        logger.warning("%s could not be written: %s", folder.paths, error.strerror)
