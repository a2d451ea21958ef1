"""Nodes whose training is known in advance, and a grid like Flower's own, on which things go wrong."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from clients.mod import user_level_clip_mod
from fedsim.engine.local import LocalGrid
from server.strategy import UserLevelDP

INITIAL = {"weight": np.linspace(-1, 1, 12).reshape(3, 4), "bias": np.zeros(4), "batches": np.arange(3)}
SIZES = {"weight": 12, "bias": 4}
SETTINGS: dict[str, Any] = {
    "population_size": 12,
    "sampling_probability": 0.4,
    "clip_norm": 1.0,
    "delta": 1e-4,
    "noise_multiplier": 0.9,
    "sampling_seed": 5,
    "noise_seed": 6,
    "rehearsal": False,
}
PLANNED: dict[str, Any] = {
    "num_users": 12,
    "group_size": 1,
    "sampling_probability": 0.4,
    "clip_norm": 1.0,
    "noise_multiplier": 0.9,
    "steps": 3,
    "delta": 1e-4,
}
"""A plan with the same numbers."""
Tamper = Callable[[Message, Message], list[Message]]
"""From a request and its honest reply to the replies that the server gets."""


def step_of(partition: int, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a node's training adds to its weights: some of these are longer than the clip norm, some are not."""
    rng = np.random.default_rng(partition)
    return {
        name: rng.normal(size=weights[name].shape) * 0.1 * partition - 0.05 * weights[name]
        for name in ("weight", "bias")
    }


def node_app(mods: list[Any] | None = None, idle: tuple[int, ...] = ()) -> ClientApp:
    """The app; nodes of the idle partitions return what they were sent."""
    app = ClientApp(mods=[user_level_clip_mod] if mods is None else mods)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        weights = {name: array.numpy() for name, array in message.content["arrays"].items()}
        partition = int(context.node_config["partition-id"])
        if partition not in idle:
            for name, step in step_of(partition, weights).items():
                weights[name] += step
        weights["batches"] += 1
        metrics = MetricRecord({"num-examples": 7 * partition, "secret": 0.123})
        content = RecordDict({"arrays": ArrayRecord(dict_of(weights)), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 2.0})}), reply_to=message)

    return app


def dict_of(values: dict[str, np.ndarray]) -> Any:
    """Arrays by name, as a record takes them."""
    from flwr.app import Array

    return {name: Array(value) for name, value in values.items()}


def initial_arrays() -> ArrayRecord:
    return ArrayRecord(dict_of(INITIAL))


class StockGrid(Grid):
    """A grid without `wait`, as Flower's are, whose replies a test tampers with.

    Attributes:
        asked: Every message that was pushed.
        stray: Replies that the next pull hands over whatever it asked for.
        unreachable: Nodes to which no message can be pushed.
    """

    def __init__(self, app: ClientApp, nodes: int, tamper: Tamper | None = None) -> None:
        self._local = LocalGrid(app, workers=nodes)
        self._tamper = tamper
        self._inbox: dict[str, list[Message]] = {}
        self.asked: list[Message] = []
        self.stray: list[Message] = []
        self.unreachable: set[int] = set()

    def set_run(self, run: Any) -> None:
        self._local.set_run(run)

    @property
    def run(self) -> Any:
        return self._local.run

    def create_message(self, *arguments: Any, **more: Any) -> Message:
        return self._local.create_message(*arguments, **more)

    def get_node_ids(self) -> list[int]:
        return self._local.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[Any]:
        identities: list[Any] = []
        for message in messages:
            self.asked.append(message)
            if message.metadata.dst_node_id in self.unreachable:
                identities.append(None)
                continue
            (identity,) = self._local.push_messages([message])
            (reply,) = self._local.wait([identity])
            self._inbox[identity] = [reply] if self._tamper is None else self._tamper(message, reply)
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        stray, self.stray = self.stray, []
        return stray + [reply for identity in message_ids for reply in self._inbox.pop(identity, [])]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))


def train(folder: Path, grid: Grid | None = None, *, rounds: int = 3, timeout: float = 30, **settings: Any) -> Any:
    """Flower's result of a run on 12 nodes."""
    strategy = UserLevelDP(**{**SETTINGS, "output": folder, **settings})
    grid = LocalGrid(node_app(), workers=12) if grid is None else grid
    return strategy.start(grid, initial_arrays(), num_rounds=rounds, timeout=timeout)


def values_of(record: ArrayRecord) -> np.ndarray:
    """The trained arrays, end to end."""
    return np.concatenate([record[name].numpy().ravel() for name in SIZES])
