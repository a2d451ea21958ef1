"""Examples cut into rows: split, truncated or packed; short rows and duplicates left out. Vectorised."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fedsim.data.frame import Frame


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Whole examples of whole users, user by user, in the order of the data.

    Attributes:
        tokens: Token ids, end to end.
        lengths: int64 [examples]: tokens of each.
        users: int64 [examples], ascending from 0 without gaps: whose each example is.
        prefixes: int64 [examples]: leading tokens (the prompt) that the loss ignores; None where it ignores none.
        scored: uint8, aligned with tokens: 1 where one counts in the loss; None where all do, but for prefixes.
        classes: int32 [examples]; None where there are no labels.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    users: np.ndarray
    prefixes: np.ndarray | None = None
    scored: np.ndarray | None = None
    classes: np.ndarray | None = None

    def where(self, kept: np.ndarray) -> "Examples":
        """The examples that a boolean mask keeps."""
        if kept.all():
            return self
        places = np.repeat(kept, self.lengths)
        return Examples(
            tokens=self.tokens[places],
            lengths=self.lengths[kept],
            users=self.users[kept],
            prefixes=None if self.prefixes is None else self.prefixes[kept],
            scored=None if self.scored is None else self.scored[places],
            classes=None if self.classes is None else self.classes[kept],
        )


def distinct(examples: Examples) -> Examples:
    """The first of the identical examples (same tokens, of which the same are scored, and class) of each user."""
    columns = [examples.users]
    columns += [
        _alike(values, examples.lengths) for values in (examples.tokens, examples.scored) if values is not None
    ]
    columns += [column for column in (examples.prefixes, examples.classes) if column is not None]
    order = np.lexsort(columns)
    same = np.ones(len(order), dtype=bool)
    same[:1] = False
    for column in columns:
        same[1:] &= column[order[1:]] == column[order[:-1]]
    kept = np.ones(len(order), dtype=bool)
    kept[order[same]] = False  # lexsort is stable, so the first of equals is the first in the data
    return examples.where(kept)


def _alike(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """For ragged values end to end: integers [values], the same where the values are the same."""
    values = np.ascontiguousarray(values)
    ends = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths * values.itemsize, out=ends[1:])
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(values)]
    binary = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(lengths), buffers)
    indices: np.ndarray = binary.dictionary_encode().indices.to_numpy()
    return indices


def rows_of(
    examples: Examples, sequence_length: int, long_texts: str, minimum_tokens: int, frame: Frame | None = None
) -> Examples:
    """The examples cut into rows, each an example of its own.

    Args:
        examples: What to cut.
        sequence_length: Most tokens in a row.
        long_texts: "split" cuts a longer example into rows; "truncate" keeps its first row; "pack" joins all examples
            of a user end to end, then splits.
        minimum_tokens: Rows with fewer tokens are left out, and so are rows without a token to be predicted.
        frame: Special tokens that stand around every row, in place of some of the text where it fills the row.
    """
    if frame is not None:
        return _framed(examples, sequence_length, long_texts, minimum_tokens, frame)
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
    if examples.scored is not None:
        # A row's first token is never predicted.
        scored = np.concatenate([[0], np.cumsum(examples.scored, dtype=np.int64)])
        starts = (np.cumsum(examples.lengths) - examples.lengths)[owners] + begins
        kept &= scored[starts + lengths] > scored[np.minimum(starts + 1, starts + lengths)]
    if long_texts == "truncate":
        kept &= places == 0
    rows = Examples(
        tokens=examples.tokens,
        lengths=lengths,
        users=examples.users[owners],
        prefixes=prefixes,
        scored=examples.scored,
        classes=None if examples.classes is None else examples.classes[owners],
    )
    return rows.where(kept)


def _framed(examples: Examples, sequence_length: int, long_texts: str, minimum_tokens: int, frame: Frame) -> Examples:
    """The examples cut into rows with the special tokens around each.

    A prompt and its text that are too long together lose tokens at their ends, the longer one first ("longest first"
    in transformers). Where texts are split, the prompt so cut stands before each piece.
    """
    room = sequence_length - len(frame)
    prompts = np.zeros_like(examples.lengths) if examples.prefixes is None else examples.prefixes
    texts = examples.lengths - prompts
    half = room // 2 + (room % 2) * (prompts > texts)
    read = np.minimum(prompts, np.maximum(half, room - texts))
    pieces = np.maximum(1, -(-texts // (room - read)))
    owners = np.repeat(np.arange(len(pieces)), pieces)
    places = np.arange(len(owners)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begins = places * (room - read)[owners]
    lengths = np.minimum(texts[owners] - begins, (room - read)[owners])
    kept = (lengths > 0) & (lengths + read[owners] + len(frame) >= minimum_tokens)
    if long_texts == "truncate":
        kept &= places == 0
    owners, begins, lengths = owners[kept], begins[kept], lengths[kept]

    # A row is five runs of one array: of the examples' tokens, and of the special tokens behind these.
    inner = [*frame.between, *frame.opening]
    special = np.array([*frame.before, *inner, *frame.after], dtype=examples.tokens.dtype)
    opening, middle, closing = len(frame.before), len(inner), len(frame.after)
    behind = len(examples.tokens)
    starts = (np.cumsum(examples.lengths) - examples.lengths)[owners]
    runs = [
        (behind, opening),
        (starts, read[owners]),
        (behind + opening, middle),
        (starts + prompts[owners] + begins, lengths),
        (behind + opening + middle, closing),
    ]
    firsts, sizes = (np.stack([np.broadcast_to(run[side], owners.shape) for run in runs], 1) for side in (0, 1))
    offsets = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)
    tokens = np.concatenate([examples.tokens, special])
    return Examples(
        tokens=tokens[np.repeat((firsts - offsets).ravel(), sizes.ravel()) + np.arange(sizes.sum())],
        lengths=sizes.sum(1),
        users=examples.users[owners],
        prefixes=None if examples.prefixes is None else sizes[:, :3].sum(1) - len(frame.opening),
        classes=None if examples.classes is None else examples.classes[owners],
    )


def of_users_with(rows: Examples, minimum_rows: int) -> Examples:
    """The rows of users that have at least so many."""
    counts = np.bincount(rows.users, minlength=1)
    return rows.where(counts[rows.users] >= minimum_rows)
