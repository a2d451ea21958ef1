"""The server's optimizer: PyTorch's, over the one flat vector of trainable parameters."""

from collections.abc import Callable

import numpy as np
import torch

from fedsim.config import OptimizerConfig
from fedsim.schedule import schedule_factor


class ServerOptimizer:
    """Applies released means to the flat parameters.

    Everything here is post-processing of released values: it costs no privacy.

    Args:
        parameters: Trainable parameters, float32 [P]; updated in place.
        config: The update rule and its schedule.
        rounds: Rounds of the whole run, over which the schedule runs.
    """

    def __init__(self, parameters: np.ndarray, config: OptimizerConfig, rounds: int) -> None:
        self.parameters = parameters
        self._tensor = torch.from_numpy(parameters)
        self._optimizer = _RULES[config.name](self._tensor, config)
        self._config, self._rounds = config, rounds
        self._round = 0

    @property
    def learning_rate(self) -> float:
        """The learning rate that the next step will use."""
        chosen = self._config
        factor = schedule_factor(chosen.schedule, chosen.warmup_rounds, self._round, self._rounds)
        return chosen.learning_rate * factor

    @torch.no_grad()
    def step(self, mean: np.ndarray) -> None:
        """One update with the released mean, float32 [P], as the gradient."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._tensor.grad = torch.from_numpy(mean)
        self._optimizer.step()
        self._tensor.grad = None
        self._round += 1

    def state(self) -> dict[str, np.ndarray]:
        """Everything beside the parameters that a resumed run needs, as named arrays."""
        arrays = {"schedule_round": np.array(self._round, dtype=np.int64)}
        for name, value in self._optimizer.state.get(self._tensor, {}).items():
            if torch.is_tensor(value):
                arrays[name] = value.numpy()
        return arrays

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Continue from what state() returned."""
        for name, value in arrays.items():
            if name != "schedule_round":
                self._optimizer.state[self._tensor][name] = torch.from_numpy(np.array(value))
        self._round = int(arrays["schedule_round"])


_RULES: dict[str, Callable[[torch.Tensor, OptimizerConfig], torch.optim.Optimizer]] = {
    "sgd": lambda tensor, config: torch.optim.SGD([tensor], lr=config.learning_rate),
    "momentum": lambda tensor, config: torch.optim.SGD([tensor], lr=config.learning_rate, momentum=config.momentum),
    "adam": lambda tensor, config: torch.optim.Adam([tensor], lr=config.learning_rate),
}
