"""User-level sampling where a user is a node of a federation, which trains in a way of its own."""

from dataclasses import dataclass

import numpy as np

from fedsim.plan.uls import UlsPlan
from fedsim.rows import UserView


@dataclass(frozen=True, kw_only=True)
class NodePlan(UlsPlan):
    """User-level sampling of nodes whose training is somebody else's code: federated averaging with user-level DP.

    Each round every node joins with probability q, trains as it likes on its own data, and takes the difference of
    the arrays that it was sent and those that it has made of them, which is clipped to C. Released:
    (Σ clipped differences + N(0, σ²C²I)) / (qN), McMahan et al. 2018 with Poisson sampling. group_size, selection,
    weighting and local steps, which tell fedsim's own clients how to compute an update, have no part in it.
    """

    @property
    def public_sizes(self) -> dict[str, int]:
        return {"nodes": self.num_users}

    def costs(self, users: UserView, units: np.ndarray, row_tokens: int) -> np.ndarray:
        """Nobody knows what a node will take."""
        return np.ones(len(units))

    @property
    def contribution_in_words(self) -> str:
        return (
            "a user is a node of the federation, and whatever its own training does enters as one difference, of the "
            "arrays that it was sent and those that it returned, which is (by the node, and again by the server where "
            "it is still longer)"
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the guarantee of nodes rests on, beyond that of users in one data set: sentences."""
        return (
            "A user is one node (a Flower SuperNode): a person with several nodes, or whose data lies on several, is "
            "protected less, and people who share a node are protected together, as one user.",
            "What a node answers is assumed to depend on the arrays that it was sent and on its own user's data and "
            "randomness alone: not on other nodes' data, and not on state that shows which rounds others were in.",
            "A node that fails, or answers too late or with something else than an update, counts as zero, as a user "
            "does that was removed. It is assumed that the data of one node makes no other node fail or late: where "
            "nodes share a machine, the time-out must be long enough to play no part.",
            "What nodes send is not encrypted against the server, which sees each clipped update.",
        )
