"""The nodes of a federation, as the users of a plan: which node stands at which place of the public population."""

import time

import numpy as np
from flwr.serverapp import Grid

from fedsim.errors import Failure, InvalidInput
from fedsim.rows import TokenRows

PAUSE = 0.2
"""Seconds between two looks for nodes."""


class Nodes:
    """The federation's nodes, each at a place of its own, first come first served.

    Places are what is sampled, whether a node has come to stand there or not: a place without a node, and a node that
    is away, count as zero. No node ever makes room for another, so that one more user changes nobody else's part.

    Args:
        grid: Where the nodes are.
        population_size: How many places there are, a public constant.
    """

    def __init__(self, grid: Grid, population_size: int) -> None:
        self.num_users = population_size
        self._grid = grid
        self._ids: dict[int, int] = {}  # by node, its place

    def __len__(self) -> int:
        """Nodes that have been seen."""
        return len(self._ids)

    def look(self) -> None:
        """Give nodes that were not seen before the next places.

        Raises:
            InvalidInput: There are more nodes than places.
        """
        for node in sorted(set(self._grid.get_node_ids()) - set(self._ids)):
            self._ids[node] = len(self._ids)
        if len(self._ids) > self.num_users:
            hint = "It is the constant that sums are divided by: name the nodes that there can be."
            raise InvalidInput("population_size", self.num_users, f"at least the {len(self._ids)} nodes seen", hint)

    def wait(self, least: int, timeout: float) -> None:
        """Wait until so many nodes have come.

        Raises:
            Failure: They have not within so many seconds.
        """
        end = time.monotonic() + timeout
        while True:
            self.look()
            if len(self) >= least:
                return
            if time.monotonic() >= end:
                raise Failure(
                    f"{len(self)} nodes have come up in {timeout:g} s, of {least} (min_available_nodes). Nothing is "
                    "charged."
                )
            time.sleep(PAUSE)

    def at(self, places: np.ndarray) -> list[int]:
        """The nodes at these places, integers [n]; places where none stands are left out."""
        nodes = list(self._ids)  # in the order of their places
        return [nodes[place] for place in places.tolist() if place < len(nodes)]

    # As the users of a plan, each of whom owns one update -------------------------------------------------------

    @property
    def num_rows(self) -> int:
        return self.num_users

    @property
    def user_offsets(self) -> np.ndarray:
        return np.arange(self.num_users + 1)

    @property
    def row_lengths(self) -> np.ndarray:
        return np.ones(self.num_users, dtype=np.int64)

    def take(self, row_indices: np.ndarray, /) -> TokenRows:
        """Nothing: what users own stays on their nodes."""
        raise Failure("the data of nodes cannot be read here")
