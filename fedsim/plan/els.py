"""Example-level sampling: a unit is an example."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fedsim.data.contribution import bounded_rows, bounded_rows_of
from fedsim.errors import InvalidInput
from fedsim.plan.limits import ALL_EXAMPLES
from fedsim.plan.plan import Plan
from fedsim.plan.sizes import UserSizes, require_one_owner
from fedsim.rows import SizeCounts, UserView
from fedsim.sampling import Population
from fedsim.validation import require_at_least

MOST_SLOTS = 8
"""Slots for each kept example up to which they are drawn from: a round draws as many times its batch."""


@dataclass(frozen=True, kw_only=True)
class ElsPlan(Plan):
    """Example-level sampling (DP-SGD-ELS), the centralised baseline, Charles et al. 2024, Algorithm 1.

    Once, each user keeps at most group_size examples. Each step every kept example joins with probability p; its
    gradient is clipped to C. Released: (Σ clipped gradients + N(0, σ²C²I)) / B. A user owns at most group_size of the
    examples, which is what the accountant charges (with Poisson sampling a Binomial(G, p) mixture of Gaussians).

    Attributes:
        num_examples: Kept examples |D|. Treated as public, and said so in the privacy statement.
        by_slots: Whether a round draws among slots, group_size of each user, where the sampling permits it: a user's
            j-th slot holds its j-th kept example, those beyond its examples are empty, and who draws an empty one
            draws nothing. The law is that of drawing among all kept examples, which then need not be listed; the same
            seed draws others. Off in the plans of runs that were begun when there was none but the list.
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
    by_slots: bool = False

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
        return dataclasses.replace(self, num_examples=SizeCounts.of(users).kept(self.group_size))

    def kept_rows(self, users: UserView, seed: int | bytes) -> np.ndarray:
        """The examples kept of each user, int64 row indices [num_examples]; the same for the whole run."""
        return bounded_rows(users, self.group_size, seed, selection=self.selection)

    def unit_ids(self, users: UserView, seed: int | bytes) -> Callable[[np.ndarray], np.ndarray]:
        counts = SizeCounts.of(users)
        if counts.largest <= self.group_size:
            return lambda places: places
        if self._draws_among_slots(counts):
            return lambda places: self._rows_in(places, users, seed)
        rows = self.kept_rows(users, seed)
        return lambda places: rows[places]

    def population_of(self, users: UserView, seed: int | bytes) -> Population:
        counts = SizeCounts.of(users)
        if self._draws_among_slots(counts):
            slots = users.num_users * self.group_size
            return Population(size=slots, num_users=users.num_users, users_of=lambda places: places // self.group_size)
        rows_of = self.unit_ids(users, seed)
        return Population(
            size=self.num_examples,
            num_users=users.num_users,
            users_of=lambda places: np.searchsorted(users.user_offsets, rows_of(places), side="right") - 1,
        )

    def _draws_among_slots(self, counts: SizeCounts) -> bool:
        """Whether places are slots: where they may be empty, few are, and examples are left out at all."""
        permitted = self.by_slots and self.sampling.permits_empty_places()
        few = counts.num_users * self.group_size <= MOST_SLOTS * counts.kept(self.group_size)
        return permitted and few and counts.largest > self.group_size

    def _rows_in(self, slots: np.ndarray, users: UserView, seed: int | bytes) -> np.ndarray:
        """The rows in these slots, without the empty ones; int64, ascending where slots are."""
        owners, within = np.divmod(np.asarray(slots, dtype=np.int64), self.group_size)
        full = within < users.user_offsets[owners + 1] - users.user_offsets[owners]
        drawn, places = np.unique(owners[full], return_inverse=True)
        rows, owner = bounded_rows_of(users, drawn, self.group_size, seed, selection=self.selection)
        firsts = np.searchsorted(owner, np.arange(len(drawn)))
        found: np.ndarray = rows[firsts[places] + within[full]]
        return found

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

    def to_values(self) -> dict[str, Any]:
        values = super().to_values()
        if not self.by_slots:  # as runs wrote it that were begun without: they go on as the same plan
            del values["by_slots"]
        return values

    @classmethod
    def draft(cls, sizes: UserSizes, *, gradients_per_round: float, group_size: int, **common: Any) -> Self:
        require_one_owner(sizes, common.get("adjacency", cls.adjacency))
        require_at_least("plan.group-size", group_size, 1)
        kept = sizes.kept(group_size)
        if kept == 0:
            raise InvalidInput("plan.group-size", group_size, "of users that own examples")
        probability = gradients_per_round / kept
        common = {"by_slots": True, **common}
        return cls(num_examples=kept, sampling_probability=probability, group_size=group_size, **common)
