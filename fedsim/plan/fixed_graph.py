"""Example-level sampling where examples have several owners, under fixed-graph adjacency."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from fedsim.data.greedy import PUBLIC_ORDER, chosen_rows, require_order
from fedsim.data.owners import owner_sets_of
from fedsim.errors import InvalidInput
from fedsim.plan.els import ElsPlan
from fedsim.plan.sizes import SharedSizes, UserSizes
from fedsim.privacy.events import Adjacency
from fedsim.rows import UserView
from fedsim.sampling import Poisson, Population
from fedsim.validation import require_at_least


@dataclass(frozen=True, kw_only=True)
class FixedGraphPlan(ElsPlan):
    """Example-level sampling of examples that may have several owners (after Ganesh et al. 2025, arXiv 2503.03622).

    Once, examples are chosen greedily, those of fewest owners first, each while all its owners own fewer than
    group_size of those chosen. Then every step is that of ElsPlan. Neighbouring data sets have the same graph of users
    and prepared rows, so each set of owners has as many rows in both; in one of them all rows of one user are emptied
    where they are. The choice depends on the graph alone, so that it is the same for both, and at most group_size
    clipped gradients differ: what ElsPlan is charged holds unchanged. It does not hold for adding or removing a user,
    which changes the graph, the choice, and so others' examples.
    """

    adjacencies: ClassVar[tuple[Adjacency, ...]] = (Adjacency.FIXED_GRAPH,)

    adjacency: Adjacency = Adjacency.FIXED_GRAPH

    def __post_init__(self) -> None:
        require_independent(self.sampling, self.selection)
        super().__post_init__()

    @property
    def public_sizes(self) -> dict[str, int]:
        return {"examples chosen for training": self.num_examples}

    def on(self, users: UserView) -> Self:
        return dataclasses.replace(self, num_examples=len(self.kept_rows(users, PUBLIC_ORDER)))

    def kept_rows(self, users: UserView, seed: int | bytes) -> np.ndarray:
        """The chosen examples, int64 row indices [num_examples], ascending; whatever the seed, which is secret."""
        sets = owner_sets_of(users)
        if sets is None:
            raise InvalidInput("plan.adjacency", self.adjacency.value, *ALONE)
        return chosen_rows(sets, users.user_offsets, self.group_size, self.selection)

    def unit_ids(self, users: UserView, seed: int | bytes) -> Callable[[np.ndarray], np.ndarray]:
        rows = self.kept_rows(users, seed)
        return lambda places: rows[places]

    def population_of(self, users: UserView, seed: int | bytes) -> Population:
        return Population(size=self.num_examples, num_users=users.num_users, users_of=_nobodys)

    @property
    def contribution_in_words(self) -> str:
        return (
            f"at most {self.group_size} of the examples that a user owns, alone or with others, in the whole run, "
            "chosen once by who owns what and by nothing else, those of fewest owners first; each gradient is"
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        return (
            "It is NOT claimed that adding or removing one user is hidden. Examples may have several owners, and "
            f"which of them are trained on follows from who owns which (each owner has at most {self.group_size}), "
            "so that a user more or less would change the choice among other users' examples too.",
            "The graph of users and examples is treated as public (fixed-graph adjacency, arXiv 2503.03622): which "
            "examples there are in the prepared data, who owns each, and so which were chosen. How many prepared rows "
            "each set of owners has is public with it, and that follows from the lengths of their texts, from "
            "duplicates and from texts that are empty or too short. What is hidden is what one user's prepared rows "
            "say, those that others own with them included: the models would hardly differ if all of these rows had "
            "been emptied where they are, none of them removed.",
        )

    @classmethod
    def draft(cls, sizes: UserSizes, *, gradients_per_round: float, group_size: int, **common: Any) -> Self:
        require_at_least("plan.group-size", group_size, 1)
        if not isinstance(sizes, SharedSizes):
            raise InvalidInput("plan.adjacency", Adjacency.FIXED_GRAPH.value, *ALONE)
        kept = sizes.kept(group_size, common.get("selection", "random"))
        probability = gradients_per_round / kept
        return cls(num_examples=kept, sampling_probability=probability, group_size=group_size, **common)


ALONE = (
    "add-or-remove-one-user where every example has one owner",
    "It claims more at the same ε. Examples of several owners are kept by --data.several-owners keep.",
)


def require_independent(sampling: Any, selection: str) -> None:
    """Refuse what would let the choice or the sampling depend on more than the graph, or has no proof with it.

    Raises:
        InvalidInput: Names the sampling or the selection.
    """
    if type(sampling) is not Poisson:
        hint = "Schemes that group users, or let them take turns, would need an example to be one user's."
        raise InvalidInput("plan.sampling", sampling.name, "poisson where examples have several owners", hint)
    require_order(selection)


def _nobodys(places: np.ndarray) -> np.ndarray:
    raise InvalidInput(
        "plan.sampling", "a scheme that asks whose a unit is", "poisson", "Examples have several owners."
    )
