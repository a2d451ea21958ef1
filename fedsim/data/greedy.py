"""Examples of several owners chosen so that no owner has more than so many of them."""

import numpy as np

from fedsim.data.owners import OwnerSets
from fedsim.errors import InvalidInput
from fedsim.validation import require_at_least

PUBLIC_ORDER = 0
"""Stands for a seed where rows are chosen: their order is no secret, and depends on nothing that the guarantee
hides."""
ORDERS = ("random", "first")


def chosen_rows(sets: OwnerSets, user_offsets: np.ndarray, group_size: int, selection: str = "random") -> np.ndarray:
    """Rows, of which no owner owns more than group_size: greedily, those of fewest owners first.

    The choice depends on the graph alone: on how many rows each set of owners has, and on who is in it. Between two
    rows the order follows from whose they are and where they stand among theirs: more or fewer rows of others do not
    move it, and change the choice only where owners in common have enough, or do not.

    Args:
        sets: The owners of each user of a store.
        user_offsets: int64 [sets + 1]: set s has the rows user_offsets[s] to user_offsets[s + 1] - 1.
        group_size: Most rows of an owner, at least 1.
        selection: The order of rows with equally many owners: "random", a public one, or "first", the data's.

    Returns:
        Row numbers, int64, ascending.

    Raises:
        InvalidInput: For a group size below 1, or a selection by what the rows say.
    """
    require_at_least("plan.group-size", group_size, 1)
    require_order(selection)
    rows_per_set, owners_per_set = np.diff(user_offsets), np.diff(sets.offsets)
    set_of = np.repeat(np.arange(len(rows_per_set)), rows_per_set)
    order = np.arange(len(set_of))
    if selection == "random":
        places = order - np.repeat(user_offsets[:-1], rows_per_set)
        order = np.argsort(_mixed(sets.hashes[set_of], places), kind="stable")
    order = order[np.argsort(owners_per_set[set_of[order]], kind="stable")]
    alone = int((owners_per_set[set_of] == 1).sum())
    chosen, left = _first_of_each(order[:alone], sets.owners[sets.offsets[set_of[order[:alone]]]], group_size, sets)
    budget, ends, members = left.tolist(), sets.offsets.tolist(), sets.owners.tolist()
    shared = []
    for row, which in zip(order[alone:].tolist(), set_of[order[alone:]].tolist(), strict=True):
        owners = members[ends[which] : ends[which + 1]]
        if all(budget[owner] for owner in owners):
            shared.append(row)
            for owner in owners:
                budget[owner] -= 1
    return np.sort(np.concatenate([chosen, np.array(shared, dtype=np.int64)]))


def require_order(selection: str) -> None:
    """Refuse an order that follows from what the rows say, and not from whose they are.

    Raises:
        InvalidInput: Names the selection.
    """
    if selection not in ORDERS:
        hint = "What is chosen must follow from who owns what, and not from what is written."
        raise InvalidInput("plan.selection", selection, "random or first where examples have several owners", hint)


def _mixed(hashes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """A number for each row, uint64, of its set's hash and its place in the set: SplitMix64 from that hash
    (Steele et al. 2014)."""
    mixed = hashes + (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    found: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return found


def _first_of_each(rows: np.ndarray, owners: np.ndarray, most: int, sets: OwnerSets) -> tuple[np.ndarray, np.ndarray]:
    """The first rows of each owner, at most so many, and how many more each may have, int64 [num_owners]."""
    by_owner = np.argsort(owners, kind="stable")
    counts = np.bincount(owners, minlength=sets.num_owners)
    rank = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows[by_owner[rank < most]], most - np.minimum(counts, most)
