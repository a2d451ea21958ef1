"""Which of a user's rows are used: contribution bounding for the whole run (ELS) and draws for one round (ULS)."""

from typing import Literal, get_args

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.randomness import stream
from fedsim.rows import UserView
from fedsim.validation import require_at_least

Selection = Literal["random", "longest", "first", "chunk"]
"""random: uniformly without replacement. longest: most tokens, earlier rows first among equals. first: in the order
of the data. chunk: neighbouring rows, from a uniformly random place."""

ROWS_AT_ONCE = 1 << 22
"""Rows ranked in one go: bounds the memory of bounding a large store."""


def bounded_rows(view: UserView, group_size: int, seed: int | bytes, selection: Selection = "random") -> np.ndarray:
    """The rows that ELS trains on: min(group_size, rows of the user) rows of every user.

    A view, not a copy: the store stays as it is. What is kept of one user depends on (seed, user, number of rows of
    the user) alone.

    Args:
        view: The training users.
        group_size: Most rows kept of a user, at least 1.
        seed: Seed of the selection, or secret key bytes.
        selection: How the rows are chosen.

    Returns:
        Ascending row numbers, int64 [kept rows].

    Raises:
        InvalidInput: For a group size below 1 or an unknown selection.
    """
    _check(group_size, selection)
    keys = _round_keys(seed, "bounded-rows")
    offsets = view.user_offsets
    kept = []
    start = 0
    while start < view.num_users:
        reach = np.searchsorted(offsets, offsets[start] + ROWS_AT_ONCE, side="right") - 1
        stop = min(view.num_users, max(start + 1, int(reach)))
        kept.append(_choose(view, np.arange(start, stop), group_size, keys, selection)[0])
        start = stop
    return np.concatenate(kept) if kept else np.empty(0, np.int64)


def draw_rows(
    view: UserView, users: np.ndarray, group_size: int, seed: int | bytes, round: int, selection: Selection = "random"
) -> tuple[np.ndarray, np.ndarray]:
    """The rows that a ULS cohort trains on in one round: min(group_size, rows of the user) rows of each user.

    A user's draw depends on (seed, round, user, number of rows of the user) alone: not on who else is asked for, nor
    on the order. Draws of different rounds are independent ("longest" and "first" take the same rows each round).

    Args:
        view: The training users.
        users: Integers of shape [cohort], each in 0..view.num_users-1.
        group_size: Most rows drawn of a user, at least 1.
        seed: Seed of the draws, or secret key bytes.
        round: Number of the round, from 0.
        selection: How the rows are chosen.

    Returns:
        (row numbers, unit ids), both int64 [drawn rows]: the rows in the order of users, each user's ascending, and
        for each row the place of its user in `users`.

    Raises:
        InvalidInput: For a group size below 1 or an unknown selection.
        IndexError: If there is no such user.
    """
    _check(group_size, selection)
    users = np.asarray(users, dtype=np.int64)
    if users.size and not (users.min() >= 0 and users.max() < view.num_users):
        raise IndexError(f"users must be at least 0 and below {view.num_users}")
    return _choose(view, users, group_size, _round_keys(seed, "draw-rows", round), selection)


def bounded_rows_of(
    view: UserView, users: np.ndarray, group_size: int, seed: int | bytes, selection: Selection = "random"
) -> tuple[np.ndarray, np.ndarray]:
    """What bounded_rows keeps of some users, in time that depends on their rows alone.

    Args:
        view: The training users.
        users: Integers of shape [some], each in 0..view.num_users-1.
        group_size, seed, selection: As for bounded_rows.

    Returns:
        (row numbers, places in `users`), both int64 [kept rows]: in the order of users, each user's rows ascending.

    Raises:
        InvalidInput: For a group size below 1 or an unknown selection.
    """
    _check(group_size, selection)
    return _choose(view, users, group_size, _round_keys(seed, "bounded-rows"), selection)


def _check(group_size: int, selection: str) -> None:
    require_at_least("group_size", group_size, 1)
    if selection not in get_args(Selection):
        raise InvalidInput("selection", selection, "one of " + ", ".join(get_args(Selection)))


def _choose(
    view: UserView, users: np.ndarray, group_size: int, keys: np.ndarray, selection: Selection
) -> tuple[np.ndarray, np.ndarray]:
    firsts = view.user_offsets[users]
    counts = view.user_offsets[users + 1] - firsts
    begins = np.zeros(len(users), dtype=np.int64)
    takes = np.minimum(counts, group_size)
    if selection == "chunk":
        # Multiply-shift: the bias of mapping 32 random bits to a range of n places is below n / 2**32.
        draws = _mix(_user_keys(keys, users)) >> np.uint64(32)
        begins = ((draws * (counts - takes + 1).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
    if selection in ("chunk", "first"):
        units, within = _ragged(takes)
        return firsts[units] + begins[units] + within, units
    crowded = np.flatnonzero(counts > group_size)
    owners, within = _ragged(counts[crowded])
    rows = firsts[crowded][owners] + within
    if selection == "longest":
        rank = np.iinfo(np.int64).max - view.row_lengths[rows].astype(np.int64)
        order = np.lexsort((within, rank, owners))
    else:
        order = _shuffle(_user_keys(keys, users)[crowded][owners], owners, within, len(crowded))
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts[crowded]) - counts[crowded], counts[crowded])
    chosen = np.zeros(len(rows), dtype=bool)
    chosen[order[places < group_size]] = True

    units, within = _ragged(takes)
    result = firsts[units] + within
    result[np.repeat(counts > group_size, takes)] = rows[chosen]
    return result, units


def _shuffle(user_keys: np.ndarray, owners: np.ndarray, within: np.ndarray, num_owners: int) -> np.ndarray:
    """Order of the rows by owner, and among one owner's rows by random bits.

    Owner and the upper bits share one 64-bit integer, so that one sort of integers does it. Where these tie (chance
    below 2**-40 a pair for as many owners as fit ROWS_AT_ONCE) a second sort looks at all bits: the order of a user's
    rows must not depend on how many others are ordered beside it.
    """
    owner_bits = np.uint64(max(1, int(num_owners).bit_length()))
    bits = _mix(user_keys + within.astype(np.uint64) * GOLDEN)
    together = (owners.astype(np.uint64) << (np.uint64(64) - owner_bits)) | (bits >> owner_bits)
    order = np.argsort(together, kind="stable")
    in_order = together[order]
    return np.lexsort((bits, owners)) if (in_order[1:] == in_order[:-1]).any() else order


def _ragged(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For groups of these sizes end to end: the group of each item, and the item's place in its group."""
    groups = np.repeat(np.arange(len(counts)), counts)
    return groups, np.arange(len(groups)) - np.repeat(np.cumsum(counts) - counts, counts)


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _round_keys(seed: int | bytes, purpose: str, *place: int) -> np.ndarray:
    return stream(seed, purpose, *place).integers(0, 2**64, size=2, dtype=np.uint64)


def _user_keys(keys: np.ndarray, users: np.ndarray) -> np.ndarray:
    """One 64-bit stream key for each user."""
    return _mix(_mix(users.astype(np.uint64) * GOLDEN + keys[0]) ^ keys[1])


def _mix(values: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014), a bijection that scatters every bit.

    Random bits for many (user, row) pairs at once, which a generator object per user could not give quickly. They
    decide which of a user's rows are read, never noise or cohorts: the guarantee does not rest on them.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
