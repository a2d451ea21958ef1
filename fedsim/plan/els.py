"""Example-level sampling: a unit is an example."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fedsim.data.contribution import bounded_rows
from fedsim.errors import InvalidInput
from fedsim.plan.plan import ALL_EXAMPLES, Plan
from fedsim.plan.sizes import UserSizes
from fedsim.rows import UserView
from fedsim.sampling import Population
from fedsim.validation import require_at_least


@dataclass(frozen=True, kw_only=True)
class ElsPlan(Plan):
    """Example-level sampling (DP-SGD-ELS), the centralised baseline, Charles et al. 2024, Algorithm 1.

    Once, each user keeps at most group_size examples. Each step every kept example joins with probability p; its
    gradient is clipped to C. Released: (Σ clipped gradients + N(0, σ²C²I)) / B. A user owns at most group_size of the
    examples, which is what the accountant charges (with Poisson sampling a Binomial(G, p) mixture of Gaussians).

    Attributes:
        num_examples: Kept examples |D|. Treated as public, and said so in the privacy statement.
    """

    name = "els"
    title = "ELS"
    unit = "example"
    redraws = False
    default_group_size = 4
    """Few, so that the accountant charges little for them, and enough that most of the data is used."""
    _sampled_in_words = "kept example"
    _sampling_stream = "batch"

    num_examples: int

    def __post_init__(self) -> None:
        require_at_least("num_examples", self.num_examples, 1)
        super().__post_init__()

    @property
    def population(self) -> int:
        return self.num_examples

    @property
    def public_sizes(self) -> dict[str, int]:
        return {"examples kept for training": self.num_examples}

    @property
    def gradients_per_round(self) -> float:
        return self.normaliser

    def rows_per_unit(self, owned: int) -> int:
        return 1

    def units_per_user(self, owned: int) -> int:
        return min(self.group_size, owned)

    def on(self, users: UserView) -> Self:
        kept = np.minimum(np.diff(users.user_offsets), self.group_size).sum()
        return dataclasses.replace(self, num_examples=int(kept))

    def kept_rows(self, users: UserView, seed: int | bytes) -> np.ndarray:
        """The examples kept of each user, int64 row indices [num_examples]; the same for the whole run."""
        return bounded_rows(users, self.group_size, seed, selection=self.selection)

    def unit_ids(self, users: UserView, seed: int | bytes) -> Callable[[np.ndarray], np.ndarray]:
        rows = self.kept_rows(users, seed)
        return lambda places: rows[places]

    def population_of(self, users: UserView, seed: int | bytes) -> Population:
        rows = self.kept_rows(users, seed)
        return Population(
            size=self.num_examples,
            num_users=users.num_users,
            users_of=lambda places: np.searchsorted(users.user_offsets, rows[places], side="right") - 1,
        )

    def rows_of(
        self, users: UserView, units: np.ndarray, round: int, seed: int | bytes
    ) -> tuple[np.ndarray, np.ndarray]:
        return units, np.arange(len(units), dtype=np.int64)

    def costs(self, users: UserView, units: np.ndarray, row_tokens: int) -> np.ndarray:
        tokens: np.ndarray = users.row_lengths[units].astype(np.float64)
        return tokens

    @property
    def contribution_in_words(self) -> str:
        kept = "all" if self.group_size >= ALL_EXAMPLES else f"at most {self.group_size}"
        return f"{kept} of a user's examples in the whole run; each gradient is"

    @classmethod
    def units_in_group(cls, group_size: int) -> int | None:
        return group_size

    @classmethod
    def draft(cls, sizes: UserSizes, *, gradients_per_round: float, group_size: int, **common: Any) -> Self:
        require_at_least("plan.group-size", group_size, 1)
        kept = sizes.kept(group_size)
        if kept == 0:
            raise InvalidInput("plan.group-size", group_size, "of users that own examples")
        probability = gradients_per_round / kept
        return cls(num_examples=kept, sampling_probability=probability, group_size=group_size, **common)
