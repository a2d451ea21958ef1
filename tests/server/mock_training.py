"""Mock clients that return known updates, and a store without text, for tests of the server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.clientapp import ClientApp

from fedsim.config import OptimizerConfig
from fedsim.engine.evaluation_messages import EvaluateReply, EvaluateRequest
from fedsim.engine.local import LocalGrid
from fedsim.engine.messages import TrainReply, TrainRequest
from fedsim.optimizer import ServerOptimizer
from fedsim.plan import Plan, UlsPlan
from fedsim.privacy.ledger import Ledger
from fedsim.release import Release
from fedsim.seeds import Seeds
from server.dispatch import Dispatcher
from server.evaluation import HeldOut
from server.results.run_folder import RunFolder
from server.round import Budget, Round
from server.training import Job, Training

PARAMETERS = 20_000


class MockStore:
    """num_users users of rows_per_user rows each, in every split."""

    def __init__(self, num_users: int = 50, rows_per_user: int = 3) -> None:
        self.num_users = num_users
        self.num_rows = num_users * rows_per_user
        self.user_offsets = np.arange(num_users + 1, dtype=np.int64) * rows_per_user
        self.row_lengths = np.full(self.num_rows, 8)

    def split(self, name: str) -> "MockStore":
        return self


def unit_update(unit: int) -> np.ndarray:
    """The known update of a unit: length 1, along one coordinate."""
    update = np.zeros(PARAMETERS, dtype=np.float32)
    update[unit] = 1.0
    return update


def sum_of_units(request: TrainRequest) -> np.ndarray:
    """What an honest client returns."""
    return np.sum([unit_update(unit) for unit in request.units], axis=0, dtype=np.float32)


def mock_clients(total: Callable[[TrainRequest], np.ndarray] = sum_of_units) -> Callable[[], ClientApp]:
    """Clients whose sums are what `total` says, and whose losses are all 2."""

    def build() -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Any) -> Message:
            request = TrainRequest.from_record(message.content)
            statistics = {"loss_sum": 1.0, "clipped_units": 0.0, "nonfinite_units": 0.0, "seconds": 0.0}
            statistics |= {"tokens": 8.0 * len(request.units), "memory_bytes": 1e6 + request.round}
            reply = TrainReply(
                round=request.round,
                units=request.units,
                total=total(request),
                statistics=statistics,
                norms=np.float32(1 + request.units),
            )
            return Message(reply.to_record(), reply_to=message)

        @app.evaluate()
        def evaluate(message: Message, context: Any) -> Message:
            rows = EvaluateRequest.from_record(message.content).rows
            ones = np.ones(len(rows), dtype=np.int64)
            reply = EvaluateReply(rows=rows, loss_sum=2.0 * ones, label_count=ones, correct=ones)
            return Message(reply.to_record(), reply_to=message)

        return app

    return build


def uls_plan(**changes: Any) -> UlsPlan:
    values: dict[str, Any] = {
        "num_users": 50,
        "sampling_probability": 0.2,
        "group_size": 2,
        "clip_norm": 1.0,
        "noise_multiplier": 1.0,
        "steps": 3,
        "delta": 1e-3,
    }
    return UlsPlan(**{**values, **changes})


def training(
    folder: Path,
    plan: Plan,
    *,
    clients: Callable[[], ClientApp] | None = None,
    epsilon: float = 100.0,
    workers: int = 2,
    units_per_message: int | None = None,
    seeds: Seeds | None = None,
    evaluate_every: int = 1000,
    **optimizer: Any,
) -> Training:
    """A run of mock clients with plain SGD at learning rate 1, so that parameters show the released mean."""
    seeds = seeds or Seeds(sampling=1, noise=2)
    store: Any = MockStore()
    grid = LocalGrid(clients or mock_clients(), workers=workers)
    run = RunFolder(folder)
    step = OptimizerConfig(**{"name": "sgd", "learning_rate": 1.0, **optimizer})
    round = Round(
        plan,
        store,
        seeds,
        Budget(plan, Ledger.open(run.ledger), epsilon),
        Release(plan, {"parameters": PARAMETERS}, seeds.noise),
        ServerOptimizer(np.zeros(PARAMETERS, dtype=np.float32), step, plan.steps),
    )
    dispatcher = Dispatcher(grid, units_per_message=units_per_message)
    held_out = HeldOut(grid, store, 500, 2000)
    return Training(
        Job(round=round, gather=dispatcher.gather, held_out=held_out, folder=run, evaluate_every=evaluate_every)
    )
