"""The server's optimizer: PyTorch's, over the one flat vector of trainable parameters."""

import math

import numpy as np
import torch

from fedsim.config import OptimizerConfig


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
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda round: _schedule_factor(config, round, rounds)
        )

    @property
    def learning_rate(self) -> float:
        """The learning rate that the next step will use."""
        return float(self._schedule.get_last_lr()[0])

    @torch.no_grad()
    def step(self, mean: np.ndarray) -> None:
        """One update with the released mean, float32 [P], as the gradient."""
        self._tensor.grad = torch.from_numpy(mean)
        self._optimizer.step()
        self._tensor.grad = None
        self._schedule.step()

    def state(self) -> dict[str, np.ndarray]:
        """Everything beside the parameters that a resumed run needs, as named arrays."""
        arrays = {"schedule_round": np.array(self._schedule.last_epoch, dtype=np.int64)}
        for name, value in self._optimizer.state.get(self._tensor, {}).items():
            if torch.is_tensor(value):
                arrays[name] = value.numpy()
        return arrays

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Continue from what state() returned."""
        for name, value in arrays.items():
            if name != "schedule_round":
                self._optimizer.state[self._tensor][name] = torch.from_numpy(np.array(value))
        while self._schedule.last_epoch < int(arrays["schedule_round"]):
            self._optimizer._opt_called = True  # type: ignore[attr-defined]  # the steps were taken before the run was resumed
            self._schedule.step()


_RULES = {
    "sgd": lambda tensor, config: torch.optim.SGD([tensor], lr=config.learning_rate),
    "momentum": lambda tensor, config: torch.optim.SGD([tensor], lr=config.learning_rate, momentum=config.momentum),
    "adam": lambda tensor, config: torch.optim.Adam([tensor], lr=config.learning_rate),
}


def _schedule_factor(config: OptimizerConfig, round: int, rounds: int) -> float:
    """The learning rate of a round over the peak: linear warm-up, then the named decay."""
    if round < config.warmup_rounds:
        return (round + 1) / (config.warmup_rounds + 1)
    progress = (round - config.warmup_rounds) / max(1, rounds - config.warmup_rounds)
    if config.schedule == "linear":
        return max(0.0, 1.0 - progress)
    if config.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return 1.0
