"""How many examples users own: what a plan is made from, beside the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedsim.data.greedy import chosen_rows
from fedsim.data.owners import OwnerSets, owner_sets_of
from fedsim.errors import InvalidInput
from fedsim.privacy.events import Adjacency
from fedsim.rows import SizeCounts, SizedUsers
from fedsim.validation import require_at_least


@dataclass(frozen=True, kw_only=True)
class UserSizes:
    """How many examples users own.

    Attributes:
        num_users: N.
        sizes: Examples of representative users, ascending.
        users: How many users each of them stands for, where not all stand for as many; None where they do.
        source: Where the numbers come from, in words.
        private: Whether they were computed from the data to be protected.
    """

    num_users: int
    sizes: np.ndarray
    source: str
    private: bool
    users: np.ndarray | None = None

    @classmethod
    def of_users(cls, view: SizedUsers) -> "UserSizes":
        """The sizes of every user of a store's view."""
        if (sets := owner_sets_of(view)) is not None:
            return SharedSizes.of_sets(sets, view.user_offsets)
        counts = SizeCounts.of(view)
        return cls(
            num_users=view.num_users,
            sizes=counts.sizes,
            users=counts.users,
            source="counted in the training split of the user store",
            private=True,
        )

    @classmethod
    def of_quantiles(cls, num_users: int, quantiles: Mapping[float, float]) -> "UserSizes":
        """Sizes between quantiles that a person typed in, interpolated in the logarithm.

        Args:
            num_users: N.
            quantiles: Level in [0, 1] → examples; {0.5: 12, 0.9: 65, 1: 1404}. One quantile means that all users own
                as many; without level 0 the least user owns 1 example.
        """
        require_at_least("num-users", num_users, 1)
        levels = sorted(quantiles)
        if not levels:
            raise InvalidInput("user-sizes", dict(quantiles), "at least one quantile, such as 0.5:12")
        for level in levels:
            if not 0 <= level <= 1:
                raise InvalidInput("user-sizes", level, "levels between 0 and 1")
            require_at_least("user-sizes", quantiles[level], 1)
        values = [float(quantiles[level]) for level in levels]
        if values != sorted(values):
            raise InvalidInput("user-sizes", dict(quantiles), "sizes that do not fall as the level rises")
        if len(levels) > 1 and levels[0] > 0:
            levels, values = [0.0, *levels], [1.0, *values]
        middles = (np.arange(2000) + 0.5) / 2000
        sizes = np.rint(np.exp(np.interp(middles, levels, np.log(values)))).astype(np.int64)
        return cls(num_users=num_users, sizes=sizes, source="as given", private=False)

    @property
    def several_owners(self) -> bool:
        """Whether examples may have several owners, so that the users' sizes do not add up to all examples."""
        return False

    @property
    def median(self) -> int:
        """Examples of the median user, at least 1."""
        return max(1, int(self.quantile(0.5)))

    def quantile(self, level: float) -> float:
        """Examples that a share `level` of the users do not exceed, interpolated between two users."""
        stand_for = np.ones(len(self.sizes), dtype=np.int64) if self.users is None else self.users
        return SizeCounts(sizes=self.sizes, users=stand_for).quantile(level)

    def kept(self, group_size: int) -> int:
        """|D|: examples that ELS keeps when each user keeps at most group_size."""
        return round(self.num_users * float(np.average(np.minimum(self.sizes, group_size), weights=self.users)))


@dataclass(frozen=True, kw_only=True)
class SharedSizes(UserSizes):
    """How many examples users own, alone or with others.

    Attributes:
        sets: Who owns them together.
        user_offsets: int64 [sets + 1]: where the rows of each set of owners begin and end.
    """

    sets: OwnerSets
    user_offsets: np.ndarray

    @classmethod
    def of_sets(cls, sets: OwnerSets, user_offsets: np.ndarray) -> "SharedSizes":
        """Those of all who own an example of these sets."""
        return cls(
            num_users=sets.num_owners,
            sizes=np.sort(sets.sizes(np.diff(user_offsets))),
            source="counted in the training split of the user store, an example for each of its owners",
            private=True,
            sets=sets,
            user_offsets=user_offsets,
        )

    @property
    def several_owners(self) -> bool:
        return True

    def kept(self, group_size: int, selection: str = "random") -> int:
        """Examples that are chosen when no owner has more than group_size of them, in this order."""
        return len(chosen_rows(self.sets, self.user_offsets, group_size, selection))


def require_one_owner(sizes: UserSizes, adjacency: Adjacency) -> None:
    """Refuse examples of several owners where a plan counts each as one user's.

    Raises:
        InvalidInput: Names the adjacency.
    """
    if sizes.several_owners:
        hint = "The data keeps examples of several owners, which that does not hide. See docs/data.md."
        raise InvalidInput("plan.adjacency", adjacency.value, Adjacency.FIXED_GRAPH.value, hint)
