"""Which data sets count as neighbours."""

from enum import Enum


class Adjacency(Enum):
    """Which two data sets must be hard to tell apart."""

    ADD_OR_REMOVE_ONE_USER = "add-or-remove-one-user"
    REPLACE_ONE_USER = "replace-one-user"
    FIXED_GRAPH = "fixed-graph"
    """Examples may have several owners; who owns which is public, and all of one user's are emptied."""

    @property
    def accounted_as(self) -> "Adjacency":
        """The one of the first two whose pairs dominate: a user's units are all there or all nothing, as where a user
        is added or removed."""
        return Adjacency.ADD_OR_REMOVE_ONE_USER if self is Adjacency.FIXED_GRAPH else self
