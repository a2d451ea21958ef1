"""TensorBoard: event files in the run's folder."""

from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from server.callbacks.trackers.flat import Scalar
from server.callbacks.trackers.tracker import Opening, Tracked

COMPARED = ("loss", "accuracy", "epsilon")
"""What the table of hyperparameters shows beside them."""


class _Events:
    """Event files, one for each time that the run was begun or gone on with."""

    def __init__(self, run: Opening) -> None:
        folder = run.folder / "tensorboard"
        self.key = folder.name
        self._rounds = run.first_round
        # Rounds that are told anew hide those that were told before.
        self._writer: Any = SummaryWriter(str(folder), purge_step=run.first_round if run.known else None)
        if not run.known:
            self._describe(run.options)

    def _describe(self, options: Mapping[str, Scalar]) -> None:
        described: Any = hparams
        for summary in described(dict(options), dict.fromkeys(COMPARED, 0.0)):
            self._writer.file_writer.add_summary(summary)

    def log(self, round: int, numbers: Mapping[str, float]) -> None:
        self._rounds = round
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def summarise(self, outcome: Mapping[str, Scalar]) -> None:
        for name, value in outcome.items():
            if isinstance(value, str):
                self._writer.add_text(f"summary/{name}", value, self._rounds)
            else:
                self._writer.add_scalar(f"summary/{name}", float(value), self._rounds)

    def close(self, finished: bool) -> None:
        self._writer.close()


def begin(run: Opening) -> Tracked:
    """Begin, or go on."""
    return _Events(run)
