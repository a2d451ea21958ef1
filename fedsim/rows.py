"""Ragged rows of tokens, and the users that own them: what a user store hands to plans, gradients and evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

IGNORED_LABEL = -100
"""A token whose label has this value adds nothing to the loss (PyTorch's and Hugging Face's convention)."""


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows of tokens of different lengths, stored end to end.

    Attributes:
        tokens: Token ids, integer array of shape [total tokens].
        offsets: int64 array of shape [rows + 1]; row r is tokens[offsets[r]:offsets[r + 1]].
        labels: Integer array of shape [total tokens] aligned with tokens (labels[i] is tokens[i], or
            IGNORED_LABEL where that token is not to be predicted); None means that every token counts.
        classes: Integer array of shape [rows], one class a row, for sequence classification; None otherwise.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None = None
    classes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each row, int64 array of shape [rows]."""
        return np.diff(self.offsets)

    def take(self, row_indices: np.ndarray) -> "TokenRows":
        """The rows at these indices, in that order; repeats are allowed."""
        lengths = self.lengths[row_indices]
        offsets = np.zeros(len(row_indices) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        places = np.repeat(self.offsets[:-1][row_indices] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return TokenRows(
            tokens=self.tokens[places],
            offsets=offsets,
            labels=None if self.labels is None else self.labels[places],
            classes=None if self.classes is None else self.classes[row_indices],
        )

    @classmethod
    def joined(cls, parts: Sequence["TokenRows"]) -> "TokenRows":
        """The rows of several parts, one after the other; all with labels and classes, or none."""

        def column(arrays: list[np.ndarray | None]) -> np.ndarray | None:
            present = [array for array in arrays if array is not None]
            return np.concatenate(present) if len(present) == len(arrays) else None

        offsets = np.concatenate([[0], *(part.lengths for part in parts)]).cumsum().astype(np.int64)
        return cls(
            tokens=np.concatenate([part.tokens for part in parts]),
            offsets=offsets,
            labels=column([part.labels for part in parts]),
            classes=column([part.classes for part in parts]),
        )

    @classmethod
    def from_lists(cls, rows: list[list[int]], classes: np.ndarray | None = None) -> "TokenRows":
        """Rows given as lists of token ids, in order."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        tokens = np.array([token for row in rows for token in row], dtype=np.int64)
        return cls(tokens=tokens, offsets=offsets, classes=classes)


def with_prompts(rows: TokenRows) -> TokenRows:
    """The same rows, of which the first half of the tokens is not to be predicted."""
    places = np.arange(len(rows.tokens)) - np.repeat(rows.offsets[:-1], rows.lengths)
    labels = np.where(2 * places < np.repeat(rows.lengths, rows.lengths), IGNORED_LABEL, rows.tokens)
    return replace(rows, labels=labels)


class RowView(Protocol):
    """Rows that are looked up by number."""

    @property
    def row_lengths(self) -> np.ndarray:
        """Tokens in each row, integers [num_rows]."""

    def take(self, row_indices: np.ndarray, /) -> TokenRows:
        """Rows by number, each in 0..num_rows-1, in the order asked for; repeats are allowed."""


class SizedUsers(Protocol):
    """How many examples each of a range of users owns: what a plan needs to know before there is any text."""

    @property
    def num_users(self) -> int:
        """Users in this range."""

    @property
    def num_rows(self) -> int:
        """Rows of all of them."""

    @property
    def user_offsets(self) -> np.ndarray:
        """int64 [num_users + 1]: user u owns rows user_offsets[u] to user_offsets[u + 1] - 1."""


@dataclass(frozen=True, kw_only=True)
class SizeCounts:
    """How many users own how many rows.

    Attributes:
        sizes: Numbers of rows that some user owns, ascending, int64 [K].
        users: How many users own as many, int64 [K].
    """

    sizes: np.ndarray
    users: np.ndarray

    @property
    def num_users(self) -> int:
        """Users in all."""
        return int(self.users.sum())

    @property
    def largest(self) -> int:
        """Most rows of a user; 0 without users."""
        return int(self.sizes.max(initial=0))

    def kept(self, most: int) -> int:
        """Rows in all where each user keeps at most so many."""
        return int(np.minimum(self.sizes, most) @ self.users)

    def quantile(self, level: float) -> float:
        """Rows that a share `level` of the users do not exceed, interpolated between two users.

        Raises:
            IndexError: If there are no users.
        """
        ends = np.cumsum(self.users)
        place = level * (int(ends[-1]) - 1)
        below = int(place)
        low, high = self.sizes[np.searchsorted(ends, [below, min(below + 1, int(ends[-1]) - 1)], side="right")]
        share = place - below
        # From the nearer of both, as numpy does.
        return float(low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share))

    @classmethod
    def joined(cls, parts: Sequence["SizeCounts"]) -> "SizeCounts":
        """Those of all users of several parts."""
        none = np.empty(0, np.int64)
        sizes, places = np.unique(np.concatenate([none, *(part.sizes for part in parts)]), return_inverse=True)
        users = np.zeros(len(sizes), np.int64)
        np.add.at(users, places, np.concatenate([none, *(part.users for part in parts)]))
        return cls(sizes=sizes, users=users)

    @classmethod
    def of(cls, view: SizedUsers) -> "SizeCounts":
        """Those of a range of users: as it says itself, and counted where it does not, which takes O(users)."""
        said = view.size_counts if isinstance(view, CountedUsers) else None
        return cls.counted(np.diff(view.user_offsets)) if said is None else said

    @classmethod
    def counted(cls, sizes: np.ndarray) -> "SizeCounts":
        """Those of users that own so many rows each, integers [users]."""
        found, users = np.unique(np.asarray(sizes, dtype=np.int64), return_counts=True)
        return cls(sizes=found, users=users.astype(np.int64))


@runtime_checkable
class CountedUsers(Protocol):
    """Users that may know how many of them own how much, without looking at each."""

    @property
    def size_counts(self) -> SizeCounts | None:
        """How many users own how many rows; None where nobody has counted them."""


class UserView(SizedUsers, RowView, Protocol):
    """A range of users and their rows, as a split of a `fedsim.data.store.UserStore` is one."""


class Splits(Protocol):
    """The users of a data set, in splits."""

    def split(self, name: str) -> UserView:
        """The users of "train", "validation" or "test"."""
