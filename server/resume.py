"""A run's state between two rounds, as a checkpoint and back."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.privacy.ledger import Ledger
from server.checkpoint import Checkpoint
from server.evaluation import Measurement

if TYPE_CHECKING:
    from server.rounds import Training

BEFORE = "before/"
OPTIMIZER = "optimizer/"
RELEASE = "release/"
PARAMETERS = "parameters"


def snapshot(training: "Training") -> Checkpoint:
    """Everything that training needs to go on, copied, so that the next round may begin."""
    arrays: dict[str, np.ndarray] = {PARAMETERS: training.parameters}
    arrays |= {OPTIMIZER + name: array for name, array in training.optimizer.state().items()}
    arrays |= {RELEASE + name: array for name, array in training.release.state().items()}
    values: dict[str, Any] = {
        "plan": json.loads(training.plan.to_json()),
        "identity": training.identity,
        "ledger_entries": len(training.ledger),
        "metrics_bytes": training.folder.metrics_size,
        "measured": training.measured,
        "seconds": training.seconds,
    }
    if (before := training.before) is not None:
        arrays |= {BEFORE + "users": before.users, BEFORE + "user_losses": before.user_losses}
        values["before"] = {"loss": before.loss, "accuracy": before.accuracy, "perplexity": before.perplexity}
    return Checkpoint(
        round=training.round, arrays={name: np.array(array) for name, array in arrays.items()}, values=values
    )


def restore(training: "Training", checkpoint: Checkpoint) -> None:
    """Put training where it was; metrics written after that are forgotten, charges never.

    Raises:
        InvalidInput: When the checkpoint is of another plan or model, or the ledger lacks charges made before it.
    """
    values, arrays = checkpoint.values, checkpoint.arrays
    if values["plan"] != json.loads(training.plan.to_json()) or values["identity"] != training.identity:
        raise InvalidInput("resume", str(training.folder.path), "a folder whose checkpoints are of the run itself")
    if arrays[PARAMETERS].shape != training.parameters.shape:
        raise InvalidInput("resume", str(training.folder.path), f"a run of {len(training.parameters)} parameters")
    if training.plan.noise_multiplier > 0:
        require_charged(training.ledger, checkpoint.round, int(values["ledger_entries"]))
    training.parameters[:] = arrays[PARAMETERS]
    training.optimizer.load_state(_under(arrays, OPTIMIZER))
    training.release.load_state(_under(arrays, RELEASE))
    training.round, training.measured = checkpoint.round, values["measured"]
    training.seconds = float(values["seconds"])
    if "before" in values:
        users, losses = arrays[BEFORE + "users"], arrays[BEFORE + "user_losses"]
        training.before = Measurement(**values["before"], users=users, user_losses=losses)
    training.folder.cut_metrics(int(values["metrics_bytes"]))


def require_charged(ledger: Ledger, rounds: int, entries: int) -> None:
    """Refuse a ledger that lacks charges: somebody put another file in its place, and ε would be understated.

    Raises:
        InvalidInput: When it has fewer entries than the checkpoint saw, or no charge for a round that was released.
    """
    missing = set(range(rounds)) - {entry.round for entry in ledger.entries[:entries]}
    if len(ledger) < entries or missing:
        raise InvalidInput(
            "resume",
            f"{ledger.path} with {len(ledger)} charges",
            f"the ledger of {entries} charges or more that the run wrote",
            "Put the ledger back: without it nothing can be claimed.",
        )


def _under(arrays: Any, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
