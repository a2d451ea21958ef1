"""What a run of nodes is: the plan that a strategy's arguments make, and what must stay when a run goes on."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from fedsim.config import OptimizerConfig
from fedsim.engine.node_messages import ArrayLayout
from fedsim.errors import InvalidInput
from fedsim.plan import ALL_EXAMPLES
from fedsim.plan.nodes import NodePlan
from fedsim.seeds import Seeds
from fedsim.validation import require_at_least, require_between, require_positive, require_probability


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run of nodes is, as its strategy says.

    Attributes:
        plan: The calibrated plan.
        limit: ε that must not be exceeded; inf where the noise was given and no ε.
        optimizer: The server's rule.
        seeds: Sampling and noise seeds of a new run.
        seeds_given: Which of them somebody chose ("sampling", "noise").
        release: Whether the arrays are to be released, so that nothing private is written.
        checkpoint_rounds: Rounds between checkpoints; 0 keeps none.
    """

    plan: NodePlan
    limit: float
    optimizer: OptimizerConfig
    seeds: Seeds
    seeds_given: tuple[str, ...]
    release: bool
    checkpoint_rounds: int

    def identity(self, layout: ArrayLayout) -> dict[str, Any]:
        """What must be the same when a run goes on, as JSON values."""
        values = {
            "limit": repr(self.limit),
            "optimizer": vars(self.optimizer),
            "release": self.release,
            "seeds_given": list(self.seeds_given),
            "shapes": {name: list(shape) for name, shape in layout.shapes.items()},
        }
        plain: dict[str, Any] = json.loads(json.dumps({"settings": values, "plan": self.plan.to_values()}))
        return plain


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is asked of the noise, and of how many nodes: everything of a plan but its rounds.

    Attributes:
        population_size, sampling_probability, clip_norm, delta, epsilon, noise_multiplier: As UserLevelDP takes them.

    Raises:
        InvalidInput: A value out of range, or neither an ε nor noise.
    """

    population_size: int
    sampling_probability: float
    clip_norm: float
    delta: float
    epsilon: float | None
    noise_multiplier: float | None

    def __post_init__(self) -> None:
        require_at_least("population_size", self.population_size, 1)
        require_probability("sampling_probability", self.sampling_probability)
        require_positive("clip_norm", self.clip_norm)
        require_between("delta", self.delta, 0, 1)
        for name in ("epsilon", "noise_multiplier"):
            if (value := getattr(self, name)) is not None:
                require_positive(name, value)
        if self.epsilon is None and self.noise_multiplier is None:
            raise InvalidInput("epsilon", None, "given, or else noise_multiplier")

    @property
    def limit(self) -> float:
        """ε that must not be exceeded; inf where none is named."""
        return math.inf if self.epsilon is None else self.epsilon

    @property
    def draft(self) -> NodePlan:
        """A plan of one round; with an ε as target, before it is calibrated."""
        return NodePlan(
            num_users=self.population_size,
            group_size=ALL_EXAMPLES,
            sampling_probability=self.sampling_probability,
            clip_norm=self.clip_norm,
            noise_multiplier=1.0 if self.noise_multiplier is None else self.noise_multiplier,
            steps=1,
            delta=self.delta,
        )

    def plan(self, num_rounds: int) -> NodePlan:
        """What so many rounds will do: with an ε as target, with the least noise that reaches it.

        Raises:
            InvalidInput: No noise reaches it, or the limit has no room for one round.
        """
        require_at_least("num_rounds", num_rounds, 1)
        plan = dataclasses.replace(self.draft, steps=num_rounds)
        if self.noise_multiplier is None:
            return plan.calibrate(self.limit)
        first = plan.epsilon(1).upper
        if not first <= self.limit:
            least = math.ceil(first * 1e3) / 1e3
            raise InvalidInput("epsilon", self.limit, f"at least {least:g}, which one round costs")
        return plan
