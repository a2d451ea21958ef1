"""Made-up users: the rows of real ones, dealt out anew, so that users are more or less diverse than they were.

How many rows each user owns, and which users are held out, stays as it is, and no row moves from one split to another.
For studies alone: an ε of such a store is one of its made-up users, and of no person.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.data.config import Regroup
from fedsim.data.likeness import FEATURES, order_by_likeness, token_features
from fedsim.data.shape import Examples
from fedsim.data.sources import Progress
from fedsim.data.store import SPLITS, UserStore
from fedsim.data.write import StoreWriter
from fedsim.errors import InvalidInput
from fedsim.randomness import stream
from fedsim.rows import IGNORED_LABEL

MOST_ALIKE = 1 << 22
"""Rows of a split up to which an order by likeness is looked for: 1 GiB of features."""
ROWS_AT_ONCE = 1 << 14
"""Rows that are copied at a time, or one user's where these are more."""
CARRIED = (
    *("records", "bad_rows", "duplicates", "doubtful_rows", "undeclared_owners"),
    *("classes", "vocabulary_size", "tokenizer", "apart"),
)
"""What a store says of the data that it came from, and its regrouped form as well."""


def write_regrouped(
    store: UserStore, kind: Regroup, share: float, seed: int, recipe: dict[str, Any], output: Path, progress: Progress
) -> None:
    """Write a store of the same users with its rows dealt out anew; whole at `output`, or not there.

    Args:
        store: The store of the real users.
        kind: "mixed", by a keyed draw, or "alike", by likeness.
        share: Of rows that move, each by a keyed draw; the others stay with their users.
        seed: Key of the draws.
        recipe: Of the new store.
        output: Its folder, which is not there yet.
        progress: Told what is being done.

    Raises:
        InvalidInput: For more rows than can be put in order by likeness.
    """
    partial = output.with_name(output.name + ".regrouped")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writer = StoreWriter(partial, store.token_type)
    for name in SPLITS:
        view = store.split(name)
        source = rows_dealt_out(view, name, kind, share, seed)
        for first, last in _pieces(view.user_offsets):
            progress("Dealing out the rows anew", writer.num_users, store.num_users)
            _append(writer, view, source, first, last)
    said = {key: value for key, value in store.manifest.items() if key in CARRIED}
    writer.finish(store.names(), store.manifest["splits"], {**said, "recipe": recipe})
    progress("Dealing out the rows anew", store.num_users, store.num_users)
    os.replace(partial, output)


def rows_dealt_out(view: UserStore, split: str, kind: Regroup, share: float, seed: int) -> np.ndarray:
    """Which row of a split stands at each place, int64 [rows]: a permutation.

    Args:
        view: The split.
        split: Its name: each has draws of its own.
        kind, share, seed: As for `write_regrouped`.

    Raises:
        InvalidInput: For more rows than can be put in order by likeness.
    """
    source = np.arange(view.num_rows)
    moved = np.flatnonzero(stream(seed, f"moved rows of {split}").random(view.num_rows) < share)
    if kind == "mixed":
        source[moved] = stream(seed, f"mixed rows of {split}").permutation(moved)
    if kind == "alike":
        if view.num_rows > MOST_ALIKE:
            hint = f"Features of more would take over {MOST_ALIKE * FEATURES * 4 >> 30} GiB; mixed has no such limit."
            raise InvalidInput("data.regroup", "alike", f"mixed for more than {MOST_ALIKE:,} rows of a split", hint)
        source[moved] = moved[order_by_likeness(token_features(view)[moved])]
    return source


def _pieces(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of whole users of about ROWS_AT_ONCE rows each."""
    first = 0
    while first < len(offsets) - 1:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + ROWS_AT_ONCE, side="right")) - 1)
        yield first, last
        first = last


def _append(writer: StoreWriter, view: UserStore, source: np.ndarray, first: int, last: int) -> None:
    """Users first to last − 1 of a split, with the rows that stand at their places now."""
    start, stop = (int(view.user_offsets[place]) for place in (first, last))
    rows = view.take(source[start:stop])
    places = np.arange(writer.num_users, writer.num_users + last - first, dtype=np.uint64)
    writer.append(
        np.stack([np.zeros_like(places), places], axis=1),  # in the order in which they were
        Examples(
            tokens=rows.tokens,
            lengths=np.diff(rows.offsets),
            users=np.repeat(np.arange(last - first), np.diff(view.user_offsets[first : last + 1])),
            scored=None if rows.labels is None else (rows.labels != IGNORED_LABEL).astype(np.uint8),
            classes=rows.classes,
        ),
    )
