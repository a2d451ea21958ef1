"""How alike rows of text are: counts of tokens, an order in which neighbours are alike, and how diverse users are."""

from dataclasses import dataclass

import numpy as np

from fedsim.rows import UserView

FEATURES = 64
"""Buckets that tokens are counted in, by a public hash."""
PIECE = 1 << 16
"""Rows whose tokens are read at a time."""
LEAF = 4
"""Rows that are alike enough to stay in the order of the data."""
STEPS = 8
"""Of power iteration: which direction rows differ most along need not be found exactly."""


def token_features(view: UserView) -> np.ndarray:
    """Of each row how often its tokens fall into each of FEATURES buckets, scaled to length 1, float32
    [rows, FEATURES]; tokens that most rows have count little."""
    counts = np.zeros((view.num_rows, FEATURES), dtype=np.float32)
    for start in range(0, view.num_rows, PIECE):
        rows = view.take(np.arange(start, min(start + PIECE, view.num_rows)))
        lengths = np.diff(rows.offsets)
        places = np.repeat(np.arange(len(lengths)), lengths) * FEATURES + _bucket(rows.tokens)
        counts[start : start + len(lengths)] = np.bincount(places, minlength=len(lengths) * FEATURES).reshape(
            -1, FEATURES
        )
    common = (counts > 0).mean(axis=0)
    counts *= np.log1p(1 / np.maximum(common, 1 / max(view.num_rows, 1))).astype(np.float32)
    lengths = np.sqrt((counts**2).sum(axis=1, keepdims=True))
    np.divide(counts, lengths, out=counts, where=lengths > 0)
    return counts


def _bucket(tokens: np.ndarray) -> np.ndarray:
    """A bucket for each token, the same for the same token: the top bits of a multiplicative hash."""
    mixed = tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(64 - FEATURES.bit_length() + 1)).astype(np.int64)


def order_by_likeness(features: np.ndarray) -> np.ndarray:
    """An order of rows in which neighbours are alike, int64 [rows]: halves along the direction in which rows differ
    most, and so on within each half.

    Args:
        features: float32 [rows, features].
    """
    done: list[np.ndarray] = []
    waiting = [np.arange(len(features))]
    while waiting:
        rows = waiting.pop()
        if len(rows) <= LEAF:
            done.append(rows)
            continue
        ordered = rows[np.argsort(_along_most(features[rows]), kind="stable")]
        middle = len(rows) // 2
        waiting += [ordered[middle:], ordered[:middle]]  # the first half is taken next
    return np.concatenate(done) if done else np.zeros(0, dtype=np.int64)


def _along_most(features: np.ndarray) -> np.ndarray:
    """Where each row lies along the direction in which these differ most, by power iteration from a public start."""
    centred = features - features.mean(axis=0)
    direction = np.cos(np.arange(features.shape[1], dtype=np.float32))
    for _ in range(STEPS):
        direction = centred.T @ (centred @ direction)
        if not (length := float(np.sqrt(direction @ direction))):
            break  # all rows are the same
        direction /= length
    along: np.ndarray = centred @ direction
    return along


@dataclass(frozen=True)
class Diversity:
    """How different a user's rows are, of users who own two or more.

    Attributes:
        within: Mean squared distance between two rows of one user.
        between: The same of two rows of any two users.
    """

    within: float
    between: float

    @property
    def share(self) -> float:
        """0 where each user's rows are all the same, 1 where they are as different as anybody's; NaN where all rows
        are the same, or no user owns two."""
        return self.within / self.between if self.between else float("nan")


def diversity_of(view: UserView) -> Diversity:
    """The diversity of users' rows, by the tokens that these hold. Not private: it is counted without noise.

    Args:
        view: A split of a store.
    """
    counts = np.diff(view.user_offsets)
    owners = np.repeat(np.arange(view.num_users), counts)
    kept = counts[owners] > 1
    features, owners = token_features(view)[kept].astype(np.float64), owners[kept]
    if not len(features):
        return Diversity(float("nan"), 0.0)
    _, owners = np.unique(owners, return_inverse=True)
    sizes = np.bincount(owners)
    sums = np.zeros((len(sizes), features.shape[1]))
    np.add.at(sums, owners, features)
    squares = np.bincount(owners, (features**2).sum(axis=1))
    # Σ over pairs i < j of ‖x_i − x_j‖² = n·Σ‖x_i‖² − ‖Σ x_i‖²
    of_users = sizes * squares - (sums**2).sum(axis=1)
    pairs = sizes * (sizes - 1) / 2
    all_pairs = len(features) * (len(features) - 1) / 2 - pairs.sum()
    of_all = len(features) * squares.sum() - (sums.sum(axis=0) ** 2).sum() - of_users.sum()
    return Diversity(float((of_users / pairs).mean()), float(of_all / all_pairs) if all_pairs else 0.0)
