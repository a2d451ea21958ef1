"""User-level sampling: a unit is a user."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fedsim.data.contribution import draw_rows
from fedsim.plan.limits import ALL_EXAMPLES
from fedsim.plan.plan import Plan
from fedsim.plan.sizes import UserSizes, require_one_owner
from fedsim.rows import UserView
from fedsim.sampling import Population
from fedsim.validation import require_at_least


@dataclass(frozen=True, kw_only=True)
class UlsPlan(Plan):
    """User-level sampling (DP-SGD-ULS; with several local steps DP-FedAvg), Charles et al. 2024, Algorithm 2.

    Each round every user joins with probability q. A user that joins draws at most group_size of its examples,
    computes its update (their mean gradient, or θ − θ_K after K local steps), and clips it to C. Released:
    (Σ clipped updates + N(0, σ²C²I)) / (qN).

    Attributes:
        num_users: N, users in the training population. Treated as public.
        local_steps: K.
        local_learning_rate: Learning rate of the local steps; without effect when K = 1.
    """

    name = "uls"
    title = "ULS"
    unit = "user"
    redraws = True
    default_group_size = 1
    """One example of each user, so that the cohort is as large as the compute allows."""
    _sampled_in_words = "user"
    _sampling_stream = "cohort"

    num_users: int
    local_steps: int = 1
    local_learning_rate: float = 0.1

    def __post_init__(self) -> None:
        require_at_least("num_users", self.num_users, 1)
        require_at_least("plan.local-steps", self.local_steps, 1)
        super().__post_init__()

    @property
    def population(self) -> int:
        return self.num_users

    @property
    def public_sizes(self) -> dict[str, int]:
        return {"users in the training split": self.num_users}

    @property
    def gradients_per_round(self) -> float:
        """At most M·G: fewer where users own fewer than G examples."""
        return self.normaliser * self.group_size

    def rows_per_unit(self, owned: int) -> int:
        return min(self.group_size, owned)

    def units_per_user(self, owned: int) -> int:
        return 1

    def on(self, users: UserView) -> Self:
        return dataclasses.replace(self, num_users=users.num_users)

    def unit_ids(self, users: UserView, seed: int | bytes) -> Callable[[np.ndarray], np.ndarray]:
        return lambda places: places

    def population_of(self, users: UserView, seed: int | bytes) -> Population:
        return Population.of_users(self.num_users)

    def rows_of(
        self, users: UserView, units: np.ndarray, round: int, seed: int | bytes
    ) -> tuple[np.ndarray, np.ndarray]:
        return draw_rows(users, units, self.group_size, seed, round, selection=self.selection)

    def costs(self, users: UserView, units: np.ndarray, row_tokens: int) -> np.ndarray:
        owned = users.user_offsets[units + 1] - users.user_offsets[units]
        tokens: np.ndarray = np.minimum(owned, self.group_size) * float(row_tokens)
        return tokens

    @property
    def contribution_in_words(self) -> str:
        drawn = "all" if self.group_size >= ALL_EXAMPLES else f"at most {self.group_size}"
        steps = f"of {self.local_steps} local steps (learning rate {self.local_learning_rate:g}) "
        return f"{drawn} of a user's examples a step; their one update {steps if self.local_steps > 1 else ''}is"

    @property
    def local_descent(self) -> tuple[int, float] | None:
        return (self.local_steps, self.local_learning_rate) if self.local_steps > 1 else None

    @classmethod
    def units_in_group(cls, group_size: int) -> int | None:
        return None

    @classmethod
    def draft(cls, sizes: UserSizes, *, gradients_per_round: float, group_size: int, **common: Any) -> Self:
        require_one_owner(sizes, common.get("adjacency", cls.adjacency))
        require_at_least("plan.group-size", group_size, 1)
        probability = gradients_per_round / (group_size * sizes.num_users)
        return cls(num_users=sizes.num_users, sampling_probability=probability, group_size=group_size, **common)
