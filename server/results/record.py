"""What is told of a round: a line of metrics.jsonl, and what callbacks get."""

import math
from collections.abc import Mapping
from typing import Any

from fedsim.plan import Plan
from server.evaluation import Measurement
from server.optimizer import ServerOptimizer


def record_of(
    round: int,
    plan: Plan,
    optimizer: ServerOptimizer,
    *,
    clip_norm: float,
    epsilon: float,
    not_private: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of a round that was not evaluated, in JSON values.

    Args:
        round: Rounds done; 0 before training.
        plan: What is carried out.
        optimizer: After the round.
        clip_norm: Of the next round.
        epsilon: Upper bound on the ε spent so far.
        not_private: What was computed from training users without noise: for debugging, never for release.
    """
    return {
        "round": round,
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "gradient_evaluations": round * plan.gradients_per_round,
        "learning_rate": optimizer.learning_rate,
        "clip_norm": clip_norm,
        "not_private": dict(not_private),
    }


def evaluated(record: Mapping[str, Any], measured: Measurement, weights: str) -> dict[str, Any]:
    """The record with what held-out users showed.

    Args:
        record: Of the round.
        measured: Of the model after it.
        weights: Which of the weights that training made were measured, in words.
    """
    shown = {
        "weights": weights,
        "loss": measured.loss,
        "perplexity": measured.perplexity,
        "accuracy": measured.accuracy,
    }
    return {"round": record["round"], **shown, **{name: value for name, value in record.items() if name != "round"}}


def of_training_users(statistics: Mapping[str, float]) -> dict[str, Any]:
    """Means over a round's cohort, which no noise protects; nothing where it was empty.

    Args:
        statistics: Sums over the cohort, as `Round.run` returns them.
    """
    units = statistics.get("units", 0.0)
    if not units:
        return {}
    return {
        "units": units,
        "train_loss": statistics["loss_sum"] / units,
        "clipped_fraction": statistics["clipped_units"] / units,
        "nonfinite_units": statistics["nonfinite_units"],
    }
