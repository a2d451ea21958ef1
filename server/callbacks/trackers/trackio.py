"""trackio: its local database, or the space that TRACKIO_SPACE_ID names."""

import os
import secrets
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import trackio

from server.callbacks.trackers.flat import Scalar
from server.callbacks.trackers.tracker import PROJECT, Opening, Tracked


class _Run:
    """A run in trackio."""

    def __init__(self, run: Opening) -> None:
        self.key = run.known or f"{run.name}-{secrets.token_hex(3)}"  # trackio tells runs apart by name
        self._rounds = run.first_round
        looks = False if run.private_only else None
        with redirect_stdout(sys.stderr):  # where everything is said that is no result
            self._run: Any = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=self.key,
                config=dict(run.options),
                resume="allow",
                embed=False,
                auto_log_gpu=looks,
                auto_log_cpu=looks,
            )

    def log(self, round: int, numbers: Mapping[str, float]) -> None:
        self._rounds = round
        self._run.log(dict(numbers), step=round)

    def summarise(self, outcome: Mapping[str, Scalar]) -> None:
        self._run.log({f"summary/{name}": value for name, value in outcome.items()}, step=self._rounds)

    def close(self, finished: bool) -> None:
        finish: Any = trackio.finish  # of the run itself, the end of the process would finish it again
        with redirect_stdout(sys.stderr):
            finish()


def begin(run: Opening) -> Tracked:
    """Begin, or go on with the run of the same name."""
    return _Run(run)
