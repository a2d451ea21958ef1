"""A micro-batch's rows end to end, as one row without padding."""

from functools import cached_property

import numpy as np
import torch

from fedsim.gradients.model import on_device
from fedsim.gradients.objective import Batch
from fedsim.rows import IGNORED_LABEL, TokenRows

GPU_STEP = 128
"""On a GPU a micro-batch is filled up to a multiple of so many tokens: few shapes, each prepared once."""
SPREAD, SHORT = 1.5, 16
"""Rows are attended to together where the longest is no more than SPREAD times the shortest, or has SHORT tokens."""


class PackedRows:
    """Where each row of a packed micro-batch lies.

    Args:
        lengths: Tokens of each row, int64 [rows], none 0.
        device: Where the micro-batch is.

    Attributes:
        lengths: As given.
        tokens: Of all rows, N.
    """

    def __init__(self, lengths: np.ndarray, device: torch.device) -> None:
        self.lengths, self.device = lengths, device
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.tokens = int(self._offsets[-1])

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    @property
    def start_of_longest(self) -> int:
        """Where it begins."""
        return int(self._offsets[self.lengths.argmax()])

    @property
    def uniform(self) -> bool:
        """Whether all rows are of one length."""
        return bool((self.lengths == self.lengths[0]).all())

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """Each token's place in its row, int64 [1, N]."""
        places = np.arange(self.tokens) - np.repeat(self._offsets[:-1], self.lengths)
        return on_device(places[None], self.device)

    @cached_property
    def boundaries(self) -> torch.Tensor:
        """Where rows begin and the last one ends, int32 [rows + 1]."""
        return on_device(self._offsets.astype(np.int32), self.device)

    @cached_property
    def buckets(self) -> list[tuple[int, int]]:
        """Rows of like lengths that are padded to one: how many, and to what length, the shortest first."""
        return [(len(rows), int(self.lengths[rows[-1]])) for rows in self._of_like_lengths]

    @cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Between N packed tokens and the M of the buckets, padded, end to end: which of N each of M is, and back.

        What a row is padded with is its own last token, which causal attention shows to none of its others.
        """
        there, back, before = [], np.empty(self.tokens, dtype=np.int64), 0
        for rows in self._of_like_lengths:
            place = np.arange(self.lengths[rows[-1]])
            real = place < self.lengths[rows, None]
            index = self._offsets[rows, None] + np.minimum(place, self.lengths[rows, None] - 1)
            there.append(index.ravel())
            back[index[real]] = before + np.flatnonzero(real)
            before += index.size
        return on_device(np.concatenate(there), self.device), on_device(back, self.device)

    @cached_property
    def _of_like_lengths(self) -> list[np.ndarray]:
        order = np.argsort(self.lengths, kind="stable")
        found, start = [], 0
        for stop in range(1, len(order) + 1):
            most = max(SHORT, SPREAD * self.lengths[order[start]])
            if stop == len(order) or self.lengths[order[stop]] > most:
                found.append(order[start:stop])
                start = stop
        return found


def _rows_of(tokens: int, longest: int) -> np.ndarray:
    """As many tokens in rows of no more than `longest`, int64."""
    whole, rest = divmod(tokens, longest)
    return np.array([longest] * whole + [rest] * (rest > 0), dtype=np.int64)


def _filling(tokens: int, least: int, device: torch.device) -> int:
    """How many tokens follow so many of rows, no fewer than least."""
    filled = tokens + least
    if device.type == "cuda":
        return least + -filled % GPU_STEP
    return least + int(filled <= GPU_STEP and filled % 2 == 0)


def packed_batch(
    rows: TokenRows, indices: np.ndarray, device: torch.device, pad_token: int = 0, whole: bool = True
) -> tuple[Batch, PackedRows]:
    """The rows at indices end to end, and where they lie.

    On a GPU rows that score nothing fill the micro-batch up to a multiple of GPU_STEP, none longer than its own: the
    model has positions for those. Elsewhere one token makes a short one odd, so that its tokens are not as many as the
    model's heads: these must be told apart.

    Args:
        whole: Whether rows keep their last tokens, which predict nothing. If not, each needs two at least, and behind
            them all follows a token that scores nothing, for a batch has one label fewer than tokens.
    """
    taken = rows.take(indices)
    lengths, tokens = taken.lengths, taken.tokens.astype(np.int64)
    labels = np.append((tokens if taken.labels is None else taken.labels.astype(np.int64))[1:], IGNORED_LABEL)
    ends = taken.offsets[1:] - 1
    if whole:
        labels[ends] = IGNORED_LABEL
    else:
        tokens, labels, lengths = np.delete(tokens, ends), np.delete(labels, ends), lengths - 1
    more = _filling(len(tokens), 0 if whole else 1, device)
    if more:
        tokens = np.append(tokens, np.full(more, pad_token))
        labels = np.append(labels, np.full(more, IGNORED_LABEL))
        lengths = np.append(lengths, _rows_of(more, int(lengths.max())))
    packed = PackedRows(lengths, device)
    batch = Batch(
        input_ids=on_device(tokens[None], device),
        attention_mask=None,
        labels=on_device(labels[None, :-1], device),
        position_ids=packed.position_ids,
    )
    return batch, packed
