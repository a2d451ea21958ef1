"""Examples cut into rows: split, truncated or packed; short rows and duplicates left out. Vectorised."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Whole examples of whole users, user by user, in the order of the data.

    Attributes:
        tokens: Token ids, end to end.
        lengths: int64 [examples]: tokens of each.
        users: int64 [examples], ascending from 0 without gaps: whose each example is.
        prefixes: int64 [examples]: leading tokens that the loss ignores; None where it ignores none.
        classes: int32 [examples]; None where there are no labels.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    users: np.ndarray
    prefixes: np.ndarray | None = None
    classes: np.ndarray | None = None

    def where(self, kept: np.ndarray) -> "Examples":
        """The examples that a boolean mask keeps."""
        if kept.all():
            return self
        return Examples(
            tokens=self.tokens[np.repeat(kept, self.lengths)],
            lengths=self.lengths[kept],
            users=self.users[kept],
            prefixes=None if self.prefixes is None else self.prefixes[kept],
            classes=None if self.classes is None else self.classes[kept],
        )


def distinct(examples: Examples) -> Examples:
    """The first of the identical examples (same tokens, prefix and class) of each user."""
    values = np.ascontiguousarray(examples.tokens)
    ends = np.zeros(len(examples.lengths) + 1, dtype=np.int64)
    np.cumsum(examples.lengths * values.itemsize, out=ends[1:])
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(values)]
    binary = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(examples.lengths), buffers)
    columns = [examples.users, binary.dictionary_encode().indices.to_numpy()]
    columns += [column for column in (examples.prefixes, examples.classes) if column is not None]
    order = np.lexsort(columns)
    same = np.ones(len(order), dtype=bool)
    same[:1] = False
    for column in columns:
        same[1:] &= column[order[1:]] == column[order[:-1]]
    kept = np.ones(len(order), dtype=bool)
    kept[order[same]] = False  # lexsort is stable, so the first of equals is the first in the data
    return examples.where(kept)


def rows_of(examples: Examples, sequence_length: int, long_texts: str, minimum_tokens: int) -> Examples:
    """The examples cut into rows, each an example of its own.

    Args:
        examples: What to cut.
        sequence_length: Most tokens in a row.
        long_texts: "split" cuts a longer example into rows; "truncate" keeps its first row; "pack" joins all examples
            of a user end to end, then splits.
        minimum_tokens: Rows with fewer tokens are left out, and so are rows without a token to be predicted.
    """
    if long_texts == "pack":
        lengths = np.bincount(examples.users, weights=examples.lengths).astype(np.int64)
        examples = Examples(tokens=examples.tokens, lengths=lengths, users=np.arange(len(lengths)))
    pieces = np.maximum(1, -(-examples.lengths // sequence_length))
    owners = np.repeat(np.arange(len(pieces)), pieces)
    places = np.arange(len(owners)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begins = places * sequence_length
    lengths = np.minimum(examples.lengths[owners] - begins, sequence_length)
    prefixes = None
    kept = lengths >= minimum_tokens
    if examples.prefixes is not None:
        prefixes = np.clip(examples.prefixes[owners] - begins, 0, lengths)
        kept &= lengths > np.maximum(prefixes, 1)
    if long_texts == "truncate":
        kept &= places == 0
    rows = Examples(
        tokens=examples.tokens,
        lengths=lengths,
        users=examples.users[owners],
        prefixes=prefixes,
        classes=None if examples.classes is None else examples.classes[owners],
    )
    return rows.where(kept)


def of_users_with(rows: Examples, minimum_rows: int) -> Examples:
    """The rows of users that have at least so many."""
    counts = np.bincount(rows.users, minlength=1)
    return rows.where(counts[rows.users] >= minimum_rows)
