"""The server's optimizer, PyTorch's, over the one flat vector of parameters; and the average of what it made.

Its rules look at one coordinate at a time, so that it may also hold some of the coordinates alone: steps of parts that
are cut at multiples of a cache line are, end to end, the bits of a step of the whole.
"""

import math
from collections.abc import Callable, Mapping
from typing import Self

import numpy as np
import torch

from fedsim.config import OptimizerConfig
from fedsim.engine.work import Vector, on_host
from fedsim.schedule import schedule_factor

AVERAGE = "average/"


class ServerOptimizer:
    """Applies released means to the flat parameters.

    Everything here is post-processing of released values: it costs no privacy.

    Args:
        parameters: Trainable parameters, float32 [P]: a numpy array, or a tensor on the device where state and average
            shall be too. Updated in place.
        config: The update rule and its schedule.
        rounds: Rounds of the whole run, over which the schedule runs.
    """

    def __init__(self, parameters: Vector, config: OptimizerConfig, rounds: int) -> None:
        self._tensor = torch.as_tensor(parameters)
        assert self._tensor.is_contiguous()
        self._optimizer = _RULES[config.name](self._tensor, config)
        self._config, self._rounds = config, rounds
        self._round = 0
        self.average = WeightAverage(config, rounds)

    @property
    def device(self) -> torch.device:
        """Where parameters and state are."""
        return self._tensor.device

    @property
    def vector(self) -> Vector:
        """The parameters, float32 [P], where they are: a numpy array, or a tensor on another device."""
        return _vector(self._tensor)

    @property
    def parameters(self) -> np.ndarray:
        """The parameters on the host, float32 [P]: themselves, or a copy of what another device has."""
        host: np.ndarray = self._tensor.cpu().numpy()
        return host

    @property
    def finite(self) -> bool:
        """Whether all parameters are finite."""
        # A sum is finite only if all of its terms are; where finite ones overflow, each is looked at.
        return math.isfinite(float(self._tensor.sum())) or bool(torch.isfinite(self._tensor).all())

    @property
    def result(self) -> Vector:
        """What is measured and exported, float32 [P]: the average, once it has begun, or else the parameters."""
        return self.vector if self.average.values is None else self.average.values

    @property
    def peak_learning_rate(self) -> float:
        """The largest learning rate of the schedule."""
        return self._config.learning_rate

    @property
    def learning_rate(self) -> float:
        """The learning rate that the next step will use."""
        chosen = self._config
        factor = schedule_factor(chosen.schedule, chosen.warmup_rounds, self._round, self._rounds)
        return chosen.learning_rate * factor

    @torch.no_grad()
    def step(self, mean: Vector) -> None:
        """One update with the released mean, float32 [P], as the gradient."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        # End to end in memory: torch's fused rules take any other gradient's values in the wrong places.
        self._tensor.grad = torch.as_tensor(mean, device=self.device).contiguous()
        self._optimizer.step()
        self._tensor.grad = None
        self.average.add(self._tensor, self._round)
        self._round += 1

    @property
    def result_on_host(self) -> np.ndarray:
        """The same as a numpy array."""
        return on_host(self.result)

    def state(self) -> dict[str, np.ndarray]:
        """Everything beside the parameters that a resumed run needs, as named arrays."""
        arrays = {"schedule_round": np.array(self._round, dtype=np.int64)}
        for name, value in self._optimizer.state.get(self._tensor, {}).items():
            if torch.is_tensor(value):
                arrays[name] = value.cpu().numpy()
        return arrays | {AVERAGE + name: array for name, array in self.average.state().items()}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from what state() returned."""
        for name, value in arrays.items():
            if name != "schedule_round" and not name.startswith(AVERAGE):
                self._optimizer.state[self._tensor][name] = torch.from_numpy(np.array(value)).to(self.device)
        self._round = int(arrays["schedule_round"])
        self.average.load_state(
            {name.removeprefix(AVERAGE): arrays[name] for name in arrays if name.startswith(AVERAGE)}, self.device
        )

    def copy(self) -> Self:
        """One that is where this one is, and goes on by itself."""
        made = type(self)(self._tensor.clone(), self._config, self._rounds)
        made.load_state(self.state())
        return made

    def assign(self, parameters: np.ndarray) -> None:
        """Take these parameters, float32 [P], for the present ones."""
        self._tensor.copy_(torch.from_numpy(np.asarray(parameters)))


