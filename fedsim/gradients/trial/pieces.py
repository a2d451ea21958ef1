"""On which of the caller's rows a model is tried."""

import numpy as np

from fedsim.gradients.fast import FastSum
from fedsim.gradients.objective import CausalLanguageModel
from fedsim.gradients.trial.known_code import is_known_code
from fedsim.gradients.trial.leaks import LEAST_TOKENS
from fedsim.gradients.units import pack_units, sharing_units
from fedsim.rows import TokenRows


def padded_pieces(asked: FastSum) -> list[list[TokenRows]] | None:
    """The longest of the caller's units that shares a micro-batch, and the shortest that fits beside it, or the same
    once more, cut to about half. None if no unit shares one."""
    units, together = asked.units, pack_units(asked.units, asked.budget)[0]
    if not together:
        return None
    sharing = np.concatenate(together)  # from the shortest to the longest
    longest = int(sharing[-1])
    own = units.rows[units.offsets[longest] : units.offsets[longest + 1]]
    most = int(asked.rows.lengths[own].max())
    fits = sharing[:-1][(units.counts[sharing[:-1]] + units.counts[longest]) * most <= asked.budget]
    shortest = int(fits[0]) if len(fits) else longest
    other = units.rows[units.offsets[shortest] : units.offsets[shortest + 1]]
    return [[asked.rows.take(own)], [_cut(asked, row, most // 2 + 1) for row in other]]


def packed_pieces(asked: FastSum) -> list[list[TokenRows]] | None:
    """Of the caller's unit that has the longest row of those that share micro-batches, and as many others of its rows
    as take half a micro-batch; of the one with the fewest tokens as many as take a quarter, cut to half that length;
    and one of the first's rows once more, cut to a third.

    None for a model whose rows are not packed: of another objective, of code of somebody's own, or with layers that
    have no rule of their own.
    """
    generic = any(kind.startswith("generic") for kind in asked.kinds().values())
    if type(asked.objective) is not CausalLanguageModel or generic or not is_known_code(asked.model):
        return None
    units, room = asked.units, asked.budget // 4
    sharing = sharing_units(units, asked.budget, packed=True)
    if asked.budget < LEAST_TOKENS or not len(sharing):
        return None
    first = int(sharing[units.longest[sharing].argmax()])
    fewest = int(sharing[units.tokens[sharing].argmin()])
    longest = int(units.longest[first])
    wanted = ((first, longest, 2 * room), (fewest, longest // 2 + 1, room), (first, longest // 3 + 1, 1))
    pieces = []
    for unit, most, total in wanted:
        positions = np.arange(units.offsets[unit], units.offsets[unit + 1])
        positions = positions[np.argsort(-units.lengths[positions], kind="stable")]
        lengths = np.minimum(units.lengths[positions], most)
        fitting = max(1, int(np.searchsorted(np.cumsum(lengths), total, side="right")))
        pieces.append([_cut(asked, row, most) for row in units.rows[positions[:fitting]]])
    return pieces


def _cut(asked: FastSum, index: int, length: int) -> TokenRows:
    """A row's first or, if these score no label, its last `length` tokens: of more than half a row, either does."""
    row = asked.rows.take(np.array([index]))
    first = _part(row, slice(0, length))
    return first if asked.objective.label_counts(first).any() else _part(row, slice(-length, None))


def _part(row: TokenRows, piece: slice) -> TokenRows:
    """Some of the tokens of a single row."""
    tokens, labels = row.tokens[piece], row.labels
    labels = None if labels is None else labels[piece]
    return TokenRows(tokens=tokens, offsets=np.array([0, len(tokens)]), labels=labels, classes=row.classes)
