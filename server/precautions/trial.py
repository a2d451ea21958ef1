"""Training and export, tried out before anything is spent: what would fail after the last round fails here."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from flwr.app import Message
from flwr.serverapp import Grid

from fedsim.config import RunConfig
from fedsim.disk import free_bytes, gigabytes, os_error
from fedsim.engine.slices import TRIAL, TrialRequest
from fedsim.errors import Failure, InvalidInput
from fedsim.models.export import ExportMismatch, export
from fedsim.models.load import LoadedModel
from fedsim.models.vocabulary import require_embedded
from fedsim.resources import Resources
from fedsim.terminal import say
from server.packing import Roster
from server.results.run_folder import RunFolder
from server.round import Round

logger = logging.getLogger(__name__)

ROWS = 2
"""Random rows, as long as a row may be, that each worker computes clipped gradients of."""
MOVED, FROM_ZERO = 0.1, 0.01
"""How far weights are moved for the trial: a tenth of their root mean square, or from zero so far."""
SCRATCH = ".model-trial"
MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2}
"""Vectors as long as the parameters that an optimizer keeps from its first step on."""

_exported: dict[tuple[str, str], int] = {}
"""Bytes of exports that were tried in this process, by weights and options: arms of a comparison share theirs."""


class TrialFailed(Failure):
    """What a run will do fails now, before anything is charged.

    Attributes:
        what: What was tried.
        reason: Why it failed.
        hint: What to do, as a sentence.
    """

    def __init__(self, what: str, reason: str, hint: str) -> None:
        self.what, self.reason, self.hint = what, reason, hint
        super().__init__(f"{what}, tried before anything is spent, fails: {reason}. Nothing is charged. {hint}")

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.what, self.reason, self.hint)


def try_out(grid: Grid, config: RunConfig, resources: Resources, folder: RunFolder, round: Round, done: int) -> None:
    """Try what a run will need: gradients on its workers, an export where the model will go, and room on the disk.

    The export is that of the model with every trained weight moved, so that one that is not saved shows; afterwards
    the weights are as they were. It is tried once for runs of one process that share a model, and not again when a
    run goes on.

    Args:
        grid: Where the workers are.
        config: What they were given.
        resources: The model as it was loaded, and the data.
        folder: The run's.
        round: Holds the parameters, and what checkpoints will hold.
        done: Rounds done; what a run that goes on tries is quick.

    Raises:
        InvalidInput: The data have tokens that the model does not know.
        TrialFailed: Anything else failed. Nothing is charged by it.
    """
    say("Trying training and export before anything is spent")
    loaded = resources.loaded
    if not done:
        require_embedded(loaded, resources.store)
    _gradients(Roster(grid, config.engine.start_seconds), resources.row_tokens)
    size = 0
    if not done:
        key = resources.weights, repr(config.model)
        if key not in _exported:
            _exported[key] = _export(loaded, folder, round.parameters)
        size = _exported[key]
    _room(folder, size, _state_bytes(round, config))


def _gradients(roster: Roster, row_tokens: int) -> None:
    """Clipped gradients of random rows, on every worker.

    Those that fail are told of: the run can do without some, for others compute what they do not, and not without all.

    Raises:
        TrialFailed: There is none that can compute.
    """
    content = TrialRequest(max_tokens=ROWS * row_tokens, seconds=0.0).to_record()
    workers = roster.workers()
    replies = list(roster.grid.send_and_receive([Message(content, worker, TRIAL) for worker in workers]))
    failed = dict.fromkeys(workers, "it did not answer")
    for reply in replies:
        worker = reply.metadata.src_node_id
        if reply.has_error():
            failed[worker] = (reply.error.reason or "no reason given").splitlines()[0].rstrip(".")
        else:
            failed.pop(worker, None)
    if len(failed) >= len(workers):
        reason = next(iter(failed.values()), "there is no worker")
        hint = "Look at --model.path, --engine.precision and --engine.max-tokens."
        raise TrialFailed("training on random rows", reason, hint)
    for worker, reason in failed.items():
        logger.warning(
            "worker %d, tried before anything is spent, cannot compute: %s. The run goes on with the other %d, which "
            "compute what it does not, round after round: stop it here if that is not what you want",
            worker,
            reason,
            len(workers) - len(failed),
        )


def _export(loaded: LoadedModel, folder: RunFolder, as_loaded: np.ndarray) -> int:
    """Export the moved model beside where it will go, and read it back; returns its bytes."""
    scratch = folder.path / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    hint = "Take another --model.path, or other --model.… options: this model could be trained, but not be kept."
    try:
        with moved(loaded, as_loaded):
            export(loaded, scratch / folder.model.name)
        return sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    except ExportMismatch as mismatch:
        if loaded.config.lora_rank:
            hint = "Train every weight instead (--model.lora-rank 0), or take another --model.path."
        raise TrialFailed("an export", f"{mismatch}: some weights are not saved", hint) from mismatch
    except InvalidInput:
        raise
    except Exception as error:
        if (said := os_error(error)) is not None and said.errno is not None:
            hint = f"Make room in {folder.path} ({gigabytes(free_bytes(folder.path))} free), or name another --output."
        raise TrialFailed("an export", f"{type(error).__name__}: {error}".splitlines()[0].rstrip("."), hint) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def moved(loaded: LoadedModel, as_loaded: np.ndarray) -> Iterator[None]:
    """Within it all trained weights are a little off; afterwards as they were loaded (float32 [P]), bit for bit."""
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in (one for one in loaded.model.parameters() if one.requires_grad):
                size = float(torch.linalg.vector_norm(parameter)) / max(parameter.numel(), 1) ** 0.5
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise, alpha=MOVED * size or FROM_ZERO)
        yield
    finally:
        loaded.layout.load(loaded.model, as_loaded)


def _state_bytes(round: Round, config: RunConfig) -> int:
    """Bytes of a checkpoint once the optimizer has taken a step, and of the releases that must be kept beside it."""
    now = sum(np.asarray(array).nbytes for array in round.state().values())
    later = MOMENTS[config.optimizer.name] + (config.optimizer.average != "none")
    kept = 0 if round.log is None else min(round.plan.steps, config.checkpoint.rounds)
    return now + (later + kept) * round.parameters.nbytes


def _room(folder: RunFolder, model: int, state: int) -> None:
    """Room for two checkpoints, the older of which goes when the newer is whole, and for the model.

    Raises:
        TrialFailed: There is less.
    """
    there = sum(path.stat().st_size for path in folder.checkpoints.rglob("*") if path.is_file())
    needed, free = 2 * state + model - there, free_bytes(folder.path)
    if free < needed:
        hint = f"Make room in {folder.path}, or name another --output."
        words = f"two checkpoints and the model need {gigabytes(needed)}, and {gigabytes(free)} are free"
        raise TrialFailed("room on the disk", words, hint)