class WeightAverage:
    """An average of the weights that the rounds released, kept beside those that training goes on from.

    A function of released values alone, fixed before the run: it costs no privacy (post-processing). With θ_i the
    weights after round i and n rounds averaged so far,

    - exponential: Σ_i d^(n−i)·θ_i·(1 − d)/(1 − d^n). The weights sum to 1, so that the start has no part in it: the
      bias correction of Adam (Kingma and Ba 2015, section 3).
    - tail: the mean of θ_i over the last share of the planned rounds (Polyak and Juditsky 1992; the suffix average of
      Rakhlin et al. 2012). How many rounds a budget will allow is not known before, so that planned ones count: a
      run that ends before has a shorter mean, or none.

    Either is θ̄ ← θ̄ + w·(θ − θ̄) with a w of its own, in float32.

    Args:
        config: Which average.
        rounds: Planned rounds of the run.

    Attributes:
        count: Rounds averaged so far.
    """

    def __init__(self, config: OptimizerConfig, rounds: int) -> None:
        self._config, self._planned = config, config.averaged_rounds(rounds)
        self._first = rounds - self._planned if self._planned else math.inf
        self._values: torch.Tensor | None = None
        self.count = 0

    @property
    def values(self) -> Vector | None:
        """The average, float32 [P]; None before its first round, or where there is to be none."""
        return None if self._values is None else _vector(self._values)

    def add(self, released: torch.Tensor, round: int) -> None:
        """Take in the weights [P] that a round (from 0) released, if they have a part."""
        if round < self._first:
            return
        self.count += 1
        if self._values is None:
            self._values = released.detach().clone()
        else:
            self._values.lerp_(released, self._newest)

    @property
    def _newest(self) -> float:
        """The part of the newest weights in the average."""
        if self._config.average == "tail":
            return 1 / self.count
        decay = self._config.average_decay
        return (1 - decay) / -math.expm1(self.count * math.log(decay))

    @property
    def weights(self) -> str:
        """Which weights are measured and exported, in words: for tables, and lines of metrics."""
        if not self.count:
            return "last"
        if self._config.average == "exponential":
            return f"exponential average (decay {self._config.average_decay:g})"
        return f"mean of the last {_rounds(self.count)}"

    @property
    def in_words(self) -> tuple[str, ...]:
        """What was made of the releases, a sentence for the privacy statement; none where nothing was averaged."""
        if not self.count:
            return ()
        average = f"the mean of the weights after each of the last {_rounds(self.count)}"
        if self._config.average == "exponential":
            weighing = f"an exponential average (decay {self._config.average_decay:g})"
            average = f"{weighing} of the weights after each of the {_rounds(self.count)}"
        return (
            f"What is measured and exported is {average}: it is made of released values alone, and costs no privacy "
            "beyond theirs.",
        )

    def missing(self, done: int) -> str | None:
        """Why there is no average although one was asked for, a sentence; None where there is one, or none to be had.

        Args:
            done: Rounds of the run when it ended.
        """
        if self.count or not self._planned or not done:
            return None
        return (
            f"the run ended after {_rounds(done)}, and the average was to begin with round {self._first + 1:.0f}: "
            "the last weights are measured and exported. A larger --optimizer.average-share begins earlier."
        )

    def state(self) -> dict[str, np.ndarray]:
        """What a resumed run needs, as named arrays; nothing before the first round that is averaged."""
        if self._values is None:
            return {}
        return {"values": self._values.cpu().numpy(), "count": np.array(self.count, dtype=np.int64)}

    def load_state(self, arrays: Mapping[str, np.ndarray], device: torch.device | None = None) -> None:
        """Continue from what state() returned, on a device."""
        self._values = torch.from_numpy(np.array(arrays["values"])).to(device or "cpu") if arrays else None
        self.count = int(arrays["count"]) if arrays else 0


# Fused: one pass over parameters, mean and state, where torch's plain rules make about ten.
_RULES: dict[str, Callable[[torch.Tensor, OptimizerConfig], torch.optim.Optimizer]] = {
    "sgd": lambda tensor, config: torch.optim.SGD([tensor], lr=config.learning_rate, fused=True),
    "momentum": lambda tensor, config: torch.optim.SGD(
        [tensor], lr=config.learning_rate, momentum=config.momentum, fused=True
    ),
    "adam": lambda tensor, config: torch.optim.Adam([tensor], lr=config.learning_rate, fused=True),
}


def _vector(tensor: torch.Tensor) -> Vector:
    """The same values as a numpy array, where that takes no copy."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _rounds(count: int) -> str:
    return f"{count} round" + ("s" if count != 1 else "")
