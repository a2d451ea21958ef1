"""A worker whose units' updates are known and that dies where a file says so. It loads nothing of a server's."""

import os
import signal
from pathlib import Path

import numpy as np
from flwr.clientapp import ClientApp

from clients.answers import app_of
from fedsim.config import OptimizerConfig
from fedsim.engine.collective import Peers
from fedsim.engine.exact import quantise
from fedsim.engine.work import Done, Work
from fedsim.optimizer import ServerOptimizer
from fedsim.randomness import BLOCK

SIZE = 4 * BLOCK + 77


class Known:
    """A worker whose units' updates are known. Where a file says so it dies: in a unit, or in a part of a commit."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def train(self, request: Work) -> Done:
        self._die("train")
        total = np.zeros(SIZE, dtype=np.int64 if request.resolution else np.float32)
        for unit in request.units.tolist():
            update = np.random.default_rng([unit, request.round]).standard_normal(SIZE, dtype=np.float32)
            update /= np.float32(1.01 * np.linalg.norm(update))
            # What parameters it is computed at shows in it.
            update[:8] += np.float32(1e-4) * np.tanh(np.asarray(request.parameters[:8]))
            total += (
                quantise(update, request.clip, {"all": SIZE}, request.resolution) if request.resolution else update
            )
        return Done(
            round=request.round, units=request.units, total=total, statistics={"rows": float(len(request.units))}
        )

    def _die(self, moment: str) -> None:
        try:
            (self.folder / moment).rename(self.folder / f"{moment}-{os.getpid()}")  # one process alone succeeds
        except OSError:
            return
        if (self.folder / "freeze").exists():
            os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(1)


def known_app(folder: str) -> ClientApp:
    """A ClientApp with such a worker, whose commits may die, too."""
    ServerOptimizer(np.zeros(1, dtype=np.float32), OptimizerConfig(), 1)  # torch loads a lot with its first one
    worker = Known(folder)
    for moment in ("sum_of", "reduce_scatter", "all_gather", "passed_on"):
        original = getattr(Peers, moment)

        def dying(self: Peers, *arguments: object, original: object = original, moment: str = moment) -> object:
            worker._die(moment)
            return original(self, *arguments)  # type: ignore[operator]

        setattr(Peers, moment, dying)
    return app_of(lambda config: worker)  # type: ignore[arg-type,return-value]
