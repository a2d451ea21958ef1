"""Compute and guarantee of a plan, as options."""

from dataclasses import dataclass
from typing import Literal

from fedsim.errors import InvalidInput
from fedsim.planner import Target, Total
from fedsim.privacy.events import Adjacency
from fedsim.validation import require_at_least, require_positive

GRADIENTS_PER_ROUND = 256
ROUNDS = 16


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Compute and guarantee, named as in the other commands."""

    epsilon: float = 8.0
    """User-level ε of the whole run."""
    delta: float = 1e-5
    """User-level δ."""
    total_gradients: float | None = None
    """Gradient evaluations of the whole run, in place of gradients-per-round and rounds: cohort, rounds, group size
    and bands of noise are then chosen together."""
    gradients_per_round: int | None = None
    """Expected gradient evaluations a round; 256 when not given."""
    rounds: int | None = None
    """Rounds (uls) or steps (els); 16 when not given."""
    adjacency: Literal["add-or-remove-one-user", "replace-one-user"] = "add-or-remove-one-user"
    """The change of the data set that must stay hidden."""
    tokens: float | None = None
    """The budget as tokens over the whole run, in place of gradients-per-round."""
    hours: float | None = None
    """The budget as hours of training, in place of gradients-per-round; needs tokens-per-second."""
    tokens_per_second: float | None = None
    """Measured training throughput."""
    tokens_per_example: float = 64.0
    """Mean tokens of an example, where the budget is in tokens or hours."""

    def __post_init__(self) -> None:
        if self.total_gradients is None:
            return
        for name in ("gradients_per_round", "rounds", "tokens", "hours", "tokens_per_second"):
            if getattr(self, name) is not None:
                flag = f"plan.{name.replace('_', '-')}"
                hint = "It is chosen for a total, or given in its place."
                raise InvalidInput(flag, getattr(self, name), "left out with plan.total-gradients", hint)

    def total(self) -> Total | None:
        """The total that is to be spent as is best; None where gradients a round and rounds are fixed."""
        if self.total_gradients is None:
            return None
        return Total(
            epsilon=self.epsilon,
            delta=self.delta,
            gradients=self.total_gradients,
            adjacency=Adjacency(self.adjacency),
        )

    def target(self) -> Target:
        """Gradient evaluations a round from whichever budget was given."""
        rounds = ROUNDS if self.rounds is None else self.rounds
        require_at_least("plan.rounds", rounds, 1)
        if self.tokens is not None and self.hours is not None:
            raise InvalidInput("plan.hours", self.hours, "left out when plan.tokens is given")
        tokens = self.tokens
        if self.hours is not None:
            if self.tokens_per_second is None:
                raise InvalidInput(
                    "plan.tokens-per-second", None, "given with plan.hours", "A run's report shows its throughput."
                )
            require_positive("plan.hours", self.hours)
            require_positive("plan.tokens-per-second", self.tokens_per_second)
            tokens = self.hours * 3600 * self.tokens_per_second
        gradients = float(GRADIENTS_PER_ROUND if self.gradients_per_round is None else self.gradients_per_round)
        if tokens is not None:
            require_positive("plan.tokens", tokens)
            require_positive("plan.tokens-per-example", self.tokens_per_example)
            gradients = tokens / self.tokens_per_example / rounds
        return Target(
            epsilon=self.epsilon,
            delta=self.delta,
            gradients_per_round=gradients,
            rounds=rounds,
            adjacency=Adjacency(self.adjacency),
        )
