"""Uniform subsets of a large population, in time and memory of the subset."""

import numpy as np

SPARSE = 20, 4
"""numpy lists the whole population for a subset of more than a 20th of it; from a quarter on that is no longer than a
few subsets."""
LISTED = 10_000
"""A population up to which numpy never lists it for a subset."""


def uniform_subset(generator: np.random.Generator, population: int, size: int) -> np.ndarray:
    """So many of 0 … population − 1, each set of them equally likely, in O(size log size) whatever their share is.

    The numbers, and what the generator draws after them, are those of numpy's
    `generator.choice(population, size, replace=False, shuffle=False)`, which takes O(population) for large shares.

    Args:
        generator: What draws.
        population: How many there are to draw from.
        size: How many are drawn, at most the population.

    Returns:
        Ascending, int64 [size].
    """
    from_share, to_share = SPARSE
    if population > LISTED and population // from_share < size < population // to_share:
        return np.sort(_last_places(generator, population, size))
    return np.sort(generator.choice(population, size=size, replace=False, shuffle=False)).astype(np.int64)


def _last_places(generator: np.random.Generator, population: int, size: int) -> np.ndarray:
    """What stands at the last places of a list 0 … population − 1 after Fisher and Yates have shuffled these, in any
    order, without the list.

    From the last place down, each place i changes values with a place j ≤ i. What stands at i when its turn comes was
    put there by the latest place before that drew i, and was what then stood at that one: chains, followed to their
    ends all at once. In the last places there are then all values, but those that were moved below them, and the
    values that these places below had.
    """
    first = population - size
    places = np.arange(population - 1, first - 1, -1)
    drawn = generator.integers(0, places, endpoint=True)
    moved_from = np.arange(size)
    within = (drawn >= first) & (drawn < places)
    moved_from[drawn[within] - first] = places[within] - first  # where several drew it, the latest: they come in order
    while not np.array_equal(ends := moved_from[moved_from], moved_from):
        moved_from = ends
    below = drawn < first
    # By places below, which of the last places put its value there in the end.
    targets, latest = np.unique(drawn[below][::-1], return_index=True)
    gone = np.zeros(size, dtype=bool)
    gone[moved_from[places[below][::-1][latest] - first]] = True
    return np.concatenate([targets, np.flatnonzero(~gone) + first])
