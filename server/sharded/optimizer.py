"""What the server knows of an optimizer whose coordinates are the workers': everything but its vectors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedsim.config import OptimizerConfig
from fedsim.engine.shard_messages import PARAMETERS
from fedsim.optimizer import AVERAGE, ServerOptimizer
from server.sharded.workers import WorkerGroup

AVERAGED = AVERAGE + "values"


class ShardedOptimizer(ServerOptimizer):
    """An optimizer of no coordinates, which counts rounds and knows schedule and average; workers have the others.

    Vectors are fetched from the workers where somebody asks for them, a share from each, and kept until the next step.

    Args:
        parameters: Trainable parameters, float32 [P], to begin with.
        config, rounds: As for ServerOptimizer.
        group: The workers.
    """

    def __init__(self, parameters: np.ndarray, config: OptimizerConfig, rounds: int, group: WorkerGroup) -> None:
        super().__init__(np.empty(0, dtype=np.float32), config, rounds)
        self.group = group
        self._here = {PARAMETERS: parameters, **super().state()}
        self._all_here = True

    @property
    def vector(self) -> Any:
        """The parameters' name, once workers hold them."""
        return self._here[PARAMETERS] if self.group.held is None else self.group.held

    @property
    def parameters(self) -> np.ndarray:
        return self._named(PARAMETERS)

    @property
    def result(self) -> np.ndarray:
        return self._named(AVERAGED if self.average.count else PARAMETERS)

    def state(self) -> dict[str, np.ndarray]:
        return {name: array for name, array in self.everything().items() if name != PARAMETERS}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load_state({name: array[:0] if array.ndim else array for name, array in arrays.items()})
        self._here, self._all_here = {PARAMETERS: self.parameters, **arrays}, True
        self.group.held = None

    def assign(self, parameters: np.ndarray) -> None:
        self._here = {**self.everything(), PARAMETERS: np.array(parameters, dtype=np.float32)}
        self.group.held = None

    def everything(self) -> dict[str, np.ndarray]:
        """PARAMETERS and all state, whole."""
        if not self._all_here:
            self._here, self._all_here = self.group.tell(), True
        return self._here

    def regroup(self, parts: Sequence[str] = ()) -> set[str]:
        """Have all workers that are ready hold the state; returns which of these parts of a sum are still kept."""
        return self.group.form(self.everything(), self._round, parts)

    def stepped(self) -> None:
        """Take note that the workers have taken a step."""
        self.step(np.empty(0, dtype=np.float32))
        self.group.stepped()
        self._here, self._all_here = {}, False

    def _named(self, name: str) -> np.ndarray:
        if name not in self._here:
            self._here = {**self._here, **self.group.tell((name,))}
        return self._here[name]
