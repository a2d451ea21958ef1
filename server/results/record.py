"""What is told of a round: a line of metrics.jsonl, and what callbacks get."""

import math
from collections.abc import Mapping
from typing import Any

from fedsim.engine.cohort import NORM_QUANTILE
from fedsim.memory import peak_resident_bytes
from fedsim.optimizer import ServerOptimizer
from fedsim.plan import Plan
from server.evaluation import Measurement


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


def privately_evaluated(record: Mapping[str, Any], change: float | None, weights: str) -> dict[str, Any]:
    """The record with what was released of held-out users.

    Args:
        record: Of the round.
        change: Of their loss since before training, nats, with noise; None where none was left to be released.
        weights: Which of the weights that training made were measured, in words.
    """
    shown = {"weights": weights, "private_change": change}
    return {"round": record["round"], **shown, **{name: value for name, value in record.items() if name not in shown}}


def of_training_users(statistics: Mapping[str, float], seconds: float) -> dict[str, Any]:
    """What no noise protects of a round: means over its cohort, nothing where it was empty; what it took.

    Args:
        statistics: Of the cohort, as `Round.run` returns them; nothing of a round that was not run.
        seconds: That the round took, which tell how much text was drawn, as memory does.

    Returns:
        "units" drawn, their mean loss "train_loss" (nats), "clipped_fraction" and "nonfinite_units" of them,
        "norm_quantiles" of their updates before the clip, "tokens" of their rows and "tokens_per_second" of the round,
        and "memory": the most bytes that a worker held, of its GPU in this round or else of its process since it
        began, and that the server's process held since it began.
    """
    memory = {"server_bytes": peak_resident_bytes()}
    units = statistics.get("units", 0.0)
    if not units:
        return {"memory": memory}
    tokens = statistics["tokens"]
    quantiles = {name: value for name, value in statistics.items() if name.startswith(NORM_QUANTILE)}
    return {
        "units": units,
        "train_loss": statistics["loss_sum"] / units,
        "clipped_fraction": statistics["clipped_units"] / units,
        "nonfinite_units": statistics["nonfinite_units"],
        "norm_quantiles": {name.removeprefix(NORM_QUANTILE): value for name, value in quantiles.items()},
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        "memory": {"worker_bytes": int(statistics["memory_bytes"]), **memory},
    }
