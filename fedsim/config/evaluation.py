"""How held-out users are measured, as options."""

import math
from dataclasses import dataclass

from fedsim.config.plan import PlanConfig
from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import Adjacency, Composed, Event
from fedsim.privacy.held_out import PrivateEvaluation, evaluations_of
from fedsim.validation import require_at_least, require_positive

PRIVATE_OPTIONS = ("private_epsilon", "private_clip")
"""What does nothing where evaluations are not released with noise."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the model is measured on held-out users."""

    every: int = 4
    """Rounds between evaluations on validation users; the first and last model are always evaluated."""
    max_rows: int = 500
    """Most rows of an evaluation while training (whole users, drawn once)."""
    test_rows: int = 2000
    """Most rows of the final evaluation on test users."""
    private: bool = False
    """Release how the loss of validation users changed, at every evaluation, with noise that hides each of them; its
    ε is in the statement. Each user is then measured by their own draw, on their first rows, and max-rows is what is
    measured on average. Losses without noise are written as training-metrics says."""
    private_epsilon: float = 2.0
    """User-level ε of all private evaluations of the run together, at plan.delta."""
    private_clip: float = 2.0
    """Largest change of one user's loss, in nats, that counts in a private evaluation."""

    def __post_init__(self) -> None:
        for name in ("every", "max_rows", "test_rows"):
            require_at_least(f"evaluation.{name.replace('_', '-')}", getattr(self, name), 1)
        for name in PRIVATE_OPTIONS:
            option, value = f"evaluation.{name.replace('_', '-')}", getattr(self, name)
            require_positive(option, value)
            if not self.private and value != (default := getattr(EvaluationConfig, name)):
                hint = "It does nothing without --evaluation.private; add that, or leave it out."
                raise InvalidInput(option, value, f"{default} without evaluation.private", hint)

    def measured(self, users: int) -> tuple[int, int]:
        """How many of so many validation users a private evaluation measures on average, and on how many rows each.

        As many users as there are rows to measure, for the noise falls with them; more rows of each only where all are
        measured. It follows from public numbers alone.
        """
        return min(users, self.max_rows), max(1, self.max_rows // max(users, 1))

    def require_possible(self, plan: PlanConfig) -> None:
        """Refuse private evaluations that the plan's guarantee has no room for, or that would not be one with it.

        Raises:
            InvalidInput: Names what differs.
        """
        if not self.private:
            return
        if math.isinf(plan.epsilon) or plan.noise_multiplier == 0:
            hint = "A run without a guarantee would not be what the noise protects."
            raise InvalidInput("evaluation.private", True, "off without noise in training", hint)
        if plan.adjacency != Adjacency.ADD_OR_REMOVE_ONE_USER.value:
            hint = "Who takes a user's place may be held out where the user was trained on, and pays for both."
            allowed = f"{Adjacency.ADD_OR_REMOVE_ONE_USER.value} with evaluation.private"
            raise InvalidInput("plan.adjacency", plan.adjacency, allowed, hint)
        if self.private_epsilon > plan.epsilon:
            hint = "The run's ε is the larger of what training users and held-out users pay."
            raise InvalidInput(
                "evaluation.private-epsilon", self.private_epsilon, f"at most plan.epsilon, {plan.epsilon:g}", hint
            )

    def private_evaluation(self, users: int, plan: PlanConfig, before: Event) -> PrivateEvaluation | None:
        """The private evaluations of a run; None where none are asked for.

        Args:
            users: Validation users in the data, a number that is treated as public.
            plan: Gives the planned rounds, the guarantee, and the ε that nobody may exceed.
            before: What was released before of people who may be held out now.

        Raises:
            InvalidInput: There are no validation users, or what was released before leaves no room.
        """
        if not self.private:
            return None
        if users == 0:
            hint = "Raise --data.validation-fraction."
            raise InvalidInput("evaluation.private", True, "off without validation users", hint)
        found = PrivateEvaluation.calibrated(
            epsilon=self.private_epsilon,
            delta=plan.delta,
            count=evaluations_of(plan.rounds, self.every),
            clip_norm=self.private_clip,
            users=self.measured(users)[0],
            population=users,
        )
        whole = epsilon_bounds(Composed(events=(before, found.event)), plan.delta).upper
        if whole > plan.epsilon:
            hint = "Held-out users may be those of earlier runs, whose releases count."
            allowed = (
                f"so much that both together stay within plan.epsilon, {plan.epsilon:g}: they come to {whole:.3f}"
            )
            raise InvalidInput("evaluation.private-epsilon", self.private_epsilon, allowed, hint)
        return found
